"""Columns of tokens, tables of rows, and which tokens attend together."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ritornello.config import ModelConfig
from ritornello.engine.pages import NONE, FullError, Layout, Pages, Tables
from ritornello.engine.tick import ALIKE, SPARE, planned
from ritornello.engine.tokens import NOBODY, Part, Tokens


def tables(n_rows: int = 60, **changes: object) -> Tables:
    config = ModelConfig(dim=8, n_prelude_layers=1, n_recurrent_layers=1, n_coda_layers=1, n_loops=3, **changes)  # type: ignore
    return Tables(Layout(config, n_loops=3), Pages(n_rows, 4, dtype=torch.float32, device=torch.device("cpu")))


def of(*parts: tuple[int, list[int], int]) -> Tokens:
    """Slot, places and loop of each."""
    made = Tokens.made([Part(slot, np.array(places)) for slot, places, _ in parts], np.zeros(0, np.int64))
    loops = np.concatenate([np.full(len(places), loop) for _, places, loop in parts])
    return Tokens(made.slot, made.place, made.place, loops, made.depth, made.rule, made.threshold, made.min_loops)


def test_a_token_that_left_has_the_rows_of_its_last_loop() -> None:
    held = tables()
    slot = held.open(5)
    slots, places = np.full(2, slot), np.array([0, 1])
    held.take(held.layout.recurrent, slots, places, np.zeros(2, np.int64))
    held.halt(slots[:1], places[:1], np.zeros(1, np.int64))
    held.take(held.layout.recurrent, slots[1:], places[1:], np.ones(1, np.int64))
    first, second = held.rows[slot, 2:, 0], held.rows[slot, 2:, 1]
    assert len(set(first)) == 1 and NONE not in first
    assert len(set(second[:2])) == 2 and second[2] == NONE and held.pages.n_used == 3
    held.take(held.layout.recurrent, slots, places, np.zeros(2, np.int64))  # they have them
    assert held.pages.n_used == 3
    held.forget(slot, 1)
    assert held.pages.n_used == 1
    held.close(slot)
    assert held.pages.n_used == 0 and held.open(5) == slot


def test_too_few_rows_are_none() -> None:
    held = tables(n_rows=3)
    slots = np.full(4, held.open(4))
    with pytest.raises(FullError):
        held.take(held.layout.recurrent, slots, np.arange(4), np.zeros(4, np.int64))
    assert held.pages.n_used == 0 and (held.rows == NONE).all()


def test_slots_and_places_grow() -> None:
    held = tables()
    slots = [held.open(n) for n in (1, 9, 3, 20, 5, 2, 40)]
    assert len(set(slots)) == 7 and held.rows.shape[2] >= 40 and held.lanes.shape == held.loops.shape
    held.take(held.layout.coda, np.array([slots[-1]]), np.array([39]), np.zeros(1, np.int64))
    assert held.pages.n_used == 1


def test_who_attends_together() -> None:
    """Chunks of like lengths and spans; each token sees its own place and those before."""
    tokens = of((0, [0, 1, 2], 0), (1, [5], 2), (2, [70], 1), (3, [6], 0), (0, [3, 4], 1), (4, [2, 4], 1))
    plans = planned(tokens, torch.device("cpu"), width=SPARE)
    assert sorted(sorted(plan.first.tolist()) for plan in plans) == [[0, 6, 8], [3, 5], [4]]
    seen = {}
    for plan in plans:
        assert plan.mask is not None or plan.tokens.numel() == 1
        for row, (numbers, span) in enumerate(zip(plan.tokens.tolist(), plan.spans, strict=True)):
            for column, number in enumerate(numbers):
                if plan.mask is not None:
                    seen[number] = int(plan.mask[row, 0, column].sum())
                    assert seen[number] <= span
                else:
                    seen[number] = plan.longest
    assert seen == {i: int(place) + 1 for i, place in enumerate(tokens.place)}


def test_few_that_see_less_go_with_those_that_see_more() -> None:
    """As long as what they read for nothing is worth it: what each sees stays its own."""
    tokens = of(*((slot, [place], 0) for slot, place in enumerate((3, 70, 75, 140, 9, 700))))
    few, many = (planned(tokens, torch.device("cpu"), width=width) for width in (SPARE // ALIKE // 4, SPARE))
    assert [plan.first.tolist() for plan in few] == [[0, 1, 2, 3, 4], [5]]
    assert [plan.first.tolist() for plan in many] == [[0, 4], [1, 2], [3], [5]]
    (mask, _) = (plan.mask for plan in few)
    assert mask is not None and mask.sum(-1).flatten().tolist() == [4, 71, 76, 141, 10]


def test_apart_a_plan_depends_on_one_place() -> None:
    tokens = of((0, [0, 1], 0), (1, [70], 2))
    plans = planned(tokens, torch.device("cpu"), width=4, apart=True)
    assert [plan.longest for plan in plans] == [ALIKE, ALIKE, 2 * ALIKE]
    assert [plan.tokens.tolist() for plan in plans] == [[[0]], [[1]], [[2]]]


def test_columns() -> None:
    tokens = Tokens.joined([NOBODY, of((3, [4, 5], 0)), of((1, [0], 2))])
    assert tokens.slot.tolist() == [3, 3, 1] and tokens.loop.tolist() == [0, 0, 2]
    assert tokens.where(tokens.slot == 3).are(of((3, [4, 5], 7))) and not tokens.are(of((3, [4, 5], 0)))
    assert not tokens.are(replace(tokens, lane=tokens.lane[::-1].copy()))  # taken again by others
