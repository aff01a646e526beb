"""Words over a small alphabet, read from the left; every position asks about the word so far.

Train and test differ in whole words, length included. Their short prefixes coincide necessarily: the answer after the
first few symbols has been seen in training, whatever the row.
"""

from abc import abstractmethod
from collections.abc import Callable

import numpy as np

from ritornello.lab.tasks.base import Ids, Problems, Task
from ritornello.train.data import NO_LABEL


class WordTask(Task):
    """Rows are padded after their end with the id `n_symbols`, to the longest row of the call."""

    n_symbols: int

    def __init__(self, max_hops: int) -> None:
        self.max_hops = max_hops
        self.vocab_size = self.n_symbols + 1

    @abstractmethod
    def read(self, symbols: Ids) -> Ids:
        """The answer after each symbol, (n, T) for (n, T) without padding."""

    @abstractmethod
    def reread(self, symbols: Ids) -> Ids:
        """The same as `read`, another way."""

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        symbols = rng.integers(self.n_symbols, size=(len(hops), self.max_hops))
        return np.where(np.arange(self.max_hops) < hops[:, None], symbols, self.n_symbols)

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        tokens = drawn[:, : int(hops.max())]
        answers = self._where_asked(tokens, self.read)
        return Problems(tokens, answers, np.where(answers != NO_LABEL, np.arange(1, tokens.shape[1] + 1), 0))

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        divided = tokens[(tokens < self.n_symbols).sum(axis=1) > self.shared_hops]
        missing = self.max_hops - tokens.shape[1]
        return np.pad(divided, ((0, 0), (0, missing)), constant_values=self.n_symbols)

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        return self._where_asked(tokens, self.reread)

    def _where_asked(self, tokens: Ids, answer: Callable[[Ids], Ids]) -> Ids:
        asked = tokens < self.n_symbols
        return np.where(asked, answer(np.where(asked, tokens, 0)), NO_LABEL)
