"""A depth for each sequence of a batch, for transformers' Trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch

from ritornello.config import TrainConfig, require
from ritornello.train.depth import sample


@dataclass(frozen=True)
class RandomDepth:
    """`collate` with `n_loops` (B,) beside what it makes, drawn as in this package's own training, by the depth,
    mean_loops, min_loops, max_loops and seed of `train`.

    The draw hangs on the seed and the batch's own ids: a run that goes on draws what it would have drawn, and an
    evaluation the same each time.
    """

    collate: Callable[[list[Any]], Any]
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        ramp = self.train.depth_ramp_steps
        require(not ramp, "train.depth_ramp_steps", ramp, "0: a collator knows no step")

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        ids = batch["input_ids"]
        counts = sample(self.train, step=crc32(ids.numpy().tobytes()), n_sequences=len(ids))
        return {**batch, "n_loops": torch.from_numpy(counts)}
