"""One transformer layer, the same for prelude, recurrent block and coda."""

from dataclasses import dataclass

from torch import Tensor, nn

from ritornello.config import ModelConfig
from ritornello.model.attention import ATTENTION
from ritornello.model.cache import KeyValues
from ritornello.model.context import Context, Loop
from ritornello.model.moe import FeedForward, MixtureOfExperts, Routed
from ritornello.model.norm import RMSNorm
from ritornello.ops.noise import dropout


@dataclass(frozen=True)
class Pass:
    """What the layers of one pass share: its loop index, and `table` = min(loop, n_loops - 1) for per-loop tables.

    running (B, T or 1) bool: who has not halted, None: all. shift, broadcast over (B, T, D): added to branches' inputs.
    """

    loop: Loop
    table: Loop
    context: Context
    kv: KeyValues
    running: Tensor | None = None
    shift: Tensor | None = None


class Layer(nn.Module):
    """x (B, T, D) -> x + attention + feed-forward, and how tokens were routed if it has experts.

    Norms: `pre`, x + f(norm(x)), as in Llama. `pre_post`, x + norm(f(norm(x))) (Peri-LN 2502.02732). `sandwich`,
    norm(x + f(norm(x))) (Huginn 2502.05171), which normalises the residual stream itself.
    """

    def __init__(self, config: ModelConfig, *, layer: int, looped: bool) -> None:
        super().__init__()
        self.norm_kind, self.dropout, self.layer = config.norm, config.dropout, layer
        self.self_attn = ATTENTION[config.attention](config, layer=layer, looped=looped)
        if looped and config.ffn == "moe":
            self.mlp = MixtureOfExperts(config, looped=looped)
        else:
            self.mlp = FeedForward(config, config.ffn_dim, looped=looped)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.attn_out_layernorm = RMSNorm(config.dim, config.norm_eps) if config.norm != "pre" else None
        self.mlp_out_layernorm = RMSNorm(config.dim, config.norm_eps) if config.norm != "pre" else None

    def forward(self, x: Tensor, now: Pass) -> tuple[Tensor, Routed | None]:
        y = self._read(self.input_layernorm, x, now)
        y = self.self_attn(y, now.loop, now.table, now.context, now.kv, now.running)
        x = self._write("attention", x, y, now)
        y, routed = self._feed_forward(self._read(self.post_attention_layernorm, x, now), now)
        return self._write("ffn", x, y, now), routed

    def _read(self, norm: nn.Module, x: Tensor, now: Pass) -> Tensor:
        y = norm(x)
        return y if now.shift is None else y + now.shift

    def _feed_forward(self, y: Tensor, now: Pass) -> tuple[Tensor, Routed | None]:
        if isinstance(self.mlp, FeedForward):
            return self.mlp(y, now.table), None
        y, routed = self.mlp(y, now.table, [now.context.real(), now.running], now.context.exact)
        if now.context.capture is not None:
            now.context.capture.add(f"{self.layer}.experts", now.loop, routed.indices)
        return y, routed

    def _write(self, branch: str, x: Tensor, y: Tensor, now: Pass) -> Tensor:
        """Add a branch's output to the residual stream, which keeps x's precision."""
        norm = self.attn_out_layernorm if branch == "attention" else self.mlp_out_layernorm
        y = norm(y) if norm is not None and self.norm_kind == "pre_post" else y
        if self.training and self.dropout:
            assert now.context.key is not None
            key = now.context.key.fold(now.context.positions, self.layer, now.loop, int(branch == "ffn"))
            y = dropout(y, self.dropout, key)
        if now.context.capture is not None:
            now.context.capture.add(f"{self.layer}.{branch}", now.loop, y)
        x = x + y
        return norm(x).to(x.dtype) if norm is not None and self.norm_kind == "sandwich" else x
