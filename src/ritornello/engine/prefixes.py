"""Keys and values of prompts that are through, kept for the next prompt that begins alike."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from ritornello.engine.pages import Pages, Rows, distinct

BLOCK = 16  # tokens that are shared or not


class Prefixes:
    """Blocks of tokens by what they and all before them are. The one used longest ago goes first, of a prompt its end.

    What a block holds depends on the depth its tokens ran, so that is part of its key.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._blocks: OrderedDict[bytes, Rows] = OrderedDict()  # (kinds, BLOCK) rows

    def __len__(self) -> int:
        return len(self._blocks)

    @staticmethod
    def keys(tokens: Rows, depth: object) -> list[bytes]:
        """Of each whole block of `tokens` (n,) or (n, C), int64."""
        return list(_chain(tokens, depth))

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of the first blocks are here."""
        return next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))

    def give(self, keys: Sequence[bytes], table: Rows) -> int:
        """Put what is here into a sequence's table (kinds, places); returns how many tokens that are."""
        n = self.known(keys)
        for i, key in enumerate(keys[:n]):
            table[:, i * BLOCK : (i + 1) * BLOCK] = self._blocks[key]
        self.pages.hold(distinct(table[:, : n * BLOCK]))
        self._touch(keys[:n])
        return n * BLOCK

    def keep(self, keys: Sequence[bytes], table: Rows) -> None:
        """Hold the blocks of a sequence's table that are not here yet."""
        for i, key in enumerate(keys):
            if key not in self._blocks:
                rows = table[:, i * BLOCK : (i + 1) * BLOCK].copy()
                self.pages.hold(distinct(rows))
                self._blocks[key] = rows
        self._touch(keys)

    def n_idle(self) -> int:
        """Rows that nobody else holds."""
        return sum(self.pages.n_held_once(distinct(rows)) for rows in self._blocks.values())

    def drop_one(self) -> bool:
        """The first block to go of those that free a row; whether there was one."""
        for key, rows in self._blocks.items():
            if self.pages.n_held_once(held := distinct(rows)):
                self.pages.drop(held)
                del self._blocks[key]
                return True
        return False

    def clear(self) -> None:
        if self._blocks:
            self.pages.drop(distinct(np.stack(list(self._blocks.values()))))
        self._blocks.clear()

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _chain(tokens: Rows, depth: object) -> Iterator[bytes]:
    key = repr(depth).encode()
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hashlib.blake2b(key + tokens[start : start + BLOCK].tobytes(), digest_size=16).digest()
        yield key
