"""OpenMythos 0.5.0: its models as ours, both ways.

Its layers are ours by other names. Its loop is not, and so is written here; cache, budgets, exits and engine are ours:

    x  = block(norm(h + e + index(t)))           residual stream and all, of which ours adds the branches alone
    h <- A h + B e + x + adapter_t(x)            e as the prelude leaves it, h_0 = e

Without an exit rule halting is as published: loops weigh what their token's probability says until the sum reaches the
threshold, where the rest falls due; such tokens are computed on, and weights sum to less than 1 where loops run out
before. With `ExitRule("cumulative", threshold)` a halted token is frozen, and its last loop takes the rest.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ritornello import recipes
from ritornello.config import ExitRule, ModelConfig, require, require_choice, require_float, require_int
from ritornello.hub import mythos_names
from ritornello.model.cache import KeyValues
from ritornello.model.context import Context, Loop
from ritornello.model.halting import Halting, HaltState, Signals
from ritornello.model.layers import Pass
from ritornello.model.moe import Routed
from ritornello.model.norm import RMSNorm
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import tensors

SAME = ("vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "rope_theta", "n_experts", "expert_dim", "dropout")
LATENT = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")  # of MLA alone
RENAMED = {  # theirs: ours
    "max_loop_iters": "n_loops",
    "prelude_layers": "n_prelude_layers",
    "coda_layers": "n_coda_layers",
    "attn_type": "attention",
    "n_experts_per_tok": "n_active_experts",
}
OWN = ("n_shared_experts", "act_threshold", "lora_rank", "max_output_tokens")  # said otherwise here, or of no effect
INDEX_THETA = 10_000.0
ALWAYS: dict[str, Any] = {
    "n_recurrent_layers": 1,
    "router_score": "softmax",
    "tie_embeddings": True,
    "lora_rank": 0,
    "loop_embedding": False,
    "normalize_input": False,
    "injection": "lti",
    "rho_max": 1.0,
    "initial_state": "e",
    "halting": "act",
    "read_out": "mixture",
}


def config_from(theirs: Mapping[str, Any]) -> ModelConfig:
    """`dataclasses.asdict` of a MythosConfig, whole, as ours: everything but its adapter's rank and act_threshold.

    Raises:
        ValueError: a field that is missing, unknown or out of range, by its name.
    """
    known = (*SAME, *LATENT, *RENAMED, *OWN)
    for name in theirs:
        require_choice("MythosConfig", name, known)
    for name in known:
        require(name in theirs, name, "nothing", "given")
    given = {name: theirs[name] for name in (*SAME, *LATENT)} | {ours: theirs[name] for name, ours in RENAMED.items()}
    for name in ("dim", "n_heads", "n_experts_per_tok"):
        require_int(name, theirs[name], 1)
    require_int("n_shared_experts", theirs["n_shared_experts"], 0)
    given |= {"head_dim": theirs["dim"] // theirs["n_heads"], "ffn_dim": theirs["dim"] * 4 // 3}
    # each of its shared experts is k times as wide as a routed one, and their sum is one of the summed width
    given["n_shared_experts"] = theirs["n_shared_experts"] * theirs["n_experts_per_tok"]
    return recipes.validated(ModelConfig, {**ALWAYS, **given})


class Adapter(nn.Module):
    """(scale_t · (down x)) B: the loops share two matrices, and each has its own scales between them."""

    def __init__(self, dim: int, rank: int, n_loops: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, dim))
        self.up = nn.Parameter(torch.empty(rank, dim))
        self.scale = nn.Parameter(torch.empty(n_loops, rank))

    def forward(self, x: Tensor, table: Loop) -> Tensor:
        """x (m, T, D); table: see `Pass`."""
        kind = torch.promote_types(x.dtype, self.down.dtype)
        return (x.to(kind) @ self.down.to(kind).t() * self.scale[table]) @ self.up.to(kind)


class PublishedHalting(Halting):
    """Without a rule, theirs: see the module."""

    def __init__(self, config: ModelConfig, threshold: float) -> None:
        super().__init__(config)
        self.published = ExitRule("cumulative", threshold)

    def step(
        self, state: HaltState, now: Signals, rule: ExitRule | None, loop: Loop, idle: Tensor, last: Tensor | bool
    ) -> HaltState:
        if rule is not None:
            return super().step(state, now, rule, loop, idle, last)
        new = super().step(state, now, self.published, loop, idle | (state.survival <= 0), False)
        return replace(new, halted=state.halted | (last & ~idle))


class OpenMythos(RecurrentDepthTransformer):
    """A model of theirs: `config` from `config_from`, act_threshold and lora_rank as they have it."""

    halting: PublishedHalting  # pyrefly: ignore

    def __init__(self, config: ModelConfig, *, act_threshold: float, lora_rank: int, seed: int = 0) -> None:
        require_float("act_threshold", act_threshold, 0, 1)
        require_int("lora_rank", lora_rank, 1)
        super().__init__(config, seed=seed)
        self.halting = PublishedHalting(config, act_threshold)
        self.read_norm = RMSNorm(config.dim, config.norm_eps)
        self.adapter = Adapter(config.dim, lora_rank, config.n_loops)
        if not self.read_norm.weight.is_meta:
            self.init_weights(seed)

    def loop_once(
        self, h: Tensor, e: Tensor, loop: Loop, context: Context, kv: KeyValues, running: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routed, ...]]:
        last = self.config.n_loops - 1
        table = min(loop, last) if isinstance(loop, int) else loop.clamp(max=last)
        x = self.read_norm(h + e + self.index(loop, h))
        x, routed = self.recurrent[0](x, Pass(loop, table, context, kv, running))
        return self.injection(h, e) + x + self.adapter(x, table), (routed,)

    def index(self, loop: Loop, like: Tensor) -> Tensor:
        """Sines and cosines of the loop's number, on the first eighth of the channels: (D,), or (m, 1 or T, D)."""
        n = self.config.dim // 8
        speeds = INDEX_THETA ** -(torch.arange(0, n, 2, device=like.device, dtype=like.dtype) / max(n, 1))
        angles = (loop[..., None] if isinstance(loop, Tensor) else loop) * speeds
        waves = torch.cat((angles.sin(), angles.cos()), -1)[..., :n]
        return nn.functional.pad(waves, (0, self.config.dim - n))

    def state_bound(self, n_loops: int) -> float:
        """None is known: the block hands its own input on, beside A h + B e."""
        raise ValueError("state_bound: OpenMythos' loop adds its residual stream, which the bound leaves out")


def from_theirs(config: Mapping[str, Any], state: Mapping[str, Tensor], source: object = "state_dict") -> OpenMythos:
    """A model of theirs, in evaluation mode: `asdict` of its configuration and its state_dict.

    Raises:
        ValueError: a field, a missing or unknown tensor, a wrong shape, a number that is none; `source` in messages.
    """
    with torch.device("meta"):
        how = {name: config.get(name) for name in ("act_threshold", "lora_rank")}
        model = OpenMythos(config_from(config), **how)  # pyrefly: ignore
    tensors.require_finite({name: x for name, x in state.items() if not x.is_complex()}, source)
    found = mythos_names.from_theirs(model.config, config["n_shared_experts"], state, source)
    tensors.check(found, tensors.in_types_of(found, model.state_dict()), source)
    model.load_state_dict(found, assign=True)
    return model.eval().requires_grad_()


def to_theirs(model: OpenMythos) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its configuration and the state_dict that `OpenMythos(MythosConfig(**configuration))` takes with strict=False:
    it makes its rotary tables itself. The injection's A and B are theirs up to rounding."""
    c, k = model.config, model.config.n_active_experts
    config = {name: getattr(c, name) for name in (*SAME, *LATENT)}
    config |= {name: getattr(c, ours) for name, ours in RENAMED.items()}
    config |= {"n_shared_experts": c.n_shared_experts // k, "lora_rank": model.adapter.down.shape[0]}
    config |= {"act_threshold": model.halting.published.threshold, "max_output_tokens": 4096}
    state = {name: x.detach() for name, x in model.state_dict().items()}
    return config, mythos_names.to_theirs(c, config["n_shared_experts"], state)


def load(folder: str | Path) -> OpenMythos:
    """A model of config.json (`asdict` of its MythosConfig) and model.safetensors (of its state_dict).

    Raises:
        ValueError: see `from_theirs`; a pickle is never read.
    """
    source = Path(folder) / "config.json"
    config = recipes.read_object(source)
    weights = Path(folder) / "model.safetensors"
    require(
        weights.is_file(), str(weights), "nothing", "a file", "torch.save's are pickles: convert where it is trusted"
    )
    return from_theirs(config, tensors.read(weights), weights)
