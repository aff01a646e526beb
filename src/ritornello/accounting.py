"""What a model costs, by closed formulas: parameters, FLOPs, cache bytes. Needs no torch, builds nothing.

FLOPs are two per multiply-add of matrix products; nothing else counts. A convention says what attention costs at T
tokens. `full`: T entries for each query, as `FlopCounterMode` counts the `*_ref` paths. `causal`: those that it may
see, (T + 1) / 2 on average. `decode`: T entries of a cache, for one query. MLA multiplies by kv_b_proj on the cheaper
side, as the model does. All tokens run the same loops.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ritornello.config import MAX_LOOPS, CachePolicy, ModelConfig, require, require_choice, require_int

Convention = Literal["full", "causal", "decode"]
POLICIES: tuple[CachePolicy, ...] = ("per_loop", "last", "first")
CHUNK_NUMBERS = 2**25  # logits that a loss holds at once: 128 MiB in float32
PROBE_STRIDE = 4  # of so many positions one is read by the loss of an exit probe, others in the next steps
PIECES = 2 * PROBE_STRIDE  # of whose multiples the tokens are that a process has of a shared row: two pieces
CACHED_NUMBERS = 2**19  # of them on a CPU, so many are turned into their gradient at once: 2 MiB


@dataclass(frozen=True)
class Cost:
    """Parameters; those that one token leaves idle in one loop; multiply-adds per token each time the part runs."""

    total: int = 0
    idle: int = 0
    work: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.total + other.total, self.idle + other.idle, self.work + other.work)

    def __mul__(self, n: int) -> "Cost":
        return Cost(self.total * n, self.idle * n, self.work * n)


def _matrix(n_in: int, n_out: int) -> Cost:
    return Cost(n_in * n_out, 0, n_in * n_out)


def _keys_values(c: ModelConfig, span: float, decode: bool) -> Cost:
    """Attention less its query and output projections: what makes `span` entries, scores them and adds them up."""
    if c.attention == "gqa":
        return _matrix(c.dim, 2 * c.n_kv_heads * c.head_dim) + Cost(work=2 * span * c.n_heads * c.head_dim)
    rank, rope, narrow = c.kv_lora_rank, c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim
    kv_b = rank * c.n_heads * narrow
    expanded = kv_b * (span if decode else 1) + span * c.n_heads * (narrow + rope)
    absorbed = kv_b + span * c.n_heads * (2 * rank + rope)
    latents = _matrix(c.dim, c.q_lora_rank + rank + rope) + Cost(c.q_lora_rank + rank)
    return latents + Cost(kv_b, 0, min(expanded, absorbed))


def _layer(c: ModelConfig, span: float, decode: bool, *, looped: bool) -> dict[str, Cost]:
    q, o = (c.dim, c.n_heads * c.head_dim), (c.n_heads * c.head_dim, c.dim)
    if c.attention == "mla":
        q = (c.q_lora_rank or c.dim, c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))
        o = (c.n_heads * c.v_head_dim, c.dim)
    parts = {"recurrent_attention": _matrix(*q) + _matrix(*o) + _keys_values(c, span, decode)}
    if c.qk_bias:
        parts["recurrent_attention"] += Cost((c.n_heads + c.n_kv_heads) * c.head_dim)
    parts["recurrent_norms"] = Cost(c.dim * (2 if c.norm == "pre" else 4))
    width = c.ffn_dim
    if looped and c.ffn == "moe":
        width, expert = c.n_shared_experts * c.expert_dim, 3 * c.dim * c.expert_dim
        used = c.n_active_experts * expert
        parts["routed_experts"] = Cost(c.n_experts * expert, c.n_experts * expert - used, used)
        parts["router"] = _matrix(c.dim, c.n_experts)
    parts["shared_experts" if "router" in parts else "recurrent_ffn"] = _matrix(3 * c.dim, width)
    if looped:
        entry = c.dim + c.n_kv_heads * c.head_dim
        sizes = {"q": sum(q), "k": entry, "v": entry, "o": sum(o), "ffn": 3 * (c.dim + width) if width else 0}
        delta = c.lora_rank * sum(sizes[target] for target in set(c.lora_targets))
        parts["lora"] = Cost(delta * c.n_loops, delta * (c.n_loops - 1), delta)
    return parts


def _once(c: ModelConfig, span: float, decode: bool) -> dict[str, Cost]:
    """Parts that run once. Of a table that is looked up, all rows but one lie idle."""
    layer = sum(_layer(c, span, decode, looped=False).values(), Cost())
    table, tied = c.vocab_size * c.dim, c.tie_embeddings
    return {
        "embedding": Cost(table * c.n_token_tables, (table - c.dim) * (c.n_token_tables - tied)),
        "prelude": layer * c.n_prelude_layers,
        "coda": layer * c.n_coda_layers,
        "head": Cost(0 if tied else table, 0, table),
        "norms": Cost(c.dim) * (1 if c.is_plain else 1 + c.normalize_input + c.anchored),
    }


def _per_loop(c: ModelConfig, span: float, decode: bool) -> dict[str, Cost]:
    if c.is_plain:
        return {}
    dim, table, n = c.dim, c.vocab_size * c.dim, c.carry_streams
    lti = Cost(2 * dim) + (_matrix(dim, dim) if c.injection_matrix else Cost(dim))
    linear = Cost(2 * dim * dim, 0, 2 * dim * dim * n)
    heads = {
        "act": Cost(dim + 1, 0, dim),
        "gate": Cost(161),
        "state_gate": Cost(dim + 1),
    }  # gates run on request only, as the probe
    return {
        **{name: cost * c.n_recurrent_layers for name, cost in _layer(c, span, decode, looped=True).items()},
        "injection": {"lti": lti, "linear": linear, "add": Cost(), "none": Cost()}[c.injection],
        "carry": Cost(n * (n + 2), 0, n * (n + 1) * dim) if n > 1 else Cost(),
        "anchor": Cost(work=2 * table if c.anchored else 0),
        "loop_embedding": Cost(c.n_loops * dim + 1, (c.n_loops - 1) * dim) if c.loop_embedding else Cost(),
        "probe": Cost(dim * (dim + 1)) if c.needs_probe else Cost(),
        "halting": heads.get(c.halting, Cost()),
    }


def count_parameters(config: ModelConfig) -> dict[str, Any]:
    """`total`; `active`, what one token uses in one loop: its experts, one low-rank delta, a row of a table;
    `non_embedding`, without vocabulary tables; `shares`, by part, a tied head counting as embedding."""
    parts = _once(config, 0, False) | _per_loop(config, 0, False)
    whole, shares = sum(parts.values(), Cost()), {name: cost.total for name, cost in parts.items() if cost.total}
    rest = whole.total - parts["embedding"].total - parts["head"].total
    return {"total": whole.total, "active": whole.total - whole.idle, "non_embedding": rest, "shares": shares}


def fit_ffn(config: ModelConfig, n_parameters: int) -> ModelConfig:
    """`config` with the `ffn_dim` that brings its total nearest to `n_parameters`.

    Raises:
        ValueError: it has more without any.
    """
    one, two = (count_parameters(replace(config, ffn_dim=width))["total"] for width in (1, 2))
    ffn_dim = 1 + round((n_parameters - one) / max(1, two - one))
    require(ffn_dim >= 1, "n_parameters", n_parameters, f">= {one}, what this shape has without a feed-forward network")
    return replace(config, ffn_dim=ffn_dim)


def flops_per_token(
    config: ModelConfig, *, seq_len: int, n_loops: int, training: bool, convention: Convention, backprop_loops: int = 0
) -> int:
    """FLOPs of one token among `seq_len`: the forward pass; in `training` also the backward pass, twice the products it
    passes: those of the last `backprop_loops` loops (0: all). Extra: recomputation; a probe and gate that are read."""
    require_int("seq_len", seq_len, 1)
    require_int("n_loops", n_loops, 1, MAX_LOOPS)
    require_int("backprop_loops", backprop_loops, 0, MAX_LOOPS)
    require_choice("convention", convention, ("full", "causal", "decode"))
    require(not training or convention != "decode", "convention", convention, "'full' or 'causal' in training")
    span = (seq_len + 1) / 2 if convention == "causal" else seq_len
    once, looped = (parts(config, span, convention == "decode") for parts in (_once, _per_loop))
    n_backward = min(n_loops, backprop_loops or n_loops) if training else 0
    work = sum(looped.values(), Cost()).work * (n_loops + 2 * n_backward)
    return round(2 * (work + sum(once.values(), Cost()).work * (3 if training else 1)))


def at_mean_loops(cost: Callable[[int], float], n_loops: float) -> float:
    """A cost that is linear in the number of loops, as all of these are, at a mean of it."""
    one, two = cost(1), cost(2)
    return one + (n_loops - 1) * (two - one)


def kv_bytes_per_token(config: ModelConfig, *, n_loops: int, policy: CachePolicy, bytes_per_number: int = 2) -> int:
    """Bytes that a token which runs `n_loops` loops holds in a `Cache`, over all layers."""
    require_int("n_loops", n_loops, 1, MAX_LOOPS)
    require_choice("policy", policy, POLICIES)
    n_slots = n_loops if policy == "per_loop" and config.kv_sharing == "per_loop" else 1
    slots = config.n_prelude_layers + config.n_recurrent_layers * n_slots + config.n_coda_layers
    return slots * config.kv_width * bytes_per_number


def describe(config: ModelConfig, *, seq_len: int = 4096) -> dict[str, Any]:
    """Everything above for one shape, as `ritornello info` shows it; FLOPs by number of loops."""
    c, counts, seq_len = config, count_parameters(config), min(seq_len, config.max_seq_len)
    facts: dict[str, Any] = {"parameters": {name: counts[name] for name in ("total", "active", "non_embedding")}}
    facts["share_of_parameters"] = {name: n / counts["total"] for name, n in counts["shares"].items()}
    for kind in ("training", "inference", "decode"):
        how: Any = {"training": kind == "training", "convention": "decode" if kind == "decode" else "full"}
        loops = (1,) if c.is_plain else (1, 2, 4, 8, 16, 32)
        flops = {str(n): flops_per_token(c, seq_len=seq_len, n_loops=n, **how) for n in loops}
        facts[f"{kind}_flops_per_token_by_loops"] = flops
    facts["kv_bytes_per_token"] = {p: kv_bytes_per_token(c, n_loops=c.n_loops, policy=p) for p in POLICIES}
    facts["kv_bytes_per_slot"] = c.kv_width * 2
    facts["assuming"] = {"seq_len": seq_len, "n_loops": c.n_loops, "attention": "full", "bytes_per_number": 2}
    return facts
