"""The mixture of experts of DeepSeek-V3 (2412.19437, §2.1.2): routed experts, shared experts, balance by a bias."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ritornello.config import ModelConfig
from ritornello.model.attention import lora_options
from ritornello.model.context import Loop
from ritornello.model.lora import Linear
from ritornello.ops.experts import experts
from ritornello.ops.linear import linear, lowered
from ritornello.ops.precision import at_least_float32
from ritornello.ops.routing import balance_loss, choose, sum_tokens


class FeedForward(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate x) · up x); or `relu2`: down(relu(up x)² / 2), half of 2109.08668's."""

    def __init__(self, config: ModelConfig, width: int, *, looped: bool) -> None:
        super().__init__()
        lora = lora_options(config, "ffn", looped=looped)
        self.gate_proj = Linear(config.dim, width, **lora) if config.activation == "swiglu" else None
        self.up_proj = Linear(config.dim, width, **lora)
        self.down_proj = Linear(width, config.dim, **lora)

    def forward(self, x: Tensor, table: Loop) -> Tensor:
        x = lowered(x)
        if self.gate_proj is None:
            return self.down_proj(self.up_proj(x, table).relu().square() / 2, table)
        return self.down_proj(nn.functional.silu(self.gate_proj(x, table)) * self.up_proj(x, table), table)


@dataclass(frozen=True)
class Routed:
    """indices (B, T, k): each token's experts; balance: the sequence-level balance loss, a scalar."""

    indices: Tensor
    balance: Tensor


class Router(nn.Module):
    """Scores E experts in float32 and picks k. The bias takes part in the choice, never in the weights (eq. 16)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        shape = (config.n_loops, config.n_experts) if config.router_bias_per_loop else (config.n_experts,)
        self.register_buffer("e_score_correction_bias", torch.empty(shape))

    def reset(self, generator: torch.Generator) -> None:
        self.e_score_correction_bias.zero_()

    def forward(self, x: Tensor, table: Loop) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> indices (B, T, k), weights (B, T, k), scores (B, T, E)."""
        c = self.config
        weight, bias = at_least_float32(self.weight), self.e_score_correction_bias
        with torch.autocast(x.device.type, enabled=False):
            logits = linear(x.to(weight.dtype), weight)
        bias, groups = bias[table] if c.router_bias_per_loop else bias, (c.n_expert_groups, c.n_active_groups)
        kind, k = c.router_score == "sigmoid", c.n_active_experts
        indices, weights, scores = choose(logits, bias, k, groups, sigmoid=kind, normalize=c.normalize_expert_weights)
        return indices, weights * c.router_scale, scores


class Experts(nn.Module):
    """The weights of E SwiGLU networks, stacked as in transformers; gate and up side by side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.n_experts, 2 * config.expert_dim, config.dim))
        self.down_proj = nn.Parameter(torch.empty(config.n_experts, config.dim, config.expert_dim))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, exact: bool = False) -> Tensor:
        """x (N, D), indices and weights (N, k) -> (N, D)."""
        return experts(x.to(self.down_proj.dtype), self.gate_up_proj, self.down_proj, indices, weights, exact=exact)


class MixtureOfExperts(nn.Module):
    """k of E routed experts, and the shared ones for every token."""

    def __init__(self, config: ModelConfig, *, looped: bool) -> None:
        super().__init__()
        self.config, self.sum_tokens = config, sum_tokens
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.expert_dim
        self.shared_experts = FeedForward(config, width, looped=looped) if width else None

    def forward(self, x: Tensor, table: Loop, masks: list[Tensor | None], exact: bool = False) -> tuple[Tensor, Routed]:
        """x (B, T, D); masks (B, T or 1) bool: tokens that count in the balance loss; exact: see Context."""
        indices, weights, scores = self.router(x, table)
        chosen = x.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1)
        y = self.experts(*chosen, **({"exact": True} if exact else {})).view(x.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, table)
        balanced = self.training and torch.is_grad_enabled()
        loss = balance_loss(indices, scores, masks, self.sum_tokens) if balanced else scores.new_zeros(())
        return y, Routed(indices, loss)
