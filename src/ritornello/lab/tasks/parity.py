"""Parity: every position asks whether the number of ones so far is odd."""

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids
from ritornello.lab.tasks.words import WordTask


class Parity(WordTask):
    """Up to 5 bits there are at most 32 words: too few to keep some for the test, so both splits hold all of them."""

    name = "parity"
    title = "parity of bits"
    n_symbols = 2
    shared_hops = 5
    chance = 1 / 2

    def __init__(self, max_hops: int = 40) -> None:
        require_int("max_hops", max_hops, 1)
        super().__init__(max_hops)

    def read(self, symbols: Ids) -> Ids:
        return np.bitwise_xor.accumulate(symbols, axis=1)

    def reread(self, symbols: Ids) -> Ids:
        """As the sign of a product of ±1."""
        return (1 - np.cumprod(1 - 2 * symbols, axis=1)) // 2
