"""The smallest recipe that has every part, and its data."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ritornello.config import DataConfig, ModelConfig, Recipe, TrainConfig
from ritornello.train.data import NO_LABEL, PADDING, Batch

MODEL = ModelConfig(
    dim=16,
    n_loops=4,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    n_experts=4,
    n_active_experts=2,
    expert_dim=8,
    lora_rank=2,
)
TRAIN = TrainConfig(
    steps=40,
    batch_size=4,
    warmup_steps=4,
    lr=1e-2,
    max_loops=4,
    mean_loops=2.0,
    log_every=1,
    eval_every=10,
    eval_batches=2,
    eval_loops=(1, 2, 4),
    save_every=10,
)


def model_config(**changes: Any) -> ModelConfig:
    return replace(MODEL, **changes)


def train_config(**changes: Any) -> TrainConfig:
    return replace(TRAIN, **changes)


def text_file(folder: Path, *, seed: int = 0) -> Path:
    """60 documents of words from a small vocabulary."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(range(97, 123), k=rng.randint(2, 6))).decode() for _ in range(30)]
    path = folder / f"text{seed}.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=12))}) + "\n" for _ in range(60)))
    return path


def recipe(folder: Path, *, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    data = DataConfig(source=str(text_file(folder)), seq_len=24)
    return Recipe(name="small", model=model_config(**(model or {})), data=data, train=train_config(**train))


def batch(*, n: int = 4, length: int = 12, packed: bool = False, vocab_size: int = 264, seed: int = 0) -> Batch:
    """A random batch; packed: rows of two documents, the last row padded."""
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, vocab_size, (2, n, length))
    documents = np.zeros((n, length), np.int64)
    if packed:
        documents[:, length // 2 :] = 1
        documents[-1, -3:] = PADDING
        labels[:, length // 2 - 1] = NO_LABEL
        labels[-1, -4:] = NO_LABEL
    return Batch(tokens, labels, documents, np.arange(n), (labels != NO_LABEL).sum(1))
