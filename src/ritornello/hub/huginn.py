"""Huginn-3.5B (2502.05171) as seal-rg/recurrent-pretraining's `raven_modeling_minimal.py` runs it.

e is the prelude's output as it is, norms are sandwiches, u = W [h; e], the last norm reads the state before the coda
too, embeddings are scaled by √D, queries and keys have biases. What stays different: h_0 is noise of the same size from
another generator, clamped at 3 standard deviations instead of drawn again, and the same in every call; and h, of the
weights' dtype there, is float32.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ritornello.config import ModelConfig, require
from ritornello.hub.pairs import to_halves, to_pairs
from ritornello.hub.published import LOOPED_ALIKE, count, expect, given

STACKS = {"prelude_layers": "prelude", "recurrent": "core_block", "coda_layers": "coda"}
NORMS = {
    "input_layernorm": "norm_1",
    "attn_out_layernorm": "norm_2",
    "post_attention_layernorm": "norm_3",
    "mlp_out_layernorm": "norm_4",
}
ROPE_TABLE = "freqs_cis"  # a buffer that their files hold too


def config_from(theirs: Mapping[str, Any]) -> ModelConfig:
    """The shape that their configuration describes.

    Raises:
        ValueError: something is missing, or of a kind that no published checkpoint has.
    """
    expect(theirs, bias=False, block_class_name="SandwichBlock", norm_class_name="RMSNorm_llama")
    expect(theirs, mlp_class_name="GatedMLP", nonlin_name="SiLU", injection_type="linear", state_init="like-init")
    expect(theirs, test_time_noise=0)
    dim, n_heads = count(theirs, "n_embd", "hidden_size"), count(theirs, "n_heads", "num_attention_heads")
    expect(theirs, num_key_value_heads=n_heads)
    require(dim % n_heads == 0, "config.json n_embd", dim, f"a multiple of n_heads ({n_heads})")
    return ModelConfig(
        vocab_size=given(theirs, "padded_vocab_size", "vocab_size"),
        dim=dim,
        n_prelude_layers=given(theirs, "n_layers_in_prelude"),
        n_recurrent_layers=given(theirs, "n_layers_in_recurrent_block"),
        n_coda_layers=given(theirs, "n_layers_in_coda"),
        n_loops=given(theirs, "mean_recurrence"),
        max_seq_len=given(theirs, "block_size"),
        tie_embeddings=given(theirs, "tie_embeddings", "tie_word_embeddings", default=True),
        embedding_scale=math.sqrt(dim),
        rope_theta=given(theirs, "rope_base", default=50_000),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        qk_bias=given(theirs, "qk_bias", default=True),
        ffn_dim=given(theirs, "intermediate_size"),
        norm="sandwich",
        norm_eps=given(theirs, "norm_eps", default=1e-6),
        normalize_input=False,
        state_norm="read",
        injection="linear",
        initial_state="noise",
        **LOOPED_ALIKE,
    )


def from_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors by name, of theirs."""
    c = config
    found = {ours: state[theirs] for ours, theirs in _whole(c).items()}
    for ours, theirs in _layers(c):
        for name, norm in NORMS.items():
            found[f"{ours}.{name}.weight"] = state[f"{theirs}.{norm}.weight"]
        q, k, v = state[f"{theirs}.attn.Wqkv.weight"].split([c.dim] * 3)
        found[f"{ours}.self_attn.q_proj.weight"] = to_halves(q, c.head_dim)
        found[f"{ours}.self_attn.k_proj.weight"] = to_halves(k, c.head_dim)
        found[f"{ours}.self_attn.v_proj.weight"] = v.clone()
        found[f"{ours}.self_attn.o_proj.weight"] = state[f"{theirs}.attn.proj.weight"]
        if c.qk_bias:
            for name, bias in zip("qk", state[f"{theirs}.attn.qk_bias"].flatten(1), strict=True):
                found[f"{ours}.self_attn.{name}_proj.bias"] = to_halves(bias, c.head_dim)
        gate, up = state[f"{theirs}.mlp.fc.weight"].chunk(2)
        found[f"{ours}.mlp.gate_proj.weight"], found[f"{ours}.mlp.up_proj.weight"] = gate.clone(), up.clone()
        found[f"{ours}.mlp.down_proj.weight"] = state[f"{theirs}.mlp.proj.weight"]
    return found


def to_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors by name, of ours: the inverse of `from_theirs`, without the table of angles that they compute."""
    c = config
    found = {theirs: state[ours] for ours, theirs in _whole(c).items()}
    for ours, theirs in _layers(c):
        for name, norm in NORMS.items():
            found[f"{theirs}.{norm}.weight"] = state[f"{ours}.{name}.weight"]
        q, k, v = (state[f"{ours}.self_attn.{name}_proj.weight"] for name in "qkv")
        found[f"{theirs}.attn.Wqkv.weight"] = torch.cat((to_pairs(q, c.head_dim), to_pairs(k, c.head_dim), v))
        found[f"{theirs}.attn.proj.weight"] = state[f"{ours}.self_attn.o_proj.weight"]
        if c.qk_bias:
            both = [to_pairs(state[f"{ours}.self_attn.{name}_proj.bias"], c.head_dim) for name in "qk"]
            found[f"{theirs}.attn.qk_bias"] = torch.stack(both).view(2, 1, c.n_heads, c.head_dim)
        gate_up = [state[f"{ours}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        found[f"{theirs}.mlp.fc.weight"] = torch.cat(gate_up)
        found[f"{theirs}.mlp.proj.weight"] = state[f"{ours}.mlp.down_proj.weight"]
    return found


def _whole(c: ModelConfig) -> dict[str, str]:
    """Ours to theirs, outside of layers."""
    names = {
        "embed_tokens.0.weight": "transformer.wte.weight",
        "injection.weight": "transformer.adapter.weight",
        "norm.weight": "transformer.ln_f.weight",
    }
    return names if c.tie_embeddings else names | {"head.weight": "lm_head.weight"}


def _layers(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """Ours and theirs, layer by layer."""
    counts = (c.n_prelude_layers, c.n_recurrent_layers, c.n_coda_layers)
    for (ours, theirs), n in zip(STACKS.items(), counts, strict=True):
        for i in range(n):
            yield f"{ours}.{i}", f"transformer.{theirs}.{i}"
