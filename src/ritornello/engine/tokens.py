"""Tokens on their way through the loop, as columns: a tick handles all of them at once."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from ritornello.engine.pages import Rows


class Part(NamedTuple):
    """Tokens of one sequence: its slot, their places, how many loops they may take, the kind of its exit rule, its
    threshold and least loops."""

    slot: int
    places: Rows
    depth: Rows | int = 0
    rule: tuple[int, float, int] = (-1, 0.0, 1)


@dataclass(frozen=True)
class Tokens:
    """By token: the slot of its sequence and its place in it, its lane, the loop that is next, how many loops it may
    take; the number of its exit rule's kind (-1: none), its threshold and least loops."""

    slot: Rows
    place: Rows
    lane: Rows
    loop: Rows
    depth: Rows
    rule: Rows
    threshold: np.ndarray
    min_loops: Rows

    @staticmethod
    def made(parts: list[Part], lanes: Rows) -> "Tokens":
        """Of several sequences, before loop 0."""
        sizes = [len(part.places) for part in parts]
        slot, rule, threshold, least = (
            np.repeat(np.array(column), sizes) for column in zip(*((p.slot, *p.rule) for p in parts), strict=True)
        )
        place = np.concatenate([part.places for part in parts])
        depth = np.concatenate([np.broadcast_to(part.depth, size) for part, size in zip(parts, sizes, strict=True)])
        return Tokens(slot, place, lanes, np.zeros_like(place), depth, rule, threshold, least)

    @staticmethod
    def of_coda(slot: Rows, place: Rows, lane: Rows) -> "Tokens":
        """Beyond the loop: nothing else matters there."""
        zero = np.zeros_like(slot)
        return Tokens(slot, place, lane, zero, zero, zero, zero, zero)

    def __len__(self) -> int:
        return len(self.slot)

    def where(self, chosen: Any) -> "Tokens":
        """Some of them, by mask or by number."""
        return Tokens(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def joined(parts: list["Tokens"]) -> "Tokens":
        if len(parts) == 1:
            return parts[0]
        return Tokens(*(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Tokens)))

    def are(self, others: "Tokens") -> bool:
        """Whether these are the same tokens in the same order, whatever their loops: slots and places are taken again,
        by other sequences with other lanes."""
        return all(np.array_equal(getattr(self, name), getattr(others, name)) for name in ("lane", "slot", "place"))


NO = np.zeros(0, np.int64)
NOBODY = Tokens(NO, NO, NO, NO, NO, NO, np.zeros(0), NO)
