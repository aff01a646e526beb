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
    """Segments that attend together, by number: tokens (g, t) in the row, the longest span, the mask of what they see.
    It holds as long as these segments run side by side, whatever their loops."""

    members: list[int]
    tokens: Tensor
    span: int
    mask: Tensor | None


def planned(segments: Sequence[Segment], device: torch.device) -> list[Plan]:
    """Single tokens of about equal spans together, other segments one by one."""
    ends = np.cumsum([len(s.places) for s in segments])
    singles: dict[int, list[int]] = {}
    plans = []
    for i, (segment, end) in enumerate(zip(segments, ends, strict=True)):
        n, span = len(segment.places), segment.span
        if n == 1:
            singles.setdefault(-(-span // ALIKE), []).append(i)
            continue
        mask = to_device(np.arange(span) <= segment.places[:, None], device)[None, None] if n < span else None
        plans.append(Plan([i], torch.arange(end - n, end, device=device)[None], span, mask))
    for members in singles.values():
        spans = np.array([segments[i].span for i in members])
        longest = int(spans.max())
        seen = np.arange(longest) < spans[:, None]
        mask = None if seen.all() else to_device(seen, device)[:, None, None]
        plans.append(Plan(members, to_device(ends[members, None] - 1, device), longest, mask))
    return plans


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
        for row, i in zip(rows, plan.members, strict=True):
            segment = self.segments[i]
            row[: segment.span] = segment.table.read(layer, segment.loop, segment.span)
            row[segment.span :] = row[0]
        return rows


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
