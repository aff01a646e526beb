"""Real text that every installation has: the source of Python's own standard library."""

from functools import cached_property
from pathlib import Path

import numpy as np

from ritornello.config import DataConfig, require_choice, require_int
from ritornello.lab.tasks.base import Ids, Material, Problems, Split
from ritornello.train.data import Batch, Rows, prepare
from ritornello.train.shards import Dataset
from ritornello.train.trainer import CACHE

SOURCE = "stdlib"
BATCH = 16  # windows scored at a time


class Text(Material):
    """Windows of `seq_len` tokens at random places of the training text; every position asks for the next token, in one
    hop. Whole packages are held out for the test (`train/corpus.py`).

    There is no oracle: nobody knows what text goes on with. Another version of Python has other text, as
    `dataset.fingerprint` tells.
    """

    name = "text"
    title = "source code of Python's standard library"
    train_hops = max_hops = 1

    def __init__(self, seq_len: int = 128, vocab_size: int = 512) -> None:
        require_int("seq_len", seq_len, 1)
        require_int("vocab_size", vocab_size, 260)
        self.seq_len, self.vocab_size = seq_len, vocab_size

    @cached_property
    def dataset(self) -> Dataset:
        """Tokenised once for all runs of this machine."""
        data = DataConfig(source=SOURCE, tokenizer="bpe", bpe_vocab_size=self.vocab_size)
        return prepare(data, Path.home() / CACHE, offline=True)

    def sample(self, rng: np.random.Generator, hops: Ids, *, split: Split) -> Problems:
        """One window (seq_len,) for each entry of `hops`, which are all 1."""
        require_choice("split", split, ("train", "test"))
        text = self.dataset.train if split == "train" else self.dataset.validation
        starts = rng.integers(text.n_tokens - self.seq_len, size=len(hops))
        ids = text.read(starts[:, None] + np.arange(self.seq_len + 1))
        tokens, answers = ids[:, :-1].copy(), ids[:, 1:].copy()  # writing to one must not change the other
        return Problems(tokens, answers, np.ones_like(answers))

    def windows(self, n: int) -> list[Batch]:
        """About `n` held-out windows, evenly spread and the same for every model, each with its bytes of text."""
        rows = Rows(self.dataset.validation, seq_len=self.seq_len, isolate_documents=False)
        return list(rows.evaluation(BATCH, -(-n // BATCH)))
