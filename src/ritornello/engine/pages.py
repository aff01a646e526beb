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
        self.free_all()

    def free_all(self) -> None:
        """Nobody holds anything any more."""
        n_rows = len(self.entries)
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
        self.n_kinds = self.n_once + len(self.recurrent) * n_loops
        self._first = np.zeros(config.n_layers, np.int64)  # kind of each layer
        self._first[self.prelude + self.coda] = np.arange(self.n_once)
        self._first[self.recurrent] = np.arange(self.n_once, self.n_kinds, n_loops)

    def kinds(self, layers: list[int], loops: Rows) -> Rows:
        """(L, n): the kinds of row that L layers, all of the loop or none, read and write in these loops (n,)."""
        return self._first[layers][:, None] + (loops if layers == self.recurrent else np.zeros_like(loops))

    def most_rows(self, n_tokens: int) -> int:
        """That so many tokens can hold at once."""
        each = 1 if self.shares_first else self.n_loops
        return n_tokens * (self.n_once + len(self.recurrent) * each)


class Tables:
    """What the sequences under way hold, each in a slot of its own: rows (slot, kind, place), NONE where there is none
    yet. A token that has left the loop has the row of its last loop for all deeper ones. lanes (slot, place): of tokens
    that wait for the coda, NONE of others; loops (slot, place): that tokens took; prefix (slot,): how many see each
    other, both ways."""

    def __init__(self, layout: Layout, pages: Pages) -> None:
        self.layout, self.pages = layout, pages
        self.rows = np.full((0, layout.n_kinds, 0), NONE, np.int64)
        self.lanes = np.full((0, 0), NONE, np.int64)
        self.loops = np.zeros((0, 0), np.int64)
        self.prefix = np.zeros(0, np.int64)
        self._free: list[int] = []

    def open(self, n_places: int, prefix: int = 0) -> int:
        """A slot for a sequence of so many tokens, of which the first `prefix` see each other."""
        n_slots, _, width = self.rows.shape
        more = 0 if self._free else max(4, n_slots)
        wider = max(n_places, 2 * width) - width if n_places > width else 0
        if more or wider:
            self.rows = np.pad(self.rows, ((0, more), (0, 0), (0, wider)), constant_values=NONE)
            self.lanes = np.pad(self.lanes, ((0, more), (0, wider)), constant_values=NONE)
            self.loops = np.pad(self.loops, ((0, more), (0, wider)))
            self.prefix = np.pad(self.prefix, (0, more))
            self._free += range(n_slots + more - 1, n_slots - 1, -1)
        slot = self._free.pop()
        self.prefix[slot] = prefix
        return slot

    def close(self, slot: int) -> None:
        """Nothing is held there any more."""
        self.forget(slot, 0)
        self.lanes[slot] = NONE
        self._free.append(slot)

    def forget(self, slot: int, first: int) -> None:
        """Hold nothing from this place on."""
        rows = self.rows[slot, :, first:]
        self.pages.drop(distinct(rows))
        rows.fill(NONE)

    def take(self, layers: list[int], slots: Rows, places: Rows, loops: Rows) -> None:
        """Give those of these tokens that have none yet a row in each layer for their loop. Raises FullError, having
        taken none."""
        if not layers:
            return
        kinds = self.layout.kinds(layers, loops)
        if layers == self.layout.recurrent and self.layout.shares_first:
            later = loops > 0
            at = slots[later], kinds[:, later], places[later]
            self.rows[at] = self.rows[at[0], at[1] - 1, at[2]]
        lacking = self.rows[slots, kinds[0], places] == NONE
        if not lacking.all():
            slots, places, kinds = slots[lacking], places[lacking], kinds[:, lacking]
        self.rows[slots, kinds, places] = self.pages.take(kinds.size).reshape(kinds.shape)

    def halt(self, slots: Rows, places: Rows, loops: Rows) -> None:
        """Their last loop was this one: deeper ones read its rows."""
        which, deeper = (np.arange(self.layout.n_loops) > loops[:, None]).nonzero()
        slots, places, loops = slots[which], places[which], loops[which]
        last, ahead = (self.layout.kinds(self.layout.recurrent, each) for each in (loops, deeper))
        self.rows[slots, ahead, places] = self.rows[slots, last, places]


def distinct(rows: Rows) -> Rows:
    """Those held in a table (..., kinds, places): who left the loop early repeats the row of its last loop."""
    held = rows != NONE
    held[..., 1:, :] &= rows[..., 1:, :] != rows[..., :-1, :]
    return rows[held]
