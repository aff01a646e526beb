"""A table of model shapes. Every total is pinned by a test that builds the model on the meta device."""

from dataclasses import replace
from typing import Any

from ritornello.config import Attention, ModelConfig, pick, shown

# name: dim, P/R/C layers, heads, kv heads, head dim, expert dim, vocab, tied, (q rank, kv rank, nope, rope, v), LoRA rank
_ARTICLE: dict[str, tuple[Any, ...]] = {
    "1b": (1024, (2, 2, 2), 16, 4, 64, 384, 32768, True, (384, 256, 64, 32, 64), 16),
    "3b": (1536, (2, 2, 2), 24, 4, 64, 768, 65536, True, (512, 256, 64, 32, 64), 16),
    "10b": (2048, (3, 5, 3), 16, 4, 128, 768, 131072, False, (512, 512, 128, 64, 128), 16),
    "50b": (4096, (3, 6, 3), 32, 8, 128, 1664, 131072, False, (1024, 512, 128, 64, 128), 32),
    "100b": (5120, (3, 7, 3), 40, 8, 128, 2304, 131072, False, (1280, 512, 128, 64, 128), 32),
    "500b": (9216, (3, 10, 3), 72, 8, 128, 4608, 131072, False, (2304, 512, 128, 64, 128), 32),
    "1t": (12288, (3, 12, 3), 96, 8, 128, 5760, 131072, False, (3072, 512, 128, 64, 128), 32),
}


def _article(
    dim: int,
    layers: tuple[int, int, int],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    expert_dim: int,
    vocab_size: int,
    tied: bool,
    mla: tuple[int, int, int, int, int],
    lora_rank: int,
) -> ModelConfig:
    """384 experts, 8 active and 1 shared: a dense layer of 9 expert widths has equal active width."""
    q_rank, kv_rank, nope, rope, v = mla
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_prelude_layers=layers[0],
        n_recurrent_layers=layers[1],
        n_coda_layers=layers[2],
        n_loops=16,
        tie_embeddings=tied,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v,
        ffn="moe",
        ffn_dim=9 * expert_dim,
        n_experts=384,
        n_active_experts=8,
        n_shared_experts=1,
        expert_dim=expert_dim,
        lora_rank=lora_rank,
    )


# name: dim, layers of the looped model (P, R, C), layers of its plain pair, heads, ffn dim. Totals include tied embeddings.
_PAIRS: dict[str, tuple[int, tuple[int, int, int], int, int, int]] = {}

PRESETS: dict[str, ModelConfig] = {name: _article(*row) for name, row in _ARTICLE.items()}


def preset(name: str, *, attention: Attention = "gqa", **overrides: Any) -> ModelConfig:
    """The shape called `name` with either attention, any field replaced by keyword.

    Raises:
        ValueError: no such preset or field, or a value out of range.
    """
    shape = pick(PRESETS, name, "preset")
    unknown = set(overrides) - set(ModelConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"preset override = {shown(sorted(unknown)[0])}: must be a field of ModelConfig")
    return replace(shape, attention=attention, **overrides)
