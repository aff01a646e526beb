"""OpenMythos' tensors by our names, and ours by its. Rotary rows are pairs there and halves here, experts single there
and stacked here, its shared experts side by side."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ritornello.config import ModelConfig
from ritornello.hub.pairs import halves, pairs
from ritornello.train.tensors import listed

MADE = ("freqs_cis", "freqs_cis_mla", "head.weight")  # its rotary tables, and the embeddings once more
ONE_STEP = math.log(math.e - 1)  # our dt where softplus(dt) = 1, which leaves A to A_log and B to B
OUTSIDE = {
    "embed.weight": "embed_tokens.0.weight",
    "norm.weight": "norm.weight",
    "recurrent.norm.weight": "read_norm.weight",
    "recurrent.act.halt.weight": "halting.head.linear.weight",
    "recurrent.act.halt.bias": "halting.head.linear.bias",
    "recurrent.lora.down.weight": "adapter.down",
    "recurrent.lora.B": "adapter.up",
    "recurrent.lora.scale.weight": "adapter.scale",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
}
LATENT = {
    "attn.q_down.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.kv_up.weight": "self_attn.kv_b_proj.weight",
}
GROUPED = {"attn.wv.weight": "self_attn.v_proj.weight"}
DENSE = {f"ffn.{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
ROUTER = {"ffn.router.weight": "mlp.router.weight", "ffn.router_bias": "mlp.router.e_score_correction_bias"}


def places(c: ModelConfig) -> dict[str, str]:
    """Where each layer is there, and here."""
    found = {f"prelude.{i}.": f"prelude_layers.{i}." for i in range(c.n_prelude_layers)}
    found |= {f"coda.{i}.": f"coda_layers.{i}." for i in range(c.n_coda_layers)}
    return found | {"recurrent.block.": "recurrent.0."}


def renamed(c: ModelConfig) -> dict[str, str]:
    """All that is the same tensor under two names: theirs, ours."""
    names = dict(OUTSIDE)
    for there, here in places(c).items():
        ffn = ROUTER if there == "recurrent.block." else DENSE
        for a, b in (LAYER | (LATENT if c.attention == "mla" else GROUPED) | ffn).items():
            names[there + a] = here + b
    return names


def from_theirs(c: ModelConfig, n_shared: int, state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """By our names. ValueError: what is missing, and what is not theirs."""
    left = {name: x for name, x in state.items() if name not in MADE}
    wanted = to_theirs_names(c, n_shared)
    problems = [
        listed("missing", [name for name in wanted if name not in left]),
        listed("not of OpenMythos 0.5.0", [name for name in left if name not in wanted]),
        listed("not of its rank", [name for name, x in left.items() if name in wanted and x.ndim != wanted[name]]),
    ]
    if any(problems):
        raise ValueError(f"{source}: " + "; ".join(filter(None, problems)))
    try:
        return _from_theirs(c, n_shared, left)
    except RuntimeError as error:  # of torch, where sizes do not fit together
        raise ValueError(f"{source}: a tensor is of another shape than the configuration says: {error}") from None


def _from_theirs(c: ModelConfig, n_shared: int, left: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {ours: left[theirs] for theirs, ours in renamed(c).items()}
    for there, here in places(c).items():
        found |= {f"{here}self_attn.{name}.weight": x for name, x in _turning_from(c, left, f"{there}attn.").items()}
    there, here = "recurrent.block.ffn.", "recurrent.0.mlp."
    routed = [[left[f"{there}routed_experts.{i}.{m}.weight"] for m in ("gate", "up", "down")] for i in _range(c)]
    found[f"{here}experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in routed])
    found[f"{here}experts.down_proj"] = torch.stack([down for *_, down in routed])
    for m, dim in {"gate": 0, "up": 0, "down": 1}.items() if n_shared else ():
        parts = [left[f"{there}shared_experts.{i}.{m}.weight"] for i in range(n_shared)]
        found[f"{here}shared_experts.{m}_proj.weight"] = torch.cat(parts, dim)
    log_a, log_dt, b = (left[f"recurrent.injection.{name}"] for name in ("log_A", "log_dt", "B"))
    dt = torch.full_like(log_a, ONE_STEP)
    step = torch.nn.functional.softplus(dt)
    found |= {"injection.dt": dt, "injection.B": b / step}
    return found | {"injection.A_log": (log_a + log_dt).clamp(-20, 20) - step.log()}


def to_theirs(c: ModelConfig, n_shared: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names; without what it makes itself."""
    found = {theirs: state[ours] for theirs, ours in renamed(c).items()}
    for there, here in places(c).items():
        found |= {f"{there}attn.{name}.weight": x for name, x in _turning_to(c, state, f"{here}self_attn.").items()}
    there, here = "recurrent.block.ffn.", "recurrent.0.mlp."
    for i in _range(c):
        gate, up = state[f"{here}experts.gate_up_proj"][i].chunk(2)
        one = {"gate": gate, "up": up, "down": state[f"{here}experts.down_proj"][i]}
        found |= {f"{there}routed_experts.{i}.{m}.weight": x for m, x in one.items()}
    for m, dim in {"gate": 0, "up": 0, "down": 1}.items() if n_shared else ():
        parts = state[f"{here}shared_experts.{m}_proj.weight"].chunk(n_shared, dim)
        found |= {f"{there}shared_experts.{i}.{m}.weight": x for i, x in enumerate(parts)}
    step = torch.nn.functional.softplus(state["injection.dt"])
    log_a = state["injection.A_log"] + step.log()
    found |= {"recurrent.injection.log_A": log_a, "recurrent.injection.log_dt": log_a.new_zeros(1)}
    found |= {"recurrent.injection.B": step * state["injection.B"]}
    return {name: x.contiguous() for name, x in found.items()}


def to_theirs_names(c: ModelConfig, n_shared: int) -> dict[str, int]:
    """Every name of theirs, and of how many dimensions."""
    names = dict.fromkeys(renamed(c), 2)
    for there in places(c):
        turning = ("q_up_nope", "q_up_rope", "kv_down") if c.attention == "mla" else ("wq", "wk")
        names |= {f"{there}attn.{name}.weight": 2 for name in turning}
    experts = [f"routed_experts.{i}" for i in _range(c)] + [f"shared_experts.{i}" for i in range(n_shared)]
    names |= {f"recurrent.block.ffn.{one}.{m}.weight": 2 for one in experts for m in ("gate", "up", "down")}
    names |= {f"recurrent.injection.{name}": 1 for name in ("log_A", "log_dt", "B")}
    return {name: 1 if "norm" in name or name.endswith("bias") else n for name, n in names.items()}


def _range(c: ModelConfig) -> range:
    return range(c.n_experts)


def _turning_from(c: ModelConfig, left: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The projections whose rows turn with position, and those that share their matrix."""
    if c.attention == "gqa":
        heads = {name: left[f"{place}w{name}.weight"].unflatten(0, (-1, c.head_dim)) for name in ("q", "k")}
        return {f"{name}_proj": halves(x, c.head_dim).flatten(0, 1) for name, x in heads.items()}
    nope, rope = (left[f"{place}q_up_{name}.weight"].unflatten(0, (c.n_heads, -1)) for name in ("nope", "rope"))
    q = torch.cat((nope, halves(rope, c.qk_rope_head_dim)), 1).flatten(0, 1)
    return {"q_b_proj": q, "kv_a_proj_with_mqa": halves(left[f"{place}kv_down.weight"], c.qk_rope_head_dim)}


def _turning_to(c: ModelConfig, state: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    if c.attention == "gqa":
        heads = {name: state[f"{place}{name}_proj.weight"].unflatten(0, (-1, c.head_dim)) for name in ("q", "k")}
        return {f"w{name}": pairs(x, c.head_dim).flatten(0, 1) for name, x in heads.items()}
    q = state[f"{place}q_b_proj.weight"].unflatten(0, (c.n_heads, -1))
    nope, rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], 1)
    found = {"q_up_nope": nope.flatten(0, 1), "q_up_rope": pairs(rope, c.qk_rope_head_dim).flatten(0, 1)}
    return found | {"kv_down": pairs(state[f"{place}kv_a_proj_with_mqa.weight"], c.qk_rope_head_dim)}
