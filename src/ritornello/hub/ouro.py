"""Ouro 1.4B and 2.6B (2510.25741) as their `modeling_ouro.py` runs them.

All layers are looped and nothing comes back: h_0 = e is the embedding, the last norm ends every loop, each branch's
output is normed, and a gate reads the state. With the rule `cumulative` a token stops where theirs is read. Theirs then
runs on, for its deeper keys and values; here it is frozen, so that what later tokens read of it differs from there on.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ritornello.config import ModelConfig, require
from ritornello.hub.published import LOOPED_ALIKE, expect, given, llama_shape, rope_theta

PARTS = {  # of a layer
    "input_layernorm": "input_layernorm",
    "attn_out_layernorm": "input_layernorm_2",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp_out_layernorm": "post_attention_layernorm_2",
    **{f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def config_from(theirs: Mapping[str, Any]) -> ModelConfig:
    """The shape that their configuration describes.

    Raises:
        ValueError: something is missing, or of a kind that no published checkpoint has.
    """
    expect(theirs, hidden_act="silu", attention_dropout=0.0, use_sliding_window=False)
    kinds = given(theirs, "layer_types", default=[])
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    require(full, "config.json layer_types", kinds, "'full_attention' throughout")
    return ModelConfig(
        n_prelude_layers=0,
        n_recurrent_layers=given(theirs, "num_hidden_layers"),
        n_coda_layers=0,
        n_loops=given(theirs, "total_ut_steps", default=4),
        max_seq_len=given(theirs, "max_position_embeddings"),
        rope_theta=rope_theta(theirs),
        norm="pre_post",
        **llama_shape(theirs),
        normalize_input=False,
        state_norm="loop",
        injection="none",
        initial_state="e",
        halting="state_gate",
        **LOOPED_ALIKE,
    )


def from_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors by name, of theirs: none is changed."""
    return {ours: state[theirs] for ours, theirs in _names(config)}


def to_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors by name, of ours."""
    return {theirs: state[ours] for ours, theirs in _names(config)}


def _names(c: ModelConfig) -> Iterator[tuple[str, str]]:
    yield "embed_tokens.0.weight", "model.embed_tokens.weight"
    for i in range(c.n_recurrent_layers):
        for ours, theirs in PARTS.items():
            yield f"recurrent.{i}.{ours}.weight", f"model.layers.{i}.{theirs}.weight"
    yield "norm.weight", "model.norm.weight"
    for kind in ("weight", "bias"):
        yield f"halting.head.linear.{kind}", f"model.early_exit_gate.{kind}"
    if not c.tie_embeddings:
        yield "head.weight", "lm_head.weight"
