"""A byte n-gram model: what a looped transformer has to beat before its curves mean anything.

Interpolated Witten-Bell smoothing (Witten & Bell 1991, method C, as Chen & Goodman 1998, TR-10-98, write it):

    P(w | h) = (c(h w) + N(h) · P(w | h')) / (c(h) + N(h))

c counts occurrences, N(h) is the number of different symbols seen after h, h' is h without its oldest symbol, and
the model below the empty history is uniform over all symbols. A history never seen passes P(w | h') on unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ritornello.config import require_int
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.shards import Dataset, Split
from ritornello.train.tokenizer import ByteTokenizer, Tokenizer

N_SYMBOLS = 257  # bytes and the end of a document
MAX_ORDER = 7  # 257⁷ is the largest power that an int64 holds


@dataclass(frozen=True, eq=False)
class Table:
    """Counts of one order k. A gram's code is Σ symbol_lag · 257^lag, lag 0 the predicted symbol; sorted."""

    grams: np.ndarray
    counts: np.ndarray  # c(h w)
    histories: np.ndarray  # codes of grams without their last symbol
    totals: np.ndarray  # c(h)
    n_kinds: np.ndarray  # N(h)


@dataclass(frozen=True, eq=False)
class NGram:
    tables: tuple[Table, ...]  # orders 1 … n

    @property
    def order(self) -> int:
        return len(self.tables)

    def probability(self, grams: np.ndarray) -> np.ndarray:
        """P(last symbol | the others) of n-gram codes (N,): (N,) float64. Sums to 1 over the 257 last symbols."""
        p = np.full(len(grams), 1 / N_SYMBOLS)
        for k, table in enumerate(self.tables, 1):
            gram = grams % N_SYMBOLS**k
            count = _lookup(table.grams, table.counts, gram)
            total = _lookup(table.histories, table.totals, gram // N_SYMBOLS)
            kinds = _lookup(table.histories, table.n_kinds, gram // N_SYMBOLS)
            p = np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)
        return p


@dataclass(frozen=True, eq=False)
class Score:
    """What predicting a text costs."""

    bits: np.ndarray  # (n_targets,) float64, in the order of the text: every byte or document end but each first byte
    n_bytes: int  # of text among the targets; the ends of documents cost bits but are no text

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.sum()) / self.n_bytes


def fit(symbols: np.ndarray, offsets: np.ndarray, *, order: int = 3) -> NGram:
    """Count `symbols` (N,) of documents that begin at `offsets`. About 60 bytes of memory per symbol."""
    require_int("order", order, 1, MAX_ORDER)
    grams = gram_codes(symbols, offsets, order=order)
    return NGram(tuple(_count(grams % N_SYMBOLS**k) for k in range(1, order + 1)))


def gram_codes(symbols: np.ndarray, offsets: np.ndarray, *, order: int) -> np.ndarray:
    """Code (int64) of the n-gram that ends at each target: every symbol but the first of its document.

    Before its first symbol a document is preceded by document ends only, so no gram crosses into another document.
    """
    pos = np.arange(len(symbols)) - np.repeat(offsets[:-1], np.diff(offsets))
    targets = np.flatnonzero(pos > 0)
    code = np.zeros(len(targets), dtype=np.int64)
    for lag in range(order):
        inside = pos[targets] >= lag
        code += np.where(inside, symbols[np.maximum(targets - lag, 0)], N_SYMBOLS - 1) * N_SYMBOLS**lag
    return code


def baseline(dataset: Dataset, *, order: int = 3) -> Score:
    """Train on the bytes of the training split, score the validation split.

    The targets are those of a byte transformer on the same data set with isolated documents, in the same order.
    """
    model = fit(*_symbols(dataset.train, dataset.tokenizer), order=order)
    grams = gram_codes(*_symbols(dataset.validation, dataset.tokenizer), order=order)
    bits = np.concatenate([-np.log2(model.probability(part)) for part in _parts(grams)])
    return Score(bits, int((grams % N_SYMBOLS < N_SYMBOLS - 1).sum()))


def _symbols(split: Split, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The split as bytes with document ends, whatever its tokenizer."""
    tokens, offsets = split.read(np.arange(split.n_tokens)), np.asarray(split.offsets)
    if isinstance(tokenizer, ByteTokenizer):
        return tokens, offsets
    text = np.frombuffer(tokenizer.decode_bytes(tokens), dtype=np.uint8).astype(np.int64)
    ends = np.cumsum(split.byte_lengths[tokens])[offsets[1:] - 1]
    return np.insert(text, ends, N_SYMBOLS - 1), np.concatenate([[0], ends + np.arange(1, len(ends) + 1)])


def _count(grams: np.ndarray) -> Table:
    found, counts = np.unique(grams, return_counts=True)
    histories, first, n_kinds = np.unique(found // N_SYMBOLS, return_index=True, return_counts=True)
    return Table(found, counts, histories, np.add.reduceat(counts, first), n_kinds)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + (1 << 20)] for start in range(0, len(array), 1 << 20))


def token_bits(dataset: Dataset, *, order: int = 3) -> np.ndarray:
    """(n_tokens,) what `baseline` pays for each token of the validation split: 0 for the first of a document."""
    split = dataset.validation
    symbols, offsets = _symbols(split, dataset.tokenizer)
    inside = np.ones(len(symbols), dtype=bool)
    inside[offsets[:-1]] = False
    bits = np.zeros(len(symbols))
    bits[inside] = baseline(dataset, order=order).bits
    tokens = split.read(np.arange(split.n_tokens))
    n_symbols = np.where(tokens == split.eos_id, 1, split.byte_lengths[tokens])
    by_token = np.add.reduceat(bits, np.cumsum(n_symbols) - n_symbols)
    by_token[np.asarray(split.offsets[:-1])] = 0  # its later bytes too: a model of tokens does not predict them
    return by_token


def window_bits(dataset: Dataset, batches: Sequence[Batch]) -> np.ndarray:
    """(W,) what `baseline` pays for the targets of each validation window; `batches` as `Rows` reads them, packed."""
    bits = token_bits(dataset)
    found = []
    for batch in batches:
        length = batch.labels.shape[1]
        at = batch.indices[:, None] * length + 1 + np.arange(length)
        found.append(np.where(batch.labels == NO_LABEL, 0, bits[np.minimum(at, len(bits) - 1)]).sum(1))
    return np.concatenate(found)
