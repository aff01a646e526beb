"""Llama and what is built like it (Mistral without windows, SmolLM2): a plain transformer, all of it prelude here.

Its layers are the ones here by the same names, rotary halves and all. `upcycle` makes loops of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ritornello.config import ModelConfig
from ritornello.hub.published import LOOPED_ALIKE, count, expect, given, llama_shape, rope_theta

PARTS = (  # of a layer
    "input_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def config_from(theirs: Mapping[str, Any]) -> ModelConfig:
    """The shape that their configuration describes.

    Raises:
        ValueError: something is missing, or of a kind that is not converted: biases, windows, scaled rope.
    """
    expect(theirs, hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None, attention_dropout=0.0)
    # Granite, SmolLM3: other models, with tensors of the same names
    expect(theirs, embedding_multiplier=1, residual_multiplier=1, logits_scaling=1, attention_multiplier=None)
    expect(theirs, no_rope_layers=None, use_qk_norm=None)
    return ModelConfig(
        n_prelude_layers=count(theirs, "num_hidden_layers"),
        n_recurrent_layers=0,
        n_coda_layers=0,
        n_loops=1,
        max_seq_len=given(theirs, "max_position_embeddings", default=2048),
        rope_theta=rope_theta(theirs, default=10_000.0),
        **llama_shape(theirs),
        normalize_input=False,
        injection="none",
        initial_state="e",
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
    for i in range(c.n_prelude_layers):
        for part in PARTS:
            yield f"prelude_layers.{i}.{part}.weight", f"model.layers.{i}.{part}.weight"
    yield "norm.weight", "model.norm.weight"
    if not c.tie_embeddings:
        yield "head.weight", "lm_head.weight"
