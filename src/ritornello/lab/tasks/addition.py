"""Adding two numbers: every place asks for its digit of the sum."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids, Problems, Task


class Addition(Task):
    """A token is one place of both numbers, two ids: the lowest place first, so that carries come from what has been
    read. A last place of two zeros holds the last carry.

    A digit's hops are how far below it lies the place that decides its carry: 1 plus the places between, whose digits
    add to 9 and pass a carry on. They are not given. Half the places of a row pass, in runs of at most hops − 1, one of
    them so long. Guessing from a place's own digits gets 1/2: there is a carry or none. Constant depth could do it, by
    looking for the deciding place (addition is in AC⁰); passing the carry from place to place takes a loop a hop.

    Problems are apart as pairs of digits: which number a digit belongs to does not matter.
    """

    name = "addition"
    title = "sum of two numbers"
    n_token_tables = 2
    vocab_size = 10
    chance = 1 / 10

    def __init__(self, n_digits: int = 32) -> None:
        require_int("n_digits", n_digits, 8)
        self.n_digits = self.max_hops = n_digits

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(n, 2D): the two digits of each place, the smaller first."""
        passes = self._passes(rng, hops)
        digits = rng.integers(10, size=passes.shape)
        others = (9 - digits + np.where(passes, 0, rng.integers(1, 10, size=passes.shape))) % 10
        return np.sort(np.stack([digits, others], axis=2), axis=2).reshape(len(hops), -1)

    def _passes(self, rng: np.random.Generator, hops: Ids) -> np.ndarray:
        """(n, D): which places pass a carry on. No run is longer than hops − 1; one, not from the lowest place, is."""
        passes = rng.random((len(hops), self.n_digits)) < 0.5
        run = np.zeros_like(hops)
        for place in range(self.n_digits):
            passes[:, place] &= run < hops - 1
            run = (run + 1) * passes[:, place]
        start = rng.integers(1, self.n_digits - hops + 2)[:, None]
        from_start = np.arange(self.n_digits) - start
        planted = (from_start >= 0) & (from_start < hops[:, None] - 1)
        beside = (from_start == -1) | (from_start == hops[:, None] - 1)
        return (passes | planted) & ~beside

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        pairs = rng.permuted(drawn.reshape(len(hops), -1, 2), axis=2)
        tokens = np.pad(pairs, ((0, 0), (0, 1), (0, 0)))
        sums, places = tokens.sum(axis=2), np.arange(self.n_digits + 1)
        decides = np.maximum.accumulate(np.where(sums != 9, places, -1), axis=1)
        below = np.pad(decides[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        carry = (below >= 0) & (np.take_along_axis(sums, below.clip(0), axis=1) > 9)
        return Problems(tokens, (sums + carry) % 10, places - below)

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        return np.sort(tokens[:, : self.n_digits], axis=2).reshape(len(tokens), -1)

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By Python's own integers."""
        answers = np.empty(tokens.shape[:2], np.int64)
        for row, digits in enumerate(tokens[:, ::-1]):
            total = sum(int("".join(map(str, number))) for number in digits.T.tolist())
            answers[row] = list(map(int, reversed(str(total).zfill(len(digits)))))
        return answers

    def guessing(self, hops: int) -> float:
        return 1 / 2
