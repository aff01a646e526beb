"""The word problem of S5, the permutations of five things: every position asks for the product so far.

Complete for NC¹, as for any group that isn't solvable (Barrington 1989). What a fixed number of layers computes lies
within TC⁰, believed to be less, so that longer words should need more depth (2404.08819).
"""

from itertools import permutations

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids
from ritornello.lab.tasks.words import WordTask

PERMUTATIONS = np.array(
    list(permutations(range(5))), dtype=np.int64
)  # (120, 5): element g sends i to PERMUTATIONS[g, i]
PLACES = 5 ** np.arange(4, -1, -1)  # a permutation's images as digits; elements are in the order of these numbers


class S5WordProblem(WordTask):
    """A product g₁ · g₂ · … applies g₁ first: PRODUCTS[g, h] sends i to h(g(i)). Element 0 is the identity."""

    name = "s5"
    title = "products in S5"
    n_symbols = 120
    chance = 1 / 120

    def __init__(self, max_hops: int = 24) -> None:
        require_int("max_hops", max_hops, 1)
        super().__init__(max_hops)

    def read(self, symbols: Ids) -> Ids:
        """By the multiplication table."""
        so_far = symbols.copy()
        for pos in range(1, symbols.shape[1]):
            so_far[:, pos] = PRODUCTS[so_far[:, pos - 1], symbols[:, pos]]
        return so_far

    def reread(self, symbols: Ids) -> Ids:
        """By following each of the five things."""
        images = np.tile(np.arange(5), (len(symbols), 1))
        answers = np.empty_like(symbols)
        for pos in range(symbols.shape[1]):
            images = np.take_along_axis(PERMUTATIONS[symbols[:, pos]], images, axis=1)
            answers[:, pos] = _element(images)
        return answers


def _element(images: Ids) -> Ids:
    """The elements (...) that send i to images[..., i]."""
    return np.searchsorted(PERMUTATIONS @ PLACES, images @ PLACES)


PRODUCTS = _element(PERMUTATIONS[:, PERMUTATIONS].swapaxes(0, 1))  # (120, 120)
