"""Induction heads in a row: from each symbol, back to what followed its last occurrence, p times."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids, Problems, Task
from ritornello.lab.tasks.graphs import N_GUESSED, nodes_like
from ritornello.train.data import NO_LABEL


class Induction(Task):
    """k-hop induction heads (2402.09268, section 4): find(i) is the largest j <= i whose predecessor is the symbol at
    i, the answer at i is the symbol at find(find(… i)), p times. The number of loops alone tells p; hops that double
    would take log2 p. No symbol follows itself, else find(i) = i. Only those positions are asked from which p hops
    stay within the row; the last one always is.

    A symbol's own value tells something, because neighbours differ: by default, guessing from it alone gets 0.33 at
    1 hop, 0.50 at 2, 0.34 at 4 and at most 0.29 elsewhere.
    """

    name = "induction"
    title = "p-hop induction"
    loops_say_hops = True
    n_token_tables = 2

    def __init__(self, length: int = 96, n_symbols: int = 4) -> None:
        require_int("n_symbols", n_symbols, 3)
        require_int("length", length, 8 * n_symbols)
        self.length, self.n_symbols = length, n_symbols
        self.max_hops = length // n_symbols  # a hop goes n_symbols − 1 back on average
        self.vocab_size = max(n_symbols, self.max_hops + 1)
        self.chance = 1 / n_symbols

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(n, T): symbols; drawn again where p hops from the last one lead out of the row."""
        symbols, short = np.empty((len(hops), self.length), np.int64), np.arange(len(hops))
        while len(short):
            steps = rng.integers(1, self.n_symbols, size=(len(short), self.length))
            steps[:, 0] = rng.integers(self.n_symbols, size=len(short))
            symbols[short] = steps.cumsum(axis=1) % self.n_symbols
            short = short[self._jump(symbols[short], hops[short])[:, -1] == 0]
        return symbols

    def _jump(self, symbols: Ids, hops: Ids) -> Ids:
        """(n, T): the position `hops` (n,) hops from each; 0 where they lead out of the row, as no hop leads there."""
        rows, after = np.arange(len(symbols)), np.zeros((len(symbols), self.n_symbols), np.int64)
        find = np.empty_like(symbols)
        for pos in range(self.length):
            find[:, pos] = after[rows, symbols[:, pos]]
            after[rows, symbols[:, pos]] = pos + 1
        place = nodes_like(symbols)
        for hop in range(int(hops.max())):
            place = np.where(hop < hops[:, None], np.take_along_axis(find, place, axis=1), place)
        return place

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        place = self._jump(drawn, hops)
        answers = np.where(place > 0, np.take_along_axis(drawn, place, axis=1), NO_LABEL)
        tokens = np.stack([drawn, np.zeros_like(drawn)], axis=2)
        return Problems(tokens, answers, np.where(place > 0, hops[:, None], 0))

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        return tokens[..., 0]

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By comparing every symbol with every earlier one, then by the binary digits of p."""
        symbols, places = tokens[..., 0], np.arange(self.length)
        follows = (symbols[:, :, None] == np.roll(symbols, 1, axis=1)[:, None]) & (places <= places[:, None])
        power, place = (follows * places).max(axis=2), nodes_like(symbols)
        for digit in range(int(hops.max()).bit_length()):
            place = np.where(hops[:, None] >> digit & 1, np.take_along_axis(power, place, axis=1), place)
            power = np.take_along_axis(power, power, axis=1)
        return np.where(place > 0, np.take_along_axis(symbols, place, axis=1), NO_LABEL)

    def tell(self, problems: Problems) -> Ids:
        """p as the second id of each symbol that is asked about."""
        return np.stack([problems.tokens[..., 0], problems.hops], axis=2)

    def guessing(self, hops: int) -> float:
        """By the symbol asked about: either it or one of the others, whichever is likelier."""
        found = self.sample(np.random.default_rng(0), np.full(N_GUESSED, hops), split="test")
        same = float((found.answers == found.tokens[..., 0])[found.hops > 0].mean())
        return max(same, (1 - same) / (self.n_symbols - 1))
