"""What a run reads: data tokenised before it begins, or a stream. Batches are a function of (data, seed, step)."""

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ritornello.config import DataConfig, require_int
from ritornello.train.blocks import Blocks
from ritornello.train.data import Batch, Batches, prepare, shuffled
from ritornello.train.shards import FORMAT, Dataset, Progress
from ritornello.train.stream import Stream, open_stream


@dataclass(frozen=True, eq=False)
class Streamed(Dataset):
    """The first block of a stream, with the run's validation text; `fingerprint` covers that and names the source."""

    blocks: Blocks


class StreamedBatches:
    """Shuffled rows without end, as `Batches`, of a stream: sample g is a row of the block that holds row g of all
    blocks, in an order drawn for (seed, block). A batch may read from two blocks, or more."""

    def __init__(self, blocks: Blocks, *, batch_size: int, seed: int) -> None:
        require_int("batch_size", batch_size, 1)
        require_int("seed", seed, 0, 2**63 - 1)
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """The batch of `step`; `part` picks rows of it, for a process or a micro-batch."""
        require_int("step", step, 0)
        left = step * self.batch_size + np.arange(self.batch_size)[part]
        found = []
        while len(left):
            number, entry = self.blocks.holding(int(left[0]))
            here = left[left < entry.end_row]
            left, places = left[len(here) :], number * entry.n_rows + here - entry.first_row
            rows = shuffled(places, n=entry.n_rows, seed=self.seed)  # of the epoch `number`
            found.append(self.blocks.rows(number).read(rows, here))
        return found[0] if len(found) == 1 else _joined(found)


def open_data(
    data: DataConfig, cache_dir: str | os.PathLike[str], *, offline: bool = False, progress: Progress | None = None
) -> Dataset:
    """`prepare`, or with `data.streaming` the stream, whose blocks are made in `cache_dir`.

    Raises:
        ValueError, OSError: see `prepare`, `open_stream` and `Stream.passages`.
    """
    if not data.streaming:
        return prepare(data, cache_dir, offline=offline, progress=progress)
    stream = open_stream(data, offline=offline)
    blocks = Blocks(stream, data, Path(cache_dir, _cache_key(data, stream)), progress)
    first = blocks.first.dataset
    total = hashlib.sha256(json.dumps([stream.fingerprint, first.fingerprint]).encode()).hexdigest()
    own: Any = {"fingerprint": total, "corpus_fingerprint": stream.fingerprint}
    return Streamed(**vars(first) | own, blocks=blocks)


def batches(dataset: Dataset, *, batch_size: int, seed: int, **rows: Any) -> Batches | StreamedBatches:
    """Of what `open_data` found; `rows`: the settings of `Rows`, which a stream's blocks have already."""
    if isinstance(dataset, Streamed):
        return StreamedBatches(dataset.blocks, batch_size=batch_size, seed=seed)
    return Batches(dataset.train, batch_size=batch_size, seed=seed, **rows)


def _cache_key(data: DataConfig, stream: Stream) -> str:
    size = data.bpe_vocab_size if data.tokenizer == "bpe" else None
    known = [FORMAT, stream.fingerprint, data.validation_fraction, data.tokenizer, size]
    known += [data.stream_bytes, data.seq_len, data.packing]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _joined(found: list[Batch]) -> Batch:
    return Batch(*(np.concatenate([getattr(batch, each.name) for batch in found]) for each in fields(Batch)))
