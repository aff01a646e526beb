"""One pass of some layers over tokens of many sequences at once: where their entries go, and what each attends to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ritornello.engine.pages import Pages, Rows, Table
from ritornello.model.cache import KeyValues
from ritornello.model.context import Loop
from ritornello.ops.ragged import Group, Ragged
from ritornello.ops.subset import Subset

ALIKE = 64  # single tokens whose spans round up to the same multiple of this are attended together


@dataclass(frozen=True)
class Segment:
    """Tokens of one sequence that run together, at one loop. places (t,): theirs in the sequence, ascending."""

    table: Table
    places: Rows
    loop: int = 0

    @property
    def span(self) -> int:
        """How many tokens of the sequence the last of these sees."""
        return int(self.places[-1]) + 1


@dataclass(frozen=True)
class Plan:
    """Tokens that attend together: their places (g, t) in the row; members: for each of the g the number of its segment
    and how many entries it may see; the longest span of these; the mask. It holds as long as these segments run side
    by side, whatever their loops."""

    tokens: Tensor
    members: list[tuple[int, int]]
    span: int
    mask: Tensor | None


def planned(segments: Sequence[Segment], device: torch.device, *, apart: bool = False) -> list[Plan]:
    """Single tokens of about equal spans together, other segments one by one. apart: each token by itself, over a span
    that depends on nothing but its own place."""
    ends = np.cumsum([len(s.places) for s in segments])
    singles: dict[int, list[tuple[int, int, int]]] = {}  # place in the row, segment, span
    plans = []
    for i, (segment, end) in enumerate(zip(segments, ends, strict=True)):
        n, span = len(segment.places), segment.span
        first = int(end) - n
        if n == 1:
            singles.setdefault(-(-span // ALIKE), []).append((first, i, span))
        elif apart and span > 1:
            plans += [_side_by_side([(first + k, i, int(p) + 1)], apart, device) for k, p in enumerate(segment.places)]
        else:
            mask = to_device(np.arange(span) <= segment.places[:, None], device)[None, None] if n != span else None
            plans.append(Plan(torch.arange(first, first + n, device=device)[None], [(i, span)], span, mask))
    for alike in singles.values():
        plans += [_side_by_side(some, apart, device) for some in ([[each] for each in alike] if apart else [alike])]
    return plans


def _side_by_side(some: list[tuple[int, int, int]], apart: bool, device: torch.device) -> Plan:
    """Single tokens: place in the row, segment and span of each."""
    spans = np.array([span for _, _, span in some])
    longest = -(-int(spans.max()) // ALIKE) * ALIKE if apart else int(spans.max())
    seen = np.arange(longest) < spans[:, None]
    mask = None if seen.all() and not apart else to_device(seen, device)[:, None, None]
    tokens = to_device(np.array([[place] for place, _, _ in some]), device)
    return Plan(tokens, [(i, span) for _, i, span in some], longest, mask)


class Tick(KeyValues):
    """The keys and values of one pass over segments laid side by side: (1, N, W)."""

    def __init__(self, pages: Pages, segments: Sequence[Segment], plans: Sequence[Plan]) -> None:
        self.pages, self.segments, self.plans = pages, segments, plans
        own = [s.loop == 0 or not s.table.layout.shares_first for s in segments]
        self.writes = np.repeat(own, [len(s.places) for s in segments])  # whose entries are those of this loop

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Subset | None) -> Ragged:
        entries, device = self.pages.entries, self.pages.entries.device
        rows = np.concatenate([s.table.rows[s.table.layout.kind(layer, s.loop), s.places] for s in self.segments])
        if not self.writes.all() and layer in self.segments[0].table.layout.recurrent:
            rows, entry = rows[self.writes], entry[:, to_device(self.writes, device)]
        entries.index_copy_(0, to_device(rows, device), entry[0].to(entries.dtype))
        found = [(plan, to_device(self._read(layer, plan), device)) for plan in self.plans]
        return Ragged([Group(plan.tokens, entries[read], plan.mask) for plan, read in found])

    def _read(self, layer: int, plan: Plan) -> Rows:
        """(g, S); where a span is shorter, one of its own that the mask hides: no number is hidden so well that NaN of
        another sequence would not come through."""
        rows = np.empty((len(plan.members), plan.span), np.int64)
        for row, (i, span) in zip(rows, plan.members, strict=True):
            segment = self.segments[i]
            row[:span] = segment.table.read(layer, segment.loop, span)
            row[span:] = row[0]
        return rows


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
