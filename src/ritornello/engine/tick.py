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
SPARE = 1 << 17  # numbers: to read so many for nothing costs what attending once more does


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


def planned(
    tokens: Tokens, device: torch.device, *, width: int, prefix: Rows | None = None, apart: bool = False
) -> list[Plan]:
    """Chunks of about equal length and span together. width: of an entry. prefix (slot,): how many tokens there see
    each other, both ways. apart: each token by itself, over a span that depends on nothing but its own place."""
    seen = tokens.place + 1 if prefix is None else np.maximum(tokens.place + 1, prefix[tokens.slot])
    ends_here = np.ones(len(tokens), np.bool_)
    if not apart:
        ends_here[:-1] = (tokens.slot[1:] != tokens.slot[:-1]) | (tokens.loop[1:] != tokens.loop[:-1])
    ends = np.flatnonzero(ends_here) + 1
    sizes = np.diff(ends, prepend=0)
    starts, spans = ends - sizes, seen[ends - 1]
    which = np.arange(len(tokens))
    if not apart:
        reach, single = -(-spans // ALIKE), sizes == 1
        reach[single] = _joined(reach[single], width * ALIKE)
        alike = reach * len(tokens) + np.where(single, 0, -(-sizes // CHUNKS))
        _, which = np.unique(alike, return_inverse=True)
    groups = [np.flatnonzero(which == i) for i in range(int(which.max()) + 1)]
    return [_plan(seen, starts[some], sizes[some], spans[some], apart, device) for some in groups]


def _joined(reach: Rows, size: int) -> Rows:
    """How far single tokens see, in steps of `size` numbers: few that see less go with those that see more."""
    found, highest = reach.copy(), None
    for each, n in reversed(list(zip(*np.unique(reach, return_counts=True), strict=True))):
        if highest is None or (highest - each) * n * size > SPARE:
            highest = each
        found[reach == each] = highest
    return found


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
    """The keys and values of one pass of `layers`, all of the loop or all outside, over tokens side by side: (1, N, W).
    Rows of all these layers are looked up at once, and sent to the device at once."""

    def __init__(self, tables: Tables, tokens: Tokens, plans: list[Plan], layers: list[int]) -> None:
        self.entries, self.plans = tables.pages.entries, plans
        self._numbers = {layer: i for i, layer in enumerate(layers)}
        kinds, device = tables.layout.kinds(layers, tokens.loop), self.entries.device
        rows, self._own = tables.rows[tokens.slot, kinds, tokens.place], None
        if tables.layout.shares_first and layers == tables.layout.recurrent and tokens.loop.any():
            own = tokens.loop == 0  # the entries of others stay
            rows, self._own = rows[:, own], to_device(own, device)
        self._written = to_device(rows, device)  # (L, N)
        found = ((tables.rows[tokens.slot[plan.first], kinds[:, plan.first], : plan.longest], plan) for plan in plans)
        self._read = [to_device(_within(rows, plan), device) for rows, plan in found]  # (L, g, S)

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Ragged:
        i, entries = self._numbers[layer], self.entries
        entry = entry if self._own is None else entry[:, self._own]
        entries.index_copy_(0, self._written[i], entry[0].to(entries.dtype))
        groups = []
        for plan, read in zip(self.plans, self._read, strict=True):
            seen = entries.index_select(0, read[i].flatten()).view(*read.shape[1:], -1)
            groups.append(Group(plan.tokens, seen, plan.mask, plan.is_row))
        return Ragged(groups)


def _within(rows: Rows, plan: Plan) -> Rows:
    """rows (L, g, S); where a span is shorter, one of its own that the mask hides: no number is hidden so well that NaN
    of another sequence would not come through."""
    if rows.shape[-1] < plan.longest:  # the table is no wider
        rows = np.pad(rows, ((0, 0), (0, 0), (0, plan.longest - rows.shape[-1])))
    if (plan.spans < plan.longest).any():
        np.copyto(rows, rows[..., :1], where=np.arange(plan.longest) >= plan.spans[:, None])
    return rows


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
