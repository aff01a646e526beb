"""Parcae (2604.12946) as sandyresearch/parcae's `parcae_lm` runs it.

u = A h + dt B e with a full matrix B, the coda reads C h, queries and keys are normed after they turn, the feed-forward
network is a squared ReLU, and in every other layer a table of tokens adds to the values. Which layers: theirs makes a
table where the layer's place has the parity of the last one, and a gate where its number has that of the last of
`mean_backprop_depth` unrolled loops, the coda's numbers coming after `mean_recurrence` of them; both are needed. In
all published shapes they agree. What one lacks, the other is never read, and is left out here.

What stays different: h_0 is noise of the same size from another generator, clamped at 3 standard deviations instead of
drawn again, and the same in every call; h, of the weights' dtype there, is float32; and so are the angles, which theirs
rounds with the weights.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ritornello.config import MAX_LAYERS, InitialState, Injection, ModelConfig, pick, require, require_int
from ritornello.hub.pairs import to_halves, to_pairs
from ritornello.hub.published import LOOPED_ALIKE, count, expect, given

DEFAULTS: dict[str, Any] = {  # of theirs, where what is converted is another
    "norm_class_name": "LayerNorm",
    "nonlin_name": "GELU",
    "recurrent_embedding_dimension": 1024,
    "recurrent_intermediation_embedding_dimension": 3520,
}
INJECTIONS: dict[str, Injection] = {"diagonal": "lti", "linear": "linear", "add": "add"}
STARTS: dict[str, InitialState] = {"like-init": "noise", "zero": "zeros"}
SMALL = ("small", "scaled", "scaled-geiping", "scaled-zero", "scaled-stuck")  # embeddings of std √(2 / 5D)
SCALED = {"takase": True, **dict.fromkeys(SMALL, False)}  # by √D
STACKS = {"prelude_layers": "prelude", "recurrent": "core_block", "coda_layers": "coda"}
LTI = {"A_log": "A_log", "dt": "dt_bias", "B": "B"}
PARTS = {  # of a layer, but for queries and keys
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.fc",
    "mlp.down_proj": "mlp.proj",
}
UNREAD = {"ve_gate", "value_embeds"}  # where one is without the other


def config_from(theirs: Mapping[str, Any]) -> ModelConfig:
    """The shape that their configuration describes.

    Raises:
        ValueError: something is missing, or of a kind that no published checkpoint has.
    """
    theirs = {**DEFAULTS, **{name: value for name, value in theirs.items() if value is not None}}
    expect(theirs, block_class_name="TransformerPreNormBlock", norm_class_name="RMSNorm", mlp_class_name="BaseMLP")
    expect(theirs, nonlin_name="ReLU2", bias=False, clip_qkv=None, logit_softcap=None, mup_model_scaling_factor=1)
    dim, n_heads = count(theirs, "n_embd"), count(theirs, "num_attention_heads")
    require(dim % n_heads == 0, "config.json n_embd", dim, f"a multiple of num_attention_heads ({n_heads})")
    require(dim >= 32, "config.json n_embd", dim, ">= 32, what the gates of value embeddings read")
    ffn_dim = given(theirs, "intermediate_size", default=4 * dim)
    expect(theirs, num_key_value_heads=n_heads, recurrent_num_attention_heads=n_heads)
    expect(theirs, recurrent_embedding_dimension=dim, recurrent_intermediation_embedding_dimension=ffn_dim)
    tied = given(theirs, "tie_embeddings", default=False)
    expect(theirs, **({} if tied else {"use_fused_head": "pytorch"}))  # others may hold the head's weight transposed
    rope = given(theirs, "rope_settings", default={})
    require(isinstance(rope, Mapping), "config.json rope_settings", rope, "an object")
    expect(rope, use_rope=True, rope_condense_ratio=1)
    injection = pick(INJECTIONS, str(given(theirs, "injection_type", default="diagonal")), "config.json injection_type")
    scaled = pick(SCALED, str(given(theirs, "init_strategy", default="scaled")), "config.json init_strategy")
    scale = math.sqrt(dim) if scaled else 1.0
    return ModelConfig(
        vocab_size=_vocab_size(theirs),
        dim=dim,
        n_prelude_layers=_n(theirs, "n_layers_in_prelude"),
        n_recurrent_layers=_n(theirs, "n_layers_in_recurrent_block"),
        n_coda_layers=_n(theirs, "n_layers_in_coda"),
        n_loops=count(theirs, "mean_recurrence"),
        max_seq_len=given(theirs, "block_size"),
        tie_embeddings=tied,
        embedding_scale=scale,
        rope_theta=given(rope, "rope_base", default=50_000),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        qk_bias=given(theirs, "qk_bias", default=False),
        qk_norm=given(theirs, "qk_norm", default=False),
        value_embeddings=_value_embeddings(theirs),
        ffn_dim=ffn_dim,
        activation="relu2",
        norm_eps=given(theirs, "norm_eps", default=1e-5),
        normalize_input=given(theirs, "prelude_norm", default=False),
        injection=injection,
        injection_matrix=injection == "lti",
        rho_max=1.0,
        read_matrix=True,
        initial_state=pick(STARTS, str(given(theirs, "state_init", default="like-init")), "config.json state_init"),
        noise_std=math.sqrt(2 / (5 * dim)) * scale,
        **LOOPED_ALIKE,
    )


def _n(theirs: Mapping[str, Any], name: str) -> int:
    """`given`, a number of layers."""
    found = given(theirs, name)
    require_int(f"config.json {name}", found, 0, MAX_LAYERS)
    return found


def _vocab_size(theirs: Mapping[str, Any]) -> int:
    """Padded: their file names the result, or how it is made."""
    if theirs.get("padded_vocab_size") is not None:
        return count(theirs, "padded_vocab_size")
    size, multiple = count(theirs, "vocab_size"), count({"padding_multiple": 512, **theirs}, "padding_multiple")
    return -(-size // multiple) * multiple


def _value_embeddings(theirs: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers that have a table and a gate, numbered as they lie in the file."""
    before, looped, after = (_n(theirs, f"n_layers_in_{part}") for part in ("prelude", "recurrent_block", "coda"))
    n_unrolled = looped * count(theirs, "mean_backprop_depth")
    further = looped * (count(theirs, "mean_recurrence") - 1)  # of the coda's numbers
    n = before + looped + after
    numbers = {i: i + further * (i >= before + looped) for i in range(n)}
    return tuple(i for i, number in numbers.items() if (n - 1 - i) % 2 == (n_unrolled - 1 - number) % 2 == 0)


def from_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors by name, of theirs."""
    c = config
    found = {ours: state[theirs] for ours, theirs in _as_they_are(c)}
    for ours, theirs in _layers(c):
        for name in "qk":
            matrix = state[f"{theirs}.attn.c_{name}.weight"]
            found[f"{ours}.self_attn.{name}_proj.weight"] = to_halves(matrix, c.head_dim)
        if c.qk_bias:
            for name, bias in zip("qk", state[f"{theirs}.attn.qk_bias"].flatten(1), strict=True):
                found[f"{ours}.self_attn.{name}_proj.bias"] = to_halves(bias, c.head_dim)
    return found


def to_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors by name, of ours: the inverse of `from_theirs`, without what no layer of theirs reads."""
    c = config
    found = {theirs: state[ours] for ours, theirs in _as_they_are(c)}
    for ours, theirs in _layers(c):
        for name in "qk":
            matrix = state[f"{ours}.self_attn.{name}_proj.weight"]
            found[f"{theirs}.attn.c_{name}.weight"] = to_pairs(matrix, c.head_dim)
        if c.qk_bias:
            both = [to_pairs(state[f"{ours}.self_attn.{name}_proj.bias"], c.head_dim) for name in "qk"]
            found[f"{theirs}.attn.qk_bias"] = torch.stack(both).view(2, 1, c.n_heads, c.head_dim)
    return found


def _as_they_are(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """Ours and theirs, of tensors that are the same."""
    yield "embed_tokens.0.weight", "transformer.wte.weight"
    yield "read_matrix.weight", "transformer.C.weight"
    yield "norm.weight", "transformer.ln_f.weight"
    if c.normalize_input:
        yield "input_norm.weight", "transformer.ln_prelude.weight"
    if not c.tie_embeddings:
        yield "head.weight", "lm_head.weight"
    if c.injection == "lti":
        yield from ((f"injection.{ours}", f"transformer.adapter.{theirs}") for ours, theirs in LTI.items())
    elif c.injection == "linear":
        yield "injection.weight", "transformer.adapter.adapter.weight"
    for i, (ours, theirs) in enumerate(_layers(c)):
        yield from ((f"{ours}.{one}.weight", f"{theirs}.{other}.weight") for one, other in PARTS.items())
        if i in c.value_embeddings:
            yield f"{ours}.self_attn.value_gate.weight", f"{theirs}.attn.ve_gate.weight"
            yield f"{ours}.self_attn.value_table.weight", f"value_embeds.{i}.weight"


def _layers(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """Ours and theirs, layer by layer."""
    counts = (c.n_prelude_layers, c.n_recurrent_layers, c.n_coda_layers)
    for (ours, theirs), n in zip(STACKS.items(), counts, strict=True):
        for i in range(n):
            yield f"{ours}.{i}", f"transformer.{theirs}.{i}"
