"""A table of model shapes. Every total is pinned by a test that builds the model on the meta device.

A name states total parameters, embeddings included, within 1.5% with either attention. `-rdt` and `-plain` of one size
are the same layers, a third of them looped as in Parcae (2604.12946), or all stacked once: their totals differ by an
injection and a norm. `tiny` sizes are for bytes on a CPU: `tiny-plain` has tiny's total parameters, `tiny-dense` and
its plain pair have its active ones.
"""

from dataclasses import replace
from typing import Any

from ritornello.config import Attention, ModelConfig, pick, shown

Layers = tuple[int, int, int]  # prelude, recurrent, coda
Heads = tuple[int, int, int]  # heads, kv heads, head dim
Latent = tuple[int, int, int, int, int]  # MLA's query rank, kv rank, nope, rope and value dims


def _shape(dim: int, layers: Layers, heads: Heads, latent: Latent, **rest: Any) -> ModelConfig:
    prelude, recurrent, coda = layers
    n_heads, n_kv_heads, head_dim = heads
    q_rank, kv_rank, nope, rope, value = latent
    return ModelConfig(
        dim=dim,
        n_prelude_layers=prelude,
        n_recurrent_layers=recurrent,
        n_coda_layers=coda,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        **rest,
    )


def _moe(
    dim: int, layers: Layers, heads: Heads, expert: int, vocab: int, tied: bool, latent: Latent, lora: int, **rest: Any
) -> ModelConfig:
    """384 experts, 8 active and 1 shared: a dense layer of 9 expert widths has equal active width."""
    rest = {"vocab_size": vocab, "tie_embeddings": tied, "expert_dim": expert, "lora_rank": lora, "n_loops": 16} | rest
    return _shape(dim, layers, heads, latent, ffn="moe", ffn_dim=9 * expert, n_experts=384, n_active_experts=8, **rest)


def _dense(dim: int, layers: Layers, heads: Heads, ffn: int, vocab: int, latent: Latent) -> ModelConfig:
    """8 loops of exactly the same weights, so that a pair differs in nothing but looping."""
    rest: dict[str, Any] = {"n_loops": 8, "lora_rank": 0, "loop_embedding": False}
    return _shape(dim, layers, heads, latent, vocab_size=vocab, ffn="dense", ffn_dim=ffn, **rest)


PRESETS: dict[str, ModelConfig] = {
    # dim, P/R/C, heads × dim (kv), expert, vocab, tied, MLA, LoRA rank
    "1b": _moe(1024, (2, 2, 2), (16, 4, 64), 384, 32768, True, (384, 256, 64, 32, 64), 16),
    "3b": _moe(1536, (2, 2, 2), (24, 4, 64), 768, 65536, True, (512, 256, 64, 32, 64), 16),
    "10b": _moe(2048, (3, 5, 3), (16, 4, 128), 768, 131072, False, (512, 512, 128, 64, 128), 16),
    "50b": _moe(4096, (3, 6, 3), (32, 8, 128), 1664, 131072, False, (1024, 512, 128, 64, 128), 32),
    "100b": _moe(5120, (3, 7, 3), (40, 8, 128), 2304, 131072, False, (1280, 512, 128, 64, 128), 32),
    "500b": _moe(9216, (3, 10, 3), (72, 8, 128), 4608, 131072, False, (2304, 512, 128, 64, 128), 32),
    "1t": _moe(12288, (3, 12, 3), (96, 8, 128), 5760, 131072, False, (3072, 512, 128, 64, 128), 32),
    "tiny": _moe(128, (1, 1, 1), (4, 2, 32), 16, 264, True, (64, 64, 32, 16, 32), 4, n_loops=8, halting="gate"),
    # dim, P/R/C, heads × dim (kv), ffn, vocab, MLA
    "140m-rdt": _dense(768, (5, 6, 5), (12, 4, 64), 2432, 32768, (384, 128, 64, 32, 64)),
    "140m-plain": _dense(768, (16, 0, 0), (12, 4, 64), 2432, 32768, (384, 128, 64, 32, 64)),
    "370m-rdt": _dense(1024, (8, 8, 8), (16, 4, 64), 3712, 32768, (384, 128, 64, 32, 64)),
    "370m-plain": _dense(1024, (24, 0, 0), (16, 4, 64), 3712, 32768, (384, 128, 64, 32, 64)),
    "770m-rdt": _dense(1536, (8, 8, 8), (12, 4, 128), 5120, 32768, (512, 384, 128, 64, 128)),
    "770m-plain": _dense(1536, (24, 0, 0), (12, 4, 128), 5120, 32768, (512, 384, 128, 64, 128)),
    "1.3b-rdt": _dense(2048, (8, 8, 8), (16, 4, 128), 6656, 32768, (512, 512, 128, 64, 128)),
    "1.3b-plain": _dense(2048, (24, 0, 0), (16, 4, 128), 6656, 32768, (512, 512, 128, 64, 128)),
    "tiny-plain": _dense(192, (6, 0, 0), (6, 2, 32), 608, 264, (64, 64, 32, 16, 32)),
    "tiny-dense": _dense(128, (1, 1, 1), (4, 2, 32), 208, 264, (64, 64, 32, 16, 32)),
    "tiny-dense-plain": _dense(128, (3, 0, 0), (4, 2, 32), 208, 264, (64, 64, 32, 16, 32)),
}


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
