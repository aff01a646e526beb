"""A recurrent block out of published layers: DeepSeek-V3, R1 and Kimi K2 (2412.19437, §2.1), in FP8 or bfloat16.

Every equation of such a layer is one of ours; what is left is names, and three things said otherwise. Rotary channels
lie in pairs there, in halves here: rows are permuted. YaRN's temperature scales the softmax there: here the norm before
the queries' last projection, or without one that projection. The norms of the latents add 1e-6 whatever `norm_eps`
says: the projection before them is scaled so that ours adds as much. What is scaled becomes float32 at least, but for
that projection of queries, which is rounded again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ritornello import recipes
from ritornello.config import ModelConfig, require, require_choice, require_float, require_int
from ritornello.hub.pairs import halves
from ritornello.hub.shards import Published
from ritornello.model.lora import Linear
from ritornello.model.rdt import RecurrentDepthTransformer

FAMILIES = ("deepseek_v3", "kimi_k2")
LATENT_EPS = 1e-6  # of the norms within their attention: the default of their class, never configured
NAMES = {  # of ModelConfig's fields, theirs
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "ffn_dim": "intermediate_size",
    "n_experts": "n_routed_experts",
    "n_active_experts": "num_experts_per_tok",
    "n_shared_experts": "n_shared_experts",
    "expert_dim": "moe_intermediate_size",
    "normalize_expert_weights": "norm_topk_prob",
    "router_scale": "routed_scaling_factor",
    "n_expert_groups": "n_group",
    "n_active_groups": "topk_group",
    "norm_eps": "rms_norm_eps",
}
ENDS = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
ONLY = {  # what their configurations could say otherwise, and ours cannot; absent: the first
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, False),  # absent from the published files, whose code has it
}


@dataclass(frozen=True)
class Converted:
    """state: the tensors that came from the checkpoint, by their names in a model of `config`."""

    config: ModelConfig
    state: dict[str, Tensor]

    def model(self, seed: int = 0) -> RecurrentDepthTransformer:
        """Such a model; what was not published is drawn from `seed`, low-rank deltas in their matrix's type."""
        with torch.device("meta"):
            model = RecurrentDepthTransformer(self.config)
        matrices = [name for name, _ in model.named_parameters() if name in self.state and self.state[name].ndim >= 2]
        for name in matrices:
            _put(model, name, None)  # or it would be allocated and drawn in vain
        model.to_empty(device="cpu").init_weights(seed)
        for name in matrices:
            _put(model, name, nn.Parameter(self.state[name]))
        model.load_state_dict(self.state, strict=False, assign=True)
        for module in model.modules():
            if isinstance(module, Linear) and module.loop_A is not None:
                module.to(module.weight.dtype)
        return model


def _put(model: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    place, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(place), leaf, parameter)


def recurrent_block(
    folder: str | Path,
    layers: Sequence[int],
    *,
    prelude: Sequence[int] = (),
    coda: Sequence[int] = (),
    ends: bool = False,
    dtype: torch.dtype | None = None,
    **shape: Any,
) -> Converted:
    """Decoder layers of a published checkpoint as the layers of a loop.

    Args:
        folder: config.json and the safetensors shards, of which only those that hold these layers need to be there.
        layers: by their numbers there, in the loop's order; all with experts, or all dense.
        prelude, coda: dense layers to put before and after; none: as many new ones as `shape` says, by default 0.
        ends: the embeddings, the last norm and the head too.
        dtype: of matrices; norms and routers are float32 at least. None: as stored, FP8 as float32.
        shape: fields of `ModelConfig` that the checkpoint leaves open: n_loops, injection, lora_rank …
    Raises:
        ValueError: a layer that is not there or does not fit, a configuration that ours cannot say, a damaged tensor.
    """
    source = Published(folder)
    try:
        config = config_from(source.config, layers, prelude=prelude, coda=coda, ends=ends, **shape)
    except ValueError as error:
        raise ValueError(f"{source.folder / 'config.json'}: {error}") from None
    take = _Layers(source, config, dtype)
    state: dict[str, Tensor] = {}
    for part, numbers in {"prelude_layers": prelude, "recurrent": layers, "coda_layers": coda}.items():
        for i, number in enumerate(numbers):
            state |= {f"{part}.{i}.{name}": x for name, x in take.layer(number).items()}
    return Converted(config, state | (take.ends() if ends else {}))


def config_from(
    theirs: Mapping[str, Any],
    layers: Sequence[int],
    *,
    prelude: Sequence[int] = (),
    coda: Sequence[int] = (),
    ends: bool = False,
    **shape: Any,
) -> ModelConfig:
    """The shape of what `recurrent_block` makes out of a config.json; `ValueError` where ours has no word for it."""
    require_choice("model_type", theirs.get("model_type"), FAMILIES)
    for name, allowed in ONLY.items():
        require_choice(name, theirs.get(name, allowed[0]), allowed)
    n_heads, n_kv_heads = (theirs.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    require(n_kv_heads in (None, n_heads), "num_key_value_heads", n_kv_heads, f"num_attention_heads ({n_heads})")
    given = {field: _value(theirs, name) for field, name in NAMES.items()}
    given |= {"attention": "mla", "norm": "pre", "q_lora_rank": theirs.get("q_lora_rank") or 0}
    given |= {"ffn": _kind(theirs, layers), "n_recurrent_layers": len(layers), **_rotary(theirs)}
    for field, numbers in {"n_prelude_layers": prelude, "n_coda_layers": coda}.items():
        given |= {field: len(numbers)} if numbers else {}
        require(not numbers or _kind(theirs, numbers) == "dense", field[2:], list(numbers), "layers without experts")
    open_ = {"n_prelude_layers": 0, "n_coda_layers": 0, "lora_rank": 0, "loop_embedding": False}
    open_ |= {"max_seq_len": _value(theirs, "max_position_embeddings")}
    tables = {field: _value(theirs, name) for field, name in ENDS.items()}
    given, open_ = (given | tables, open_) if ends else (given, open_ | tables)
    for field in shape:
        require_choice("shape", field, tuple(f.name for f in fields(ModelConfig)))
        require(field not in given, field, shape[field], "left out: the checkpoint decides it")
    return recipes.validated(ModelConfig, {**open_, **shape, **given})


def _kind(theirs: Mapping[str, Any], numbers: Sequence[int]) -> str:
    """moe or dense: what all of these layers are."""
    n_layers, n_dense = (_value(theirs, name) for name in ("num_hidden_layers", "first_k_dense_replace"))
    require_int("num_hidden_layers", n_layers, 1)
    require_int("first_k_dense_replace", n_dense, 0)
    inside = all(type(i) is int and 0 <= i < n_layers for i in numbers)
    require(bool(numbers) and inside, "layers", list(numbers), f"numbers in [0, {n_layers - 1}], at least one")
    kinds = {"dense" if i < n_dense else "moe" for i in numbers}
    require(len(kinds) == 1, "layers", list(numbers), f"all below {n_dense}, which are dense, or none")
    return kinds.pop()


def _rotary(theirs: Mapping[str, Any]) -> dict[str, Any]:
    said = _scaling(theirs)
    theta = theirs["rope_theta"] if "rope_theta" in theirs else _value(said, "rope_theta")
    if _rope_type(said) == "default":
        return {"rope_theta": theta}
    names = {"yarn_factor": "factor", "yarn_length": "original_max_position_embeddings"}
    found = {field: _value(said, name) for field, name in names.items()}
    found |= {"yarn_fast": said.get("beta_fast") or 32, "yarn_slow": said.get("beta_slow") or 1}
    require_float("rope_scaling mscale_all_dim", said.get("mscale_all_dim"), 0, open_low=True)
    same = said.get("mscale") == said["mscale_all_dim"]
    require(same, "rope_scaling mscale", said.get("mscale"), f"mscale_all_dim ({said['mscale_all_dim']})")
    for name, usual in {"attention_factor": None, "truncate": True}.items():
        require(said.get(name, usual) == usual, f"rope_scaling {name}", said.get(name), "absent")
    return {"rope_theta": theta, **found}


def _scaling(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 5 calls it, or as those before it and the published files do."""
    said: Any = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    require(isinstance(said, dict), "rope_scaling", said, "an object")
    return said


def _rope_type(said: dict[str, Any]) -> str:
    kind = said.get("rope_type", said.get("type", "default"))
    require_choice("rope_scaling type", kind, ("default", "yarn"))
    return kind


def _temperature(theirs: Mapping[str, Any]) -> float:
    """What YaRN multiplies the scores of attention by, as DeepSeek has it: (0.1 · mscale · ln factor + 1)²."""
    said = _scaling(theirs)
    if _rope_type(said) == "default" or said["factor"] <= 1:
        return 1.0
    return (0.1 * said["mscale_all_dim"] * math.log(said["factor"]) + 1) ** 2


def _value(body: Mapping[str, Any], name: str) -> Any:
    require(name in body, name, "nothing", "given")
    return body[name]


class _Layers:
    """Their tensors under our names."""

    def __init__(self, source: Published, config: ModelConfig, dtype: torch.dtype | None) -> None:
        self._source, self._c, self._dtype = source, config, dtype
        self._pairs = source.config.get("rope_interleave", True)
        self._temperature = _temperature(source.config)

    def layer(self, number: int) -> dict[str, Tensor]:
        place, c = f"model.layers.{number}.", self._c
        dense = number < self._source.config["first_k_dense_replace"]
        found = self._attention(f"{place}self_attn.") | (
            self._feed_forward(f"{place}mlp.", c.ffn_dim) if dense else self._mixture(f"{place}mlp.")
        )
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return found | {name: self._wide(place + name, c.dim) for name in norms}

    def ends(self) -> dict[str, Tensor]:
        c, embeddings = self._c, "model.embed_tokens.weight"
        found = {"embed_tokens.0.weight": self._matrix(embeddings, c.vocab_size, c.dim)}
        found |= {"norm.weight": self._wide("model.norm.weight", c.dim)}
        head = {} if c.tie_embeddings else {"head.weight": self._matrix("lm_head.weight", c.vocab_size, c.dim)}
        return found | head

    def _matrix(self, name: str, *shape: int) -> Tensor:
        return self._source.tensor(name, *shape, dtype=self._dtype)

    def _wide(self, name: str, *shape: int) -> Tensor:
        """In float32 at least."""
        found = self._source.tensor(name, *shape)
        return found.to(torch.promote_types(self._dtype or found.dtype, torch.float32))

    def _attention(self, place: str) -> dict[str, Tensor]:
        c, q_in = self._c, self._c.q_lora_rank or self._c.dim
        n_q, n_kv = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim
        q_name = "q_b_proj.weight" if c.q_lora_rank else "q_proj.weight"
        q = self._matrix(place + q_name, c.n_heads * n_q, q_in).unflatten(0, (c.n_heads, n_q))
        found = {q_name: self._halves(q).flatten(0, 1)}
        name, latent = "kv_a_proj_with_mqa.weight", slice(c.kv_lora_rank)
        found[name] = self._halves(self._matrix(place + name, c.kv_width, c.dim))
        found["kv_a_layernorm.weight"] = self._wide(f"{place}kv_a_layernorm.weight", c.kv_lora_rank)
        found["kv_b_proj.weight"] = self._matrix(f"{place}kv_b_proj.weight", c.n_heads * n_kv, c.kv_lora_rank)
        found["o_proj.weight"] = self._matrix(f"{place}o_proj.weight", c.dim, c.n_heads * c.v_head_dim)
        if c.q_lora_rank:
            found["q_a_proj.weight"] = self._matrix(f"{place}q_a_proj.weight", q_in, c.dim)
            found["q_a_layernorm.weight"] = self._wide(f"{place}q_a_layernorm.weight", q_in)
            self._scale(found, "q_a_proj.weight", math.sqrt(c.norm_eps / LATENT_EPS))
        self._scale(found, "q_a_layernorm.weight" if c.q_lora_rank else q_name, self._temperature)
        self._scale(found, name, math.sqrt(c.norm_eps / LATENT_EPS), latent)
        return {f"self_attn.{name}": x for name, x in found.items()}

    def _scale(self, found: dict[str, Tensor], name: str, factor: float, rows: slice = slice(None)) -> None:
        if factor != 1:
            kept = found[name].dtype  # attention wants queries of the type of its keys
            found[name] = found[name].to(torch.promote_types(kept, torch.float32), copy=True)
            found[name][rows] *= factor
            found[name] = found[name].to(kept) if name == "q_proj.weight" else found[name]

    def _halves(self, rows: Tensor) -> Tensor:
        return halves(rows, self._c.qk_rope_head_dim) if self._pairs else rows

    def _feed_forward(self, place: str, width: int, own: str = "mlp.") -> dict[str, Tensor]:
        shapes = {"gate_proj": (width, self._c.dim), "up_proj": (width, self._c.dim), "down_proj": (self._c.dim, width)}
        return {f"{own}{name}.weight": self._matrix(f"{place}{name}.weight", *size) for name, size in shapes.items()}

    def _mixture(self, place: str) -> dict[str, Tensor]:
        c = self._c
        bias = self._wide(f"{place}gate.e_score_correction_bias", c.n_experts)
        found = {
            "mlp.router.weight": self._wide(f"{place}gate.weight", c.n_experts, c.dim),
            "mlp.router.e_score_correction_bias": bias.repeat(c.n_loops, 1) if c.router_bias_per_loop else bias,
            **self._experts(f"{place}experts."),
        }
        width = c.n_shared_experts * c.expert_dim
        return found | (self._feed_forward(f"{place}shared_experts.", width, "mlp.shared_experts.") if width else {})

    def _experts(self, place: str) -> dict[str, Tensor]:
        """Stacked; each is read into its place, so that no more than one is in memory twice."""
        c, width = self._c, self._c.expert_dim
        gate_up_proj, down_proj = torch.empty(0), torch.empty(0)
        for i in range(c.n_experts):
            gate, up, down = self._feed_forward(f"{place}{i}.", width, "").values()
            if i == 0:
                gate_up_proj = gate.new_empty(c.n_experts, 2 * width, c.dim)
                down_proj = down.new_empty(c.n_experts, c.dim, width)
            gate_up_proj[i, :width], gate_up_proj[i, width:], down_proj[i] = gate, up, down
        return {"mlp.experts.gate_up_proj": gate_up_proj, "mlp.experts.down_proj": down_proj}
