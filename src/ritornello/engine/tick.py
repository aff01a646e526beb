"""One pass of some layers over tokens of many sequences at once: where their entries go, and what each attends to."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ritornello.engine.pages import Rows, Tables
from ritornello.engine.tokens import Tokens
from ritornello.model.cache import KeyValues
from ritornello.model.context import Loop
from ritornello.ops.ragged import Group, Ragged
from ritornello.ops.subset import Subset

ALIKE = 64  # entries: spans that round up to the same multiple of this are attended together
CHUNKS = 16  # tokens: and so are chunks of about as many


@dataclass(frozen=True)
class Plan:
    """Chunks that attend together. A chunk: tokens of one sequence at the same loop, side by side. tokens (g, t): their
    numbers in the row, the last again where a chunk is shorter; spans (g,): how many entries the last of each sees;
    the mask. It holds as long as these tokens run side by side, whatever their loops."""

    tokens: Tensor
    first: Rows  # (g,), the number of a token of each
    spans: Rows
    longest: int
    mask: Tensor | None
    is_row: bool  # see `ops.ragged`


def planned(tokens: Tokens, device: torch.device, *, prefix: Rows | None = None, apart: bool = False) -> list[Plan]:
    """Chunks of about equal length and span together. prefix (slot,): how many tokens there see each other, both ways.
    apart: each token by itself, over a span that depends on nothing but its own place."""
    seen = tokens.place + 1 if prefix is None else np.maximum(tokens.place + 1, prefix[tokens.slot])
    ends_here = np.ones(len(tokens), np.bool_)
    if not apart:
        ends_here[:-1] = (tokens.slot[1:] != tokens.slot[:-1]) | (tokens.loop[1:] != tokens.loop[:-1])
    ends = np.flatnonzero(ends_here) + 1
    sizes = np.diff(ends, prepend=0)
    starts, spans = ends - sizes, seen[ends - 1]
    which = np.arange(len(tokens))
    if not apart:
        alike = -(-spans // ALIKE) * len(tokens) + np.where(sizes == 1, 0, -(-sizes // CHUNKS))
        _, which = np.unique(alike, return_inverse=True)
    groups = [np.flatnonzero(which == i) for i in range(int(which.max()) + 1)]
    return [_plan(seen, starts[some], sizes[some], spans[some], apart, device) for some in groups]


def _plan(counts: Rows, starts: Rows, sizes: Rows, spans: Rows, apart: bool, device: torch.device) -> Plan:
    """counts: how many entries each token sees."""
    longest = int(spans.max())
    longest = -(-longest // ALIKE) * ALIKE if apart else longest
    numbers = starts[:, None] + np.minimum(np.arange(sizes.max()), sizes[:, None] - 1)
    seen = np.arange(longest) < counts[numbers][..., None]
    whole = not apart and (sizes == spans).all() and (spans == longest).all()  # prompts from their first token on
    whole = whole and (counts[starts] == 1).all()  # of which each sees those before it
    mask = None if whole or (numbers.shape[1] == 1 and not apart and seen.all()) else to_device(seen, device)[:, None]
    is_row = numbers.size == len(counts) and np.array_equal(numbers.ravel(), np.arange(len(counts)))
    return Plan(to_device(numbers, device), starts, spans, longest, mask, is_row)


class Tick(KeyValues):
    """The keys and values of one pass over tokens side by side: (1, N, W)."""

    def __init__(self, tables: Tables, tokens: Tokens, plans: list[Plan]) -> None:
        self.tables, self.tokens, self.plans = tables, tokens, plans

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Ragged:
        tables, tokens, entries = self.tables, self.tokens, self.tables.pages.entries
        rows = tables.rows[tokens.slot, tables.layout.kinds(layer, tokens.loop), tokens.place]
        if tables.layout.shares_first and layer in tables.layout.recurrent and tokens.loop.any():
            own = tokens.loop == 0  # the entries of others stay
            rows, entry = rows[own], entry[:, to_device(own, entries.device)]
        entries.index_copy_(0, to_device(rows, entries.device), entry[0].to(entries.dtype))
        found = [(plan, to_device(self._read(layer, plan), entries.device)) for plan in self.plans]
        return Ragged([Group(plan.tokens, entries[read], plan.mask, plan.is_row) for plan, read in found])

    def _read(self, layer: int, plan: Plan) -> Rows:
        """(g, S); where a span is shorter, one of its own that the mask hides: no number is hidden so well that NaN of
        another sequence would not come through."""
        loops = self.tokens.loop[plan.first]
        kinds = self.tables.layout.kinds(layer, loops)
        rows = self.tables.rows[self.tokens.slot[plan.first], kinds, : plan.longest]
        if rows.shape[1] < plan.longest:  # the table is no wider
            rows = np.pad(rows, ((0, 0), (0, plan.longest - rows.shape[1])))
        return np.where(np.arange(plan.longest) < plan.spans[:, None], rows, rows[:, :1])


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
