"""What converters of published models share: reading a configuration that others wrote."""

from collections.abc import Mapping
from typing import Any

from ritornello.config import require

LOOPED_ALIKE: dict[str, Any] = {"ffn": "dense", "lora_rank": 0, "lora_targets": (), "loop_embedding": False}
_MISSING = object()


def given(theirs: Mapping[str, Any], *names: str, default: Any = _MISSING) -> Any:
    """What the configuration says under the first of these names that it has."""
    found = next((theirs[name] for name in names if theirs.get(name) is not None), default)
    require(found is not _MISSING, f"config.json {names[0]}", None, "given")
    return found


def expect(theirs: Mapping[str, Any], **settings: Any) -> None:
    """Settings that this package knows one value of; one that is not named has it."""
    for name, value in settings.items():
        found = theirs.get(name)
        require(found is None or found == value, f"config.json {name}", found, f"{value!r}, the one that is converted")


def count(theirs: Mapping[str, Any], *names: str) -> int:
    """`given`, an integer above 0."""
    found = given(theirs, *names)
    require(type(found) is int and found > 0, f"config.json {names[0]}", found, "an integer > 0")
    return found


def llama_shape(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Of `ModelConfig`: vocabulary, widths and heads by the names that Llama gave them."""
    dim, n_heads = count(theirs, "hidden_size"), count(theirs, "num_attention_heads")
    return {
        "vocab_size": given(theirs, "vocab_size"),
        "dim": dim,
        "tie_embeddings": given(theirs, "tie_word_embeddings", default=False),
        "n_heads": n_heads,
        "n_kv_heads": given(theirs, "num_key_value_heads", default=n_heads),
        "head_dim": given(theirs, "head_dim", default=dim // n_heads),
        "ffn_dim": given(theirs, "intermediate_size"),
        "norm_eps": given(theirs, "rms_norm_eps", default=1e-6),
    }


def rope_theta(theirs: Mapping[str, Any], **default: float) -> float:
    """Of plain rope, as transformers 4 or 5 writes it. default: where they name none."""
    rope = given(theirs, "rope_parameters", "rope_scaling", default={})
    require(isinstance(rope, dict), "config.json rope_scaling", rope, "an object")
    kind = given(rope, "rope_type", "type", default="default")
    require(kind == "default", "config.json rope_scaling", kind, "'default', the one that is converted")
    return given({**theirs, **rope}, "rope_theta", **default)
