"""From a corpus to batches: tokenised once, cut into rows, in an order that a step number alone recovers."""

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ritornello.config import DataConfig, require_int
from ritornello.train import files
from ritornello.train.chat import from_bytes
from ritornello.train.corpus import Corpus, open_corpus
from ritornello.train.shards import FORMAT, Dataset, Progress, Split, build, open_shards
from ritornello.train.tokenizer import ByteTokenizer, Tokenizer, train_bpe

BPE_BYTES = 256 << 20  # a BPE learns from the first so many bytes of training text
NO_LABEL = -100
PADDING = -1


def prepare(
    data: DataConfig, cache_dir: str | os.PathLike[str], *, offline: bool = False, progress: Progress | None = None
) -> Dataset:
    """Tokenise `data.source` into `cache_dir`, or open what is there already for the same files and tokenizer.

    A process killed half-way leaves nothing that is read later; the next call starts again and writes the same bytes.
    A second process waits for the first. `progress(stage, bytes done, bytes in all)`.

    Raises:
        ValueError: a bad source (see `open_corpus`), or damaged files in the cache (see `open_shards`).
    """
    corpus = open_corpus(
        data.source,
        field=data.row_field,
        validation_fraction=data.validation_fraction,
        utf8=data.tokenizer == "bpe",
        offline=offline,
        chat=data.format == "chat",
    )
    home = Path(cache_dir, _cache_key(data, corpus))
    shards = home / "shards"
    if not shards.exists():
        files.make_directory(home)
        with alone(home):
            if not shards.exists():
                _build(data, corpus, home, shards, progress)
    return open_shards(shards)


def _cache_key(data: DataConfig, corpus: Corpus) -> str:
    size = data.bpe_vocab_size if data.tokenizer == "bpe" else None
    known = [FORMAT, corpus.fingerprint, data.row_field, data.validation_fraction, data.tokenizer, size]
    known += [] if data.format == "text" else [data.format]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


@contextmanager
def alone(home: Path) -> Generator[None, None, None]:
    """Hold `home`, after waiting for whoever holds it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(files.lock(home))
                break
            except ValueError as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    raise
                time.sleep(0.1)
        yield


def _build(data: DataConfig, corpus: Corpus, home: Path, shards: Path, progress: Progress | None) -> None:
    for left in home.glob(f"{files.TEMPORARY}*"):  # by a process that was killed: its lock is gone
        files.remove_tree(left)
    with files.create_directory(shards) as temporary:
        build(corpus, learn_tokenizer(data, corpus, progress), temporary, progress)


def learn_tokenizer(data: DataConfig, corpus: Corpus, progress: Progress | None) -> Tokenizer:
    chat = data.format == "chat"
    if data.tokenizer == "bytes":
        return ByteTokenizer(chat=chat)
    return train_bpe(_training_text(corpus, progress), data.bpe_vocab_size, chat=chat)


def _training_text(corpus: Corpus, progress: Progress | None) -> Iterator[str]:
    total, done = min(BPE_BYTES, corpus.n_bytes), 0
    for document in corpus.documents():
        if document.validation:
            continue
        for piece in document.pieces:
            if corpus.chat:
                yield from (message["content"] for message in from_bytes(piece))
            else:
                yield piece.decode("utf-8")
            done += len(piece)
            if done >= BPE_BYTES:
                return
        if progress:
            progress("learn the tokenizer", done, total)


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens with their next tokens."""

    tokens: np.ndarray  # (B, T) int64; padding holds the eos id
    labels: np.ndarray  # (B, T) int64; NO_LABEL where nothing is to be predicted
    documents: np.ndarray  # (B, T) int64: 0, 1, 2 … within a row, PADDING after its end
    indices: np.ndarray  # (B,) int64: global sample indices, or row numbers in an evaluation
    n_bytes: np.ndarray  # (B,) int64: bytes of text that the labels stand for; the end of a document is none


class Rows:
    """The rows of a split, by number. A row is a function of (split, seq_len, packing, number) alone.

    Packed: row i holds tokens i·T … i·T + T of the whole stream, so every token but the first is the label of exactly
    one row. Not packed: the same within each document, one piece of a document a row. The last row is padded.
    Nothing predicts the first token of a document when documents are isolated; its eos id is predicted like any token.
    Of conversations only what the split's mask counts is a label. Where a row ends inside of one, the next row goes on
    without what was before.
    """

    def __init__(self, split: Split, *, seq_len: int, packing: bool = True, isolate_documents: bool = True) -> None:
        require_int("seq_len", seq_len, 1)
        self.split, self.seq_len, self.isolate = split, seq_len, isolate_documents or not packing
        self._offsets = np.array([0, split.n_tokens] if packing else split.offsets)  # copied: read once
        n_rows = -(-(np.diff(self._offsets) - 1) // seq_len)
        self._first_row = np.concatenate([[0], np.cumsum(n_rows)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def read(self, rows: np.ndarray, indices: np.ndarray | None = None) -> Batch:
        """The batch of `rows` (B,), numbers in [0, len(self)). `indices`: their global sample indices."""
        stretch = np.searchsorted(self._first_row, rows, side="right") - 1
        start = self._offsets[stretch] + (rows - self._first_row[stretch]) * self.seq_len
        at = start[:, None] + np.arange(self.seq_len + 1)
        real = at < self._offsets[stretch + 1][:, None]
        eos, places = self.split.eos_id, np.minimum(at, self.split.n_tokens - 1)
        ids = np.where(real, self.split.read(places), eos)
        counted = real[:, 1:] & self.split.counts(places[:, 1:])
        tokens, labels = ids[:, :-1].copy(), np.where(counted, ids[:, 1:], NO_LABEL)
        ends = (tokens == eos) & self.isolate
        labels[ends] = NO_LABEL
        documents = np.where(real[:, :-1], np.cumsum(ends, axis=1) - ends, PADDING)
        n_bytes = self.split.byte_lengths[np.where(labels == NO_LABEL, eos, labels)].sum(axis=1)
        return Batch(tokens, labels, documents, rows if indices is None else indices, n_bytes)

    def evaluation(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """All rows in the order of the text, or `limit` batches of evenly spread ones. The last batch may be short."""
        require_int("batch_size", batch_size, 1)
        require_int("limit", limit or 1, 1)
        n = min(len(self), (limit or len(self)) * batch_size)
        chosen = np.arange(n) * len(self) // n
        for start in range(0, n, batch_size):
            yield self.read(chosen[start : start + batch_size])


class Batches:
    """Shuffled rows without end: `batch(step)` is a function of (split, seed, step), so that is all a cursor holds.

    Sample g = step·batch_size + i is row π(g mod n) of epoch g div n, π drawn for (seed, epoch): every row once an
    epoch, in an order that does not depend on how samples are grouped into batches or shared among processes.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        packing: bool = True,
        isolate_documents: bool = True,
    ) -> None:
        require_int("batch_size", batch_size, 1)
        require_int("seed", seed, 0, 2**63 - 1)
        self.rows = Rows(split, seq_len=seq_len, packing=packing, isolate_documents=isolate_documents)
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int, part: slice = slice(None)) -> Batch:
        """The batch of `step`; `part` picks rows of it, for a process or a micro-batch."""
        require_int("step", step, 0)
        indices = step * self.batch_size + np.arange(self.batch_size)[part]
        return self.rows.read(shuffled(indices, n=len(self.rows), seed=self.seed), indices)


def shuffled(indices: np.ndarray, *, n: int, seed: int) -> np.ndarray:
    """π_epoch(index mod n) for epoch = index div n, for each index (int64): O(1) memory, any index at once.

    A Feistel network of 8 rounds on the smallest even number of bits that holds n, applied again while the result is
    ≥ n ("cycle walking", Black & Rogaway 2002, §4), which keeps it a permutation of [0, n).
    """
    epoch, place = np.divmod(indices, n)
    key = _mix(_mix(np.full_like(place, seed).astype(np.uint64)) ^ epoch.astype(np.uint64))
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    value = _feistel(place.astype(np.uint64), key, half)
    while (outside := value >= n).any():
        value[outside] = _feistel(value[outside], key[outside], half)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, key: np.ndarray, half: np.uint64) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for _ in range(8):
        key = _mix(key)
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """One output of SplitMix64 for the state `x` (Steele, Lea & Flood 2014): a bijection that scatters every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
