"""The shapes that every side is measured at."""

from dataclasses import replace
from typing import Any

import torch

from ritornello.config import ModelConfig, TrainConfig

VOCAB = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MLA: dict[str, Any] = {"kv_lora_rank": 64, "q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}


def mixture(name: str, *, attention: str = "gqa", n_loops: int = 8) -> ModelConfig:
    """S1 or S2: two dense layers, one looped mixture of experts, two dense layers, ACT."""
    sizes: dict[str, Any] = {
        "S1": {"dim": 256, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "n_experts": 384, "expert_dim": 32},
        "S2": {"dim": 768, "n_heads": 12, "n_kv_heads": 4, "head_dim": 64, "n_experts": 64, "expert_dim": 256},
    }[name]
    latent = {"S1": MLA | {"v_head_dim": 32}, "S2": MLA | {"kv_lora_rank": 128, "q_lora_rank": 256, "v_head_dim": 64}}
    return ModelConfig(
        **sizes,
        **latent[name],
        attention=attention,  # pyrefly: ignore
        vocab_size=VOCAB,
        n_prelude_layers=2,
        n_coda_layers=2,
        n_loops=n_loops,
        ffn_dim=sizes["dim"] * 4 // 3,
        n_active_experts=8,
        n_shared_experts=16,  # two of 8 experts' width
        lora_rank=16,
        loop_embedding=True,
        halting="act",
        read_out="mixture",
    )


def dense(*, plain: bool = False, n_loops: int = 8) -> ModelConfig:
    """S3, Parcae's shape of 140M without its value embeddings: two layers, two looped ones, two layers. plain: six."""
    return ModelConfig(
        vocab_size=32_768,
        dim=768,
        n_heads=6,
        n_kv_heads=6,
        head_dim=128,
        ffn="dense",
        ffn_dim=2048,  # SwiGLU; Parcae's has two matrices of 3072, as many numbers
        n_prelude_layers=3 if plain else 2,
        n_recurrent_layers=0 if plain else 2,
        n_coda_layers=3 if plain else 2,
        n_loops=1 if plain else n_loops,
        lora_rank=0,
        loop_embedding=False,
    )


def once(name: str) -> ModelConfig:
    """MLA and experts as in DeepSeek-V3, run once: two dense layers and one of experts."""
    return replace(
        mixture(name, attention="mla", n_loops=1),
        n_coda_layers=0,
        n_shared_experts=2,
        lora_rank=0,
        loop_embedding=False,
        halting="none",
        read_out="last",
    )


BATCH = {"S1": (4, 256), "S2": (4, 512), "S3": (2, 512)}  # sequences, tokens


def training(n_loops: int, precision: str) -> TrainConfig:
    return TrainConfig(
        steps=1000,
        precision=precision,  # pyrefly: ignore
        depth="fixed",
        min_loops=1,
        max_loops=n_loops,
        mean_loops=float(n_loops),
    )
