"""Walks, induction, addition, reachability and formulas, each compared with its definition, question by question."""

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest

from ritornello.lab.tasks import Problems, Split, Task
from ritornello.lab.tasks.addition import Addition
from ritornello.lab.tasks.base import Ids, is_test
from ritornello.lab.tasks.formulas import SYMBOLS, Formulas
from ritornello.lab.tasks.induction import Induction
from ritornello.lab.tasks.reachability import Reachability
from ritornello.lab.tasks.walks import START, Walks
from ritornello.train.data import NO_LABEL

every_kind = pytest.mark.parametrize("kind", ["in", "mixed", "out"])
every_split = pytest.mark.parametrize("split", ["train", "test"])


def draw(task: Task, hops: Ids | list[int], *, split: Split = "train", seed: int = 0) -> Problems:
    return task.sample(np.random.default_rng(seed), np.asarray(hops), split=split)


def facts_of(task: Walks, row: Ids) -> list[tuple[int, int]]:
    """(entity, relation) of each step of the walk in `row`, as they are followed."""
    entity, found = int(row[START]), []
    for token in row[START + 1 :]:
        if token < task.n_entities + task.n_relations:
            found.append((entity, int(token) - task.n_entities))
            entity = int(task.facts[found[-1]])
    return found


def test_a_fifth_of_every_entitys_facts_is_new() -> None:
    task = Walks()
    assert task.is_new.sum(axis=1).tolist() == [2] * 32
    assert np.sort(task.facts, axis=0).T.tolist() == [list(range(32))] * 10  # relations are permutations
    other = Walks(seed=1)
    assert (Walks().facts == task.facts).all() and (Walks().is_new == task.is_new).all()
    assert (other.facts != task.facts).any() and (other.is_new != task.is_new).any()


@every_kind
def test_training_walks_hold_known_facts_only(kind: Literal["in", "mixed", "out"]) -> None:
    task = Walks(kind=kind)
    found = draw(task, [5] * 200)
    assert not any(task.is_new[fact] for row in found.tokens for fact in facts_of(task, row))
    assert found.tokens.tobytes() == draw(Walks(), [5] * 200).tokens.tobytes()  # the same for every kind
    alone = found.tokens[:, :START].reshape(-1, 2) - [0, task.n_entities]
    assert {tuple(fact) for fact in alone.tolist()} == {tuple(fact) for fact in np.argwhere(task.is_new).tolist()}


@every_kind
@pytest.mark.parametrize("hops", [2, 3, 5, 8])
def test_test_walks_are_of_their_kind(kind: Literal["in", "mixed", "out"], hops: int) -> None:
    task = Walks(kind=kind)
    rows = [facts_of(task, row) for row in draw(task, [hops] * 100, split="test").tokens]
    assert {len(row) for row in rows} == {hops}
    new = np.array([[task.is_new[fact] for fact in row] for row in rows])
    assert kind != "in" or not new.any()
    assert kind != "out" or new.all()
    assert kind != "mixed" or (new[:, 0] != new[:, 1]).all()
    assert kind != "mixed" or hops == 2 or 0.3 < new[:, 2:].mean() < 0.7


@every_kind
def test_no_test_walk_is_seen_from_its_second_hop_on(kind: Literal["in", "mixed", "out"]) -> None:
    beginnings = lambda tokens: {tuple(row) for row in tokens[:, START : START + 3].tolist()}  # noqa: E731
    train, again = (beginnings(draw(Walks(), [5] * 3000, seed=seed).tokens) for seed in (0, 1))
    test = beginnings(draw(Walks(kind=kind), [4] * 300, split="test").tokens)
    assert len(test) > 30 and not test & train
    assert again & train  # control
    assert len(train) > 0.7 * 7 / 8 * 32 * 8 * 8


@every_split
def test_induction_goes_back_hop_by_hop(split: Split) -> None:
    task = Induction()
    found = draw(task, [1, 2, 3, 7, 24], split=split)
    for tokens, answers, hops in zip(found.tokens, found.answers, (1, 2, 3, 7, 24), strict=True):
        symbols = tokens[:, 0].tolist()
        assert all(x != y for x, y in pairwise(symbols))
        for pos in range(task.length):
            at: int | None = pos
            for _ in range(hops):
                before = [j for j in range(1, at + 1) if symbols[j - 1] == symbols[at]] if at is not None else []
                at = before[-1] if before else None
            assert answers[pos] == (NO_LABEL if at is None else symbols[at])
        assert answers[-1] != NO_LABEL


def test_induction_is_guessed_as_stated() -> None:
    task = Induction()
    found = [round(task.guessing(hops), 2) for hops in (1, 2, 4)]
    assert found == pytest.approx([0.33, 0.50, 0.34], abs=0.02)
    assert all(0.24 < task.guessing(hops) < 0.3 for hops in (3, 5, 8, 20))


@every_split
def test_carries_come_from_as_far_as_stated(split: Split) -> None:
    task = Addition()
    hops = np.repeat([1, 2, 5, 31, 32], 12)
    found = draw(task, hops, split=split)
    for (first, second), answers, needed in zip(
        found.tokens.transpose(0, 2, 1).tolist(), found.answers, found.hops, strict=True
    ):
        carry, since = 0, 0
        for pos, (x, y) in enumerate(zip(first, second, strict=True)):
            since += 1  # places since the last that decides
            assert (answers[pos], needed[pos]) == ((x + y + carry) % 10, since)
            carry, since = int(x + y + carry > 9), since if x + y == 9 else 0
        assert first[-1] == second[-1] == 0
    assert all((found.hops[hops == 5] == k).any() for k in range(1, 6))
    assert found.answers[hops == 32, -1].min() < found.answers[hops == 32, -1].max()  # some carries go all the way


def ways(edges: Ids, source: int, target: int) -> int:
    """Fewest edges from `source` to `target`; −1 if there is no way."""
    joined, here, steps = {tuple(edge) for edge in edges.tolist()}, {source}, 0
    seen = set(here)
    while here:
        if target in here:
            return steps
        here = {child for parent, child in joined if parent in here} - seen
        seen, steps = seen | here, steps + 1
    return -1


@every_split
def test_the_answer_reaches_the_target_and_the_other_source_does_not(split: Split) -> None:
    task = Reachability()
    found = draw(task, [1, 3, 5, 7], split=split)
    for edges, questions, answers, hops in zip(
        found.tokens[:, : task.n_edges],
        found.tokens[:, task.n_edges :],
        found.answers[:, task.n_edges :],
        found.hops[:, task.n_edges :],
        strict=True,
    ):
        either = np.concatenate([edges, edges[:, ::-1]])
        sources = set(answers[hops == 0].tolist())
        assert len(sources) == 2 and sorted(np.bincount(answers)[list(sources)]) == [task.n_side] * 2
        for (_, target), answer, steps in zip(questions.tolist(), answers.tolist(), hops.tolist(), strict=True):
            (other,) = sources - {answer}
            assert (ways(edges, answer, target), ways(edges, other, target)) == (steps, -1)
            assert ways(either, other, target) >= 0  # direction matters


@pytest.mark.parametrize("forwards", [False, True])
def test_frontiers_are_the_nodes_at_each_distance(forwards: bool) -> None:
    task = Reachability(n_side=6)
    found = draw(task, [3, 5])
    marked = task.frontiers(found.tokens, 7, forwards=forwards)
    asked = found.tokens[:, task.n_edges :, 1]
    starts = np.stack([np.unique(row) for row in found.answers[:, task.n_edges :]]) if forwards else asked
    assert marked.shape == (2, 2 if forwards else 12, 8, 14)
    for edges, row, begun in zip(found.tokens[:, : task.n_edges], marked, starts.tolist(), strict=True):
        for place, start in enumerate(begun):
            for node in range(task.n_nodes):
                steps = ways(edges, start, node) if forwards else ways(edges, node, start)
                assert np.flatnonzero(row[place, :, node]).tolist() == ([steps] if steps >= 0 else [])


def value(text: str) -> tuple[int, int, str]:
    """Value and depth of the formula at the beginning of `text`, and what is left after it."""
    if text[0] in "01":
        return int(text[0]), 0, text[1:]
    x, left, rest = value(text[1:])
    y, right, rest = value(rest)
    return {"&": x and y, "|": x or y, "^": int(x != y)}[text[0]], 1 + max(left, right), rest[1:]


@every_split
def test_formulas_are_evaluated_bracket_by_bracket(split: Split) -> None:
    hops = [1, 2, 3, 5, 12]
    found = draw(Formulas(), hops, split=split)
    for row, depth in enumerate(hops):
        text = "".join(SYMBOLS[token] for token in found.tokens[row] if token < len(SYMBOLS))
        assert value(text)[1:] == (depth, "")
        spans = {}
        for start, symbol in enumerate(text):
            if symbol in "&|^":
                result, height, rest = value(text[start:])
                spans[len(text) - len(rest) - 1] = (result, height)
        asked = np.flatnonzero(found.answers[row] != NO_LABEL).tolist()
        assert asked == sorted(spans) == [pos for pos, symbol in enumerate(text) if symbol == ")"]
        assert [(found.answers[row, pos], found.hops[row, pos]) for pos in asked] == [spans[pos] for pos in asked]


def test_formulas_are_true_half_the_time_whatever_their_operator() -> None:
    found = draw(Formulas(), [4] * 600)
    whole = found.answers[found.hops == 4]
    for operator in range(2, 5):
        true = whole[found.tokens[:, 0] == operator]
        assert abs(true.mean() - 0.5) < 2.5 * 0.5 / len(true) ** 0.5


def rounds(text: str) -> tuple[int, int, str]:
    """As `value`, but where an argument decides alone, depth is what it takes to know that one."""
    if text[0] in "01":
        return int(text[0]), 0, text[1:]
    x, left, rest = rounds(text[1:])
    y, right, rest = rounds(rest)
    decides = {"&": 0, "|": 1}.get(text[0])
    alone = [depth for argument, depth in ((x, left), (y, right)) if argument == decides]
    return value(text)[0], 1 + min(alone, default=max(left, right)), rest[1:]


def test_formulas_need_all_their_levels() -> None:
    hops = np.arange(1, 13).repeat(10)
    for row, depth in zip(draw(Formulas(), hops).tokens, hops, strict=True):
        text = "".join(SYMBOLS[token] for token in row if token < len(SYMBOLS))
        assert rounds(text)[1] == depth
    assert rounds("&0&01))")[1] == 1 < value("&0&01))")[1]  # control


def test_formulas_of_every_divided_depth_are_on_both_sides() -> None:
    task = Formulas()
    for depth in range(2, 8):
        side = is_test(task.draw(np.random.default_rng(0), np.full(300, depth)))
        assert 1 / 32 < side.mean() < 1 / 3
