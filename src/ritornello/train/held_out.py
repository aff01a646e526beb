"""Text that a trained model has not learnt from: its run's validation split, or files that are given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ritornello.config import DataConfig, require
from ritornello.train.corpus import open_corpus, stamp
from ritornello.train.data import Rows
from ritornello.train.shards import Encoded, Mask, Progress, Split, encode
from ritornello.train.streamed import open_data
from ritornello.train.tokenizer import Tokenizer
from ritornello.train.trainer import CACHE


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows as the run's are, and the fingerprint of the text."""

    rows: Rows
    fingerprint: str


def of_run(
    data: DataConfig,
    fingerprint: str,
    *,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> HeldOut:
    """The validation split of the data that had this fingerprint when the run was saved.

    Raises:
        ValueError: it is another one now, and what was validation text may be training text of then.
    """
    cache = Path.home() / CACHE if cache_dir is None else Path(cache_dir)
    found = open_data(data, cache, offline=offline, progress=progress)
    same, remedy = found.fingerprint == fingerprint, "--data PATH (data=…) takes other text"
    require(same, "data.source", data.source, "the text that the run was trained on, unchanged", remedy)
    return HeldOut(_rows(found.validation, data), found.fingerprint)


def of_files(path: str | Path, data: DataConfig, tokenizer: Tokenizer) -> HeldOut:
    """All text of a file or a folder, in memory; that the model has not learnt from it is the caller's word.

    Raises:
        ValueError: nothing readable there.
    """
    path = Path(path).absolute()  # or "stdlib" would be no file's name
    require(path.exists(), "data", str(path), "a .txt, .jsonl or .parquet file or a folder of them")
    before, end = stamp(path), Encoded(np.array([tokenizer.eos_id]), np.zeros(1, np.uint8), 0)
    chat = data.format == "chat"
    corpus = open_corpus(str(path), field=data.field, validation_fraction=0.0, utf8=data.tokenizer == "bpe", chat=chat)
    found, offsets = [], [0]
    for document in corpus.documents():
        pieces = encode(list(document.pieces), tokenizer, is_chat=chat)
        if n := sum(len(piece.ids) for piece in pieces):
            found += [*pieces, end]
            offsets.append(offsets[-1] + n + 1)
    require(len(offsets) > 1, "data", str(path), "not without text")
    ids = np.concatenate([piece.ids.astype(np.uint32) for piece in found])
    mask = Mask(path, np.concatenate([piece.mask for piece in found]), before) if chat else None
    n_bytes = sum(piece.n_bytes for piece in found)
    about = tokenizer.byte_lengths, tokenizer.eos_id
    split = Split(path, ids, np.array(offsets), *about, n_bytes, before, mask)
    return HeldOut(_rows(split, data), corpus.fingerprint)


def _rows(split: Split, data: DataConfig) -> Rows:
    return Rows(split, seq_len=data.seq_len, packing=data.packing, isolate_documents=data.isolate_documents)
