"""Bytes that a forward pass leaves for the backward pass, for each token, by closed formulas.

A tensor counts once, however many operators saved it. Two things differ between devices (`Keeps.fused`): a CPU
normalises by single operators, which keep the normalised values beside the input; and its experts keep slots where a
GPU's grouped products keep pairs and their outputs. All else is the same, so a check on a CPU checks it for both.
Attention counts as one kernel that keeps queries, keys, values, its output and a number for each head. Not counted:
the low-rank deltas that sequences of drawn depth pick, and masks.
"""

from dataclasses import dataclass
from functools import cache

from ritornello.config import ModelConfig, Recipe, require


@dataclass(frozen=True)
class Keeps:
    """How numbers are kept. low: bytes of one that products read (2 under bfloat16 autocast); fused: as on a GPU.
    tensor: processes that share heads and widths, each keeping its part of what lies between two products; context:
    those that share a sequence, each keeping its keys and values whole."""

    low: int
    fused: bool = True
    tensor: int = 1
    context: int = 1

    @property
    def lowered(self) -> bool:
        return self.low < 4


@dataclass(frozen=True)
class Kept:
    """Bytes for each token. `prelude`, `coda`: their layers and norms; `loop`: of one loop, the state that enters it
    included; `entering`: what is left of that where activations are computed again; `seen`: of a loop with or without
    gradients, what statistics and losses read later; `working`: the largest sum of gradients under way in a layer."""

    prelude: float
    loop: float
    entering: float
    seen: float
    coda: float
    working: float


def check(recipe: Recipe) -> None:
    """Refuse what the formulas do not know.

    Raises:
        ValueError: several carry streams, an anchored state, or a prediction of every loop in the loss.
    """
    c, remedy = recipe.model, "what else a step keeps has no formula yet"
    require(c.carry_streams == 1, "model.carry_streams", c.carry_streams, "1 for a plan", remedy)
    require(c.state_norm != "loop", "model.state_norm", c.state_norm, "'none' or 'read' for a plan", remedy)
    require(not c.anchored, "model.anchored", c.anchored, "False for a plan", remedy)
    last = c.halting != "act" or c.read_out == "mixture"
    require(last, "model.read_out", c.read_out, "'mixture' with halting 'act' for a plan", remedy)
    loss = recipe.train.halting_loss
    require(loss == "frozen", "train.halting_loss", loss, "'frozen' for a plan", remedy)


@cache
def kept(config: ModelConfig, keeps: Keeps) -> Kept:
    """See `Kept`. Single precision streams throughout, products in `keeps.low` bytes."""
    c = config
    state, n_routed = 4 * c.dim, c.n_active_experts * c.n_recurrent_layers if c.ffn == "moe" else 0
    plain, looped = _layer(c, keeps, looped=False), _layer(c, keeps, looped=True)
    normed = 4 * c.dim + _norm(c.dim, keeps)  # a norm outside layers: its input, and what it keeps
    tables = 8 * c.rope_dim if c.positions == "rope" else 0
    ids = 8 * (2 + c.n_token_tables)  # tokens, labels, positions
    head = normed + 4 * c.dim  # and hidden
    later = state if c.needs_probe else 0
    return Kept(
        prelude=c.n_prelude_layers * plain + tables + ids + (0 if c.is_plain else normed + 4 * c.dim),
        loop=0 if c.is_plain else _injection(c) + c.n_recurrent_layers * looped,
        entering=state + (0 if keeps.fused else 24 * n_routed),  # slots are held by the graph's nodes
        seen=0 if c.is_plain else 8 * n_routed + later,
        coda=c.n_coda_layers * plain + head,
        working=_working(c, keeps),
    )


def _norm(width: int, keeps: Keeps) -> float:
    """Beside its input and its output."""
    return 4 + (0 if keeps.fused else 4 * width)


def _injection(c: ModelConfig) -> float:
    return {"lti": 4, "linear": 8, "add": 0, "none": 0}[c.injection] * c.dim


def _layer(c: ModelConfig, keeps: Keeps, *, looped: bool) -> float:
    moe = looped and c.ffn == "moe"
    normed = 2 * (4 * c.dim + _norm(c.dim, keeps))  # the stream before each branch
    inputs = normed * (1 if c.norm == "pre" else 2) + keeps.low * c.dim  # and what attention reads
    branch = _mixture(c, keeps) if moe else keeps.low * (c.dim + 4 * c.ffn_dim / keeps.tensor)
    targets = set(c.lora_targets) if looped and c.lora_rank else set()
    deltas = c.lora_rank * sum(3 if target == "ffn" else 1 for target in targets)
    return inputs + ATTENTION[c.attention](c, keeps) + branch + keeps.low * deltas


def _rotary(c: ModelConfig, keeps: Keeps) -> float:
    """Sines and cosines in low precision, for keys and for queries."""
    return 4 * keeps.low * c.rope_dim if keeps.lowered and c.positions == "rope" else 0


def _grouped_query(c: ModelConfig, keeps: Keeps) -> float:
    """Queries and outputs; keys and values; a sum for each head."""
    numbers = (2 * c.n_heads * c.head_dim + keeps.context * c.kv_width) / keeps.tensor
    return keeps.low * numbers + 4 * c.n_heads / keeps.tensor + _rotary(c, keeps)


def _latent(c: ModelConfig, keeps: Keeps) -> float:
    """Latents with their norms; then keys and values of every head. A CPU pads values to the width of keys."""
    width, heads = c.qk_nope_head_dim + c.qk_rope_head_dim, c.n_heads / keeps.tensor
    seen, out = width + c.qk_nope_head_dim + c.v_head_dim, c.v_head_dim  # keys, then what kv_b_proj made; the output
    if not keeps.fused and c.v_head_dim < width:
        seen, out = 2 * width, width + c.v_head_dim
    per_head = keeps.low * (width + keeps.context * seen + out) + 4
    projected = 4 * c.kv_lora_rank + (0 if keeps.lowered else 4 * c.qk_rope_head_dim)
    latents = projected + _norm(c.kv_lora_rank, keeps) + keeps.low * keeps.context * c.kv_width
    if c.q_lora_rank:
        latents += (4 + keeps.low) * c.q_lora_rank + _norm(c.q_lora_rank, keeps)
    return latents + heads * per_head + _rotary(c, keeps)


ATTENTION = {"gqa": _grouped_query, "mla": _latent}


def _mixture(c: ModelConfig, keeps: Keeps) -> float:
    """The router reads single precision; each (token, choice) pair keeps what its expert read and made."""
    width = c.expert_dim / keeps.tensor
    router = 4 * c.n_experts + 4 * c.dim + 24 * c.n_active_experts + 12
    shared = keeps.low * 4 * c.n_shared_experts * width
    if keeps.lowered and c.n_shared_experts:
        shared += keeps.low * c.dim
    if keeps.fused:
        pair = keeps.low * (2 * c.dim + 4 * width + 1) + 24
    else:
        pair = keeps.low * (c.dim + 5 * width + 1) + 24
    return router + shared + c.n_active_experts * pair


def _working(c: ModelConfig, keeps: Keeps) -> float:
    """Gradients of a branch's inner tensors, and of the stream around it."""
    widths = [3 * c.ffn_dim] if c.ffn == "dense" or c.n_prelude_layers + c.n_coda_layers else []
    if c.ffn == "moe" and not c.is_plain:
        widths.append(c.n_active_experts * (c.dim * keeps.tensor + 3 * c.expert_dim))
    return keeps.low * max(widths) / keeps.tensor + 8 * c.dim
