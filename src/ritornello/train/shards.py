"""Tokenised text on disk: one memory-mapped array of ids per split, and where its documents begin.

```
train.tokens  validation.tokens     ids, little-endian uint16 (uint32 above 65,536), each document closed by its eos id
train.offsets validation.offsets    first token of each document and the total, little-endian int64
train.mask    validation.mask       of conversations only: a byte for each id, 1 where the loss counts it
tokenizer.json  meta.json           meta.json, with sizes and sha256 of everything, is written last
```
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ritornello.config import require, require_choice, require_int
from ritornello.recipes import read_text
from ritornello.train import chat, files
from ritornello.train.corpus import Corpus, Document, require_unchanged, stamp
from ritornello.train.tokenizer import MAX_BYTES, Tokenizer, from_json

FORMAT = 1
SPLITS = ("train", "validation")
DTYPES = ("<u2", "<u4")
BATCH = 4 << 20  # bytes tokenised at a time
Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


@dataclass(frozen=True, eq=False)
class Split:
    """The ids of one split, and what is needed to read them safely while the run lasts."""

    path: Path  # of the ids
    tokens: np.ndarray  # (n_tokens,) memory-mapped
    offsets: np.ndarray  # (n_documents + 1,) int64, memory-mapped
    byte_lengths: np.ndarray  # (vocab_size,) int64: bytes of text per id; 0 for the end of a document
    eos_id: int  # that end
    n_bytes: int  # of text that the loss counts
    before: tuple[int, int, int]  # the `stamp` of the file when it was opened
    mask: "Mask | None" = None  # None: the loss counts every id

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    def read(self, at: np.ndarray) -> np.ndarray:
        """Ids (int64) at the places `at`. Raises ValueError if the file changed since it was opened."""
        require_unchanged(self.path, self.before)  # reading past a shortened file would end the process
        ids = self.tokens[at].astype(np.int64)
        largest = len(self.byte_lengths) - 1
        if (ids > largest).any():
            _require_ids(ids.ravel(), at.ravel(), largest, self.path)
        return ids

    def counts(self, at: np.ndarray) -> np.ndarray:
        """Where the loss counts the ids at the places `at`: bool."""
        if self.mask is None:
            return np.ones(at.shape, np.bool_)
        require_unchanged(self.mask.path, self.mask.before)
        return self.mask.values[at] != 0


@dataclass(frozen=True, eq=False)
class Mask:
    """Which ids of a split the loss counts: values (n_tokens,) uint8, 0 or 1, memory-mapped; else as in Split."""

    path: Path
    values: np.ndarray
    before: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A tokenised corpus. `fingerprint` covers every id, the documents' places and the tokenizer."""

    directory: Path
    train: Split
    validation: Split
    tokenizer: Tokenizer
    fingerprint: str
    corpus_fingerprint: str  # of the files it was made from
    held_out: tuple[str, ...]  # packages or text files that are validation text


@dataclass(frozen=True, eq=False)
class Encoded:
    """A piece of a document: ids (n,), where the loss counts them (n,) uint8 (None: everywhere), and bytes of text that
    it counts."""

    ids: np.ndarray
    mask: np.ndarray | None
    n_bytes: int


def encode(pieces: Sequence[bytes], tokenizer: Tokenizer, *, is_chat: bool) -> list[Encoded]:
    """Of pieces of a corpus' documents, one apiece."""
    if not is_chat:
        found = zip(tokenizer.encode_batch(pieces), pieces, strict=True)
        return [Encoded(ids, None, len(piece)) for ids, piece in found]
    both = (chat.encode_chat(chat.from_bytes(piece), tokenizer) for piece in pieces)
    return [Encoded(ids, mask.view(np.uint8), int(tokenizer.byte_lengths[ids[mask]].sum())) for ids, mask in both]


@dataclass(eq=False)
class _MaskWriter:
    out: files.Writer
    digest: Any = field(default_factory=hashlib.sha256)
    waiting: list[bytes] = field(default_factory=list)

    def add(self, mask: np.ndarray) -> None:
        self.waiting.append(mask.tobytes())

    def flush(self) -> None:
        data = b"".join(self.waiting)
        self.digest.update(data)
        self.out.write(data)
        self.waiting.clear()


@dataclass(eq=False)
class _SplitWriter:
    out: files.Writer
    dtype: np.dtype
    eos_id: int
    mask: "_MaskWriter | None" = None
    offsets: array = field(default_factory=lambda: array("q", [0]))
    digest: Any = field(default_factory=hashlib.sha256)
    waiting: list[np.ndarray] = field(default_factory=list)
    n_tokens: int = 0
    n_bytes: int = 0

    def add(self, piece: Encoded) -> None:
        self.waiting.append(piece.ids.astype(self.dtype))
        self.n_tokens += len(piece.ids)
        self.n_bytes += piece.n_bytes
        if self.mask is not None:
            assert piece.mask is not None
            self.mask.add(piece.mask)

    def end_document(self) -> None:
        if self.n_tokens > self.offsets[-1]:  # a document without text has nothing to predict
            self.add(Encoded(np.array([self.eos_id]), np.zeros(1, np.uint8), 0))  # of a chat, `<|end|>` was the end
            self.offsets.append(self.n_tokens)

    def flush(self) -> None:
        data = np.concatenate([*self.waiting, np.empty(0, self.dtype)]).tobytes()
        self.digest.update(data)
        self.out.write(data)
        self.waiting.clear()
        if self.mask is not None:
            self.mask.flush()


def build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: Path,
    progress: Progress | None = None,
    *,
    needed: Sequence[str] = SPLITS,
) -> None:
    """Tokenise `corpus` into `directory`, which exists. Equal input gives equal files, byte for byte.
    needed: splits that must have text.

    Memory: a few times BATCH, and 8 bytes a document.

    Raises:
        ValueError: a split without text, or a file that changed while it was read.
    """
    dtype = np.dtype(DTYPES[tokenizer.vocab_size > 1 << 16])
    with ExitStack() as stack:
        outs = [stack.enter_context(files.create(directory / f"{name}.tokens")) for name in SPLITS]
        writers = [_SplitWriter(out, dtype, tokenizer.eos_id) for out in outs]
        for name, writer in zip(SPLITS, writers, strict=True):
            if corpus.chat:
                writer.mask = _MaskWriter(stack.enter_context(files.create(directory / f"{name}.mask")))
        _tokenise(corpus, tokenizer, writers, progress)
    for path, before in corpus.files.items():
        require_unchanged(path, before)
    for name, writer in zip(SPLITS, writers, strict=True):
        n = sum(len(other.offsets) - 1 for other in writers)
        remedy = "give more text, or change data.validation_fraction"
        ok = len(writer.offsets) > 1 or name not in needed
        require(ok, f"documents with text in {name}", 0, f"at least 1 of {n}", remedy)
        files.write_atomic(directory / f"{name}.offsets", _offsets(writer))
    files.write_atomic(directory / "tokenizer.json", tokenizer.to_json().encode())
    files.write_atomic(directory / "meta.json", _meta(corpus, tokenizer, writers))


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, writers: list[_SplitWriter], progress: Progress | None) -> None:
    done = 0
    for batch in _batches(corpus.documents()):
        texts = [piece for _, piece in batch if piece is not None]
        found = iter(encode(texts, tokenizer, is_chat=corpus.chat))
        for validation, piece in batch:
            if piece is None:
                writers[validation].end_document()
            else:
                writers[validation].add(next(found))
        for writer in writers:
            writer.flush()
        done += sum(map(len, texts))
        if progress:
            progress("tokenise", done, corpus.n_bytes)


def _batches(documents: Iterator[Document]) -> Iterator[list[tuple[bool, bytes | None]]]:
    """(is validation, piece) of all documents in order, None where one ends, in lists of about BATCH bytes."""
    batch: list[tuple[bool, bytes | None]] = []
    size = 0
    for document in documents:
        for piece in chain(document.pieces, [None]):
            batch.append((document.validation, piece))
            size += 1 + len(piece or b"")
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def _offsets(writer: _SplitWriter) -> bytes:
    return np.asarray(writer.offsets, dtype="<i8").tobytes()


def _meta(corpus: Corpus, tokenizer: Tokenizer, writers: list[_SplitWriter]) -> bytes:
    splits = {}
    for name, writer in zip(SPLITS, writers, strict=True):
        splits[name] = {
            "n_tokens": writer.n_tokens,
            "n_documents": len(writer.offsets) - 1,
            "n_bytes": writer.n_bytes,
            "tokens_sha256": writer.digest.hexdigest(),
            "offsets_sha256": hashlib.sha256(_offsets(writer)).hexdigest(),
        } | ({} if writer.mask is None else {"mask_sha256": writer.mask.digest.hexdigest()})
    meta = {
        "format": FORMAT,
        "dtype": writers[0].dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
        "splits": splits,
    }
    origin = {"fingerprint": _fingerprint(meta), "corpus": corpus.fingerprint, "held_out": corpus.held_out}
    return json.dumps(meta | origin, indent=1).encode()


def _fingerprint(meta: dict[str, Any]) -> str:
    known = {key: meta[key] for key in ("format", "dtype", "vocab_size", "tokenizer_sha256", "splits")}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def open_shards(directory: Path, *, verify: bool = True) -> Dataset:
    """Map what `build` wrote. `verify` reads all of it once: every id is checked, and every sha256.

    Raises:
        ValueError: missing, truncated, of another dtype, changed, or an id outside the vocabulary (its place named).
    """
    try:
        meta = json.loads(read_text(directory / "meta.json", max_bytes=MAX_BYTES))
        text = read_text(directory / "tokenizer.json", max_bytes=MAX_BYTES).encode()
        require_int("format", meta["format"], 1, FORMAT)
        require_choice("dtype", meta["dtype"], DTYPES)
        _require_digest(directory / "meta.json", _fingerprint(meta), meta["fingerprint"])
        _require_digest(directory / "tokenizer.json", hashlib.sha256(text).hexdigest(), meta["tokenizer_sha256"])
        tokenizer = from_json(text.decode())
        train, validation = (_open_split(directory, name, meta, tokenizer, verify) for name in SPLITS)
        origin = meta["fingerprint"], meta["corpus"], tuple(meta["held_out"])
        return Dataset(directory, train, validation, tokenizer, *origin)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        message = f"tokenised data {str(directory)!r}: must be complete and unchanged; {reason}"
        raise ValueError(f"{message}; remove it to tokenise again") from error


def _open_split(directory: Path, name: str, meta: dict[str, Any], tokenizer: Tokenizer, verify: bool) -> Split:
    known = meta["splits"][name]
    path, index = directory / f"{name}.tokens", directory / f"{name}.offsets"
    before = stamp(path)
    tokens = _map(path, np.dtype(meta["dtype"]), known["n_tokens"])
    offsets = _map(index, np.dtype("<i8"), known["n_documents"] + 1)
    if verify:
        _require_digest(path, _scan(path, tokens.dtype, tokenizer.vocab_size - 1), known["tokens_sha256"])
        _require_digest(index, hashlib.sha256(index.read_bytes()).hexdigest(), known["offsets_sha256"])
    mask = _open_mask(directory / f"{name}.mask", known, verify) if "mask_sha256" in known else None
    about = tokenizer.byte_lengths, tokenizer.eos_id
    return Split(path, tokens, offsets, *about, known["n_bytes"], before, mask)


def _open_mask(path: Path, known: dict[str, Any], verify: bool) -> Mask:
    before = stamp(path)
    values = _map(path, np.dtype(np.uint8), known["n_tokens"])
    if verify:
        _require_digest(path, _scan(path, values.dtype, 1), known["mask_sha256"])
    return Mask(path, values, before)


def _map(path: Path, dtype: np.dtype, n: int) -> np.ndarray:
    size, expected = path.stat().st_size, n * dtype.itemsize
    allowed = f"{expected} bytes, {n} numbers of type {dtype.str}"
    require(size == expected, f"size of {path.name}", size, allowed, "it is truncated or of another type")
    return np.memmap(path, dtype=dtype, mode="r") if n else np.empty(0, dtype)


def _scan(path: Path, dtype: np.dtype, largest: int) -> str:
    """Check every id; the sha256. Read, not mapped: a scan should not fill the memory."""
    digest, start = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while data := stream.read(BATCH):
            ids = np.frombuffer(data, dtype=dtype)
            _require_ids(ids, np.arange(start, start + len(ids)), largest, path)
            digest.update(data)
            start += len(ids)
    return digest.hexdigest()


def _require_ids(ids: np.ndarray, places: np.ndarray, largest: int, path: Path) -> None:
    if ids.max(initial=0) > largest:
        first = int((ids > largest).argmax())
        name = f"{path.name} at offset {places[first]}: token id"
        require(False, name, int(ids[first]), f"in [0, {largest}], the vocabulary of its tokenizer")


def _require_digest(path: Path, found: str, expected: str) -> None:
    require(found == expected, f"sha256 of {path.name}", found, expected, "its content changed after it was written")
