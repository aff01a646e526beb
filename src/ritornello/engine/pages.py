"""Keys and values of many sequences in one pool of rows: a token holds a row for each layer and loop it has run.

A page is one row, the entry of one token in one layer at one loop, so an exit at loop 4 holds 4 rows of a recurrent
layer and not 16. Which row is where stays on the host; only entries are on the device.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ritornello.config import ModelConfig

Rows = NDArray[np.int64]
NONE = -1


class FullError(RuntimeError):
    """No row is free: somebody has to give some up."""


class Pages:
    """Rows (n, W), counted by holder: one that nobody holds is free."""

    def __init__(self, n_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.entries = torch.zeros(n_rows, width, dtype=dtype, device=device)
        self._holders = np.zeros(n_rows, np.int64)
        self._free = np.arange(n_rows)[::-1].copy()  # a stack, the first n_free of it
        self.n_free = n_rows

    @property
    def n_used(self) -> int:
        return len(self._free) - self.n_free

    def n_held_once(self, rows: Rows) -> int:
        """Of these, which are distinct."""
        return int((self._holders[rows] == 1).sum())

    def take(self, n: int) -> Rows:
        """n free rows, held once.

        Raises:
            FullError: fewer are free; none is taken.
        """
        if n > self.n_free:
            raise FullError(f"{n} rows of keys and values wanted, {self.n_free} free")
        self.n_free -= n
        rows = self._free[self.n_free : self.n_free + n].copy()
        self._holders[rows] = 1
        return rows

    def hold(self, rows: Rows) -> None:
        """One holder more for each of these, which are distinct."""
        self._holders[rows] += 1

    def drop(self, rows: Rows) -> None:
        """One holder less for each of these, which are distinct."""
        self._holders[rows] -= 1
        free = rows[self._holders[rows] == 0]
        self._free[self.n_free : self.n_free + len(free)] = free
        self.n_free += len(free)


class Layout:
    """The kinds of row that a token may hold, by a number: each layer outside the loop has one, each inside one a loop,
    or one for all where the model shares those of loop 0."""

    def __init__(self, config: ModelConfig, *, n_loops: int) -> None:
        self.shares_first = config.kv_sharing == "first"
        self.n_loops = n_loops
        first, last = config.n_prelude_layers, config.n_prelude_layers + config.n_recurrent_layers
        self.prelude, self.coda = list(range(first)), list(range(last, config.n_layers))
        self.recurrent = list(range(first, last))
        self.n_once = len(self.prelude) + len(self.coda)
        self._once = {layer: i for i, layer in enumerate((*self.prelude, *self.coda))}
        self.n_kinds = self.n_once + len(self.recurrent) * n_loops

    def kind(self, layer: int, loop: int) -> int:
        """The kind of row that `layer` reads and writes in this loop."""
        if layer in self._once:
            return self._once[layer]
        return self.n_once + (layer - self.recurrent[0]) * self.n_loops + loop

    def most_rows(self, n_tokens: int) -> int:
        """That so many tokens can hold at once."""
        each = 1 if self.shares_first else self.n_loops
        return n_tokens * (self.n_once + len(self.recurrent) * each)


class Table:
    """The rows of one sequence: (kind, token), NONE where there is none yet. A token that has left the loop has the
    row of its last loop for all deeper ones."""

    def __init__(self, layout: Layout, pages: Pages, n_tokens: int) -> None:
        self.layout, self.pages = layout, pages
        self.rows = np.full((layout.n_kinds, n_tokens), NONE, np.int64)

    def take(self, layers: list[int], loop: int, tokens: Rows) -> None:
        """Give those of these tokens that have none yet a row in each layer for this loop. Raises FullError, having
        taken none."""
        if layers:
            tokens = tokens[self.rows[self.layout.kind(layers[0], loop), tokens] == NONE]
        if loop and layers == self.layout.recurrent and self.layout.shares_first:
            for layer in layers:
                kind = self.layout.kind(layer, loop)
                self.rows[kind, tokens] = self.rows[kind - 1, tokens]
            return
        taken = self.pages.take(len(layers) * len(tokens)).reshape(len(layers), len(tokens))
        for layer, rows in zip(layers, taken, strict=True):
            self.rows[self.layout.kind(layer, loop), tokens] = rows

    def halt(self, loop: int, tokens: Rows) -> None:
        """Their last loop was this one: deeper ones read its rows."""
        for layer in self.layout.recurrent:
            here = self.layout.kind(layer, loop)
            self.rows[here + 1 : self.layout.kind(layer, self.layout.n_loops), tokens] = self.rows[here, tokens]

    def read(self, layer: int, loop: int, n_tokens: int) -> Rows:
        """The rows of the first tokens."""
        return self.rows[self.layout.kind(layer, loop), :n_tokens]

    def forget(self, first: int) -> None:
        """Hold nothing any more from this token on."""
        rows = self.rows[:, first:]
        self.pages.drop(distinct(rows))
        rows.fill(NONE)


def distinct(rows: Rows) -> Rows:
    found = np.unique(rows)
    return found[found != NONE]
