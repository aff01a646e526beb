"""Probes and patches: on states that hold what they should, on a tiny model, and what an experiment makes of them."""

from typing import Any

import numpy as np
import pytest
import torch

from ritornello.lab import arms, cell, probes
from ritornello.lab.experiments import superposition
from ritornello.lab.experiments.superposition import Searches, Superposition, patched, readings
from ritornello.lab.measure import Row, pick_rows
from ritornello.lab.tasks import build_task

GRAPH = build_task("reachability", {})
CHAINS = build_task("chains", {"n_nodes": 16, "n_chains": 4})


def searches(task: Any, n: int = 24, split: str = "train") -> Searches:
    return Searches.of(task, n, split)


def codes(sets: np.ndarray, *, one: bool = False) -> list[torch.Tensor]:
    """States (B, T, D) in which every node has a direction: questions hold the sum over their set, or over one node of
    it alone."""
    (B, _, N), marks = sets.shape, sets
    if one:
        chosen = np.where(sets, np.random.default_rng(0).random(sets.shape), -1).argmax(axis=2)
        marks = sets & (chosen[..., None] == np.arange(N))
    names = np.random.default_rng(1).normal(size=(N, 64))
    return [torch.from_numpy(np.concatenate([np.zeros((B, 3, 64)), marks @ names], axis=1))]


def test_a_probe_finds_sets_that_are_there_and_only_these() -> None:
    fitted, tested = searches(GRAPH, 96), searches(GRAPH, 48, "test")
    full, single = ([codes(s.sets[:, :, 2], one=one)[0] for s in (fitted, tested)] for one in (False, True))
    noise = [torch.randn_like(x) for x in full]
    whole = {name: value for name, value, _ in readings(fitted, tested, [*full, *noise], 2)}
    assert whole["found"] > 0.98 and whole["found_many"] > 0.98 and whole["whole"] > 0.95
    assert max(whole["untrained"], whole["shuffled"]) < 0.4
    lone = {name: value for name, value, _ in readings(fitted, tested, [*single, *noise], 2)}
    assert lone["found_many"] < lone["one"] + 0.15 < whole["found_many"]


def test_what_one_node_would_find() -> None:
    rng = np.random.default_rng(0)
    sets = np.tile(np.arange(18) < 3, (4000, 1))
    scores = rng.random(sets.shape)
    scores[:, 0] = 2  # one is known
    assert probes.found(scores, sets).mean() == pytest.approx(probes.held_one(sets)[0], abs=0.01)
    assert probes.found(sets.astype(float), sets).mean() == 1.0


@pytest.mark.parametrize("task", [GRAPH, CHAINS])
def test_sets_and_ends_are_those_of_the_problem(task: Any) -> None:
    found = searches(task)
    Q, N = found.sets.shape[1], found.sets.shape[3]
    assert (found.sets[:, :, 0].sum(axis=2) == 1).all() and found.sets[:, :, 1:].any()
    for b in range(4):
        for q in range(Q):
            assert found.ends[b, found.sets[b, q, 0].argmax()] == found.answers[b, q]
            for marks in found.sets[b, q]:
                assert set(found.ends[b, marks]) <= {found.answers[b, q]}  # every way up leads to the answer
    if task is GRAPH:
        assert ((found.ends == -1).sum(axis=1) == 2).all() and (found.sets.sum(axis=3) > 1).any()
    assert task.n_nodes == N


def test_patches_ask_for_an_answer_that_is_not_the_questions_own() -> None:
    found, rng = searches(GRAPH, split="test"), np.random.default_rng(0)
    for b in range(8):
        pair = superposition._pair(found, b, b + 1, 1, rng)
        if pair is None:
            continue
        here, question, giver, expected = pair
        nodes = found.sets[b + 1, giver, 1]
        assert set(found.ends[here, nodes]) == {expected} != {found.answers[here, question]}


def test_a_patch_is_run_in_the_other_problem() -> None:
    """With a loop that leaves states alone, a patched question answers what the giver's state says."""
    made = cell.build(arms.cell("dense", CHAINS, seed=0, masked=True, sizes={"n_nodes": 16, "n_chains": 4}, steps=1))
    found = searches(CHAINS, 12, "test")
    with torch.no_grad():
        for layer in made.recurrent:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        made.injection.forward = lambda h, e: h
        made.norm.weight.fill_(1.0)
        made.head.weight.copy_(torch.eye(64)[:32])
    T, Q = found.tokens.shape[1], found.sets.shape[1]
    states = torch.zeros(12, T, 64)
    states[:, T - Q :, :16] = torch.from_numpy(found.sets[:, :, 1].astype(np.float32))
    values = {name: value for name, value, _ in patched(made.eval(), found, [states] * 5, 1)}
    assert values["stays"] < 1 and values["follows"] < 1  # it names the node, not where it leads
    goal = torch.zeros(12, T, 64)
    pairs = [superposition._pair(found, b, (b + 1) % 12, 1, np.random.default_rng(0)) for b in range(12)]
    assert any(pairs)
    for b in range(12):  # a giver that already holds where its nodes lead, in the problem it goes to
        for q in range(Q):
            nodes = found.sets[b, q, 1]
            if nodes.any():
                goal[b, T - Q + q, int(found.ends[b - 1, nodes][0])] = 1
    assert {name: value for name, value, _ in patched(made, found, [goal] * 5, 1)}["follows"] == 1.0


def test_rows_and_pages_of_a_tiny_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superposition, "FITTED", 16)
    monkeypatch.setattr(superposition, "TESTED", 16)
    experiment, quick = Superposition(), {"steps": 2, "batch_size": 2, "warmup_steps": 0, "model": {"halting": "none"}}
    sizes = (("reachability", {}), ("chains", {"n_nodes": 16, "n_chains": 4}))
    rows = []
    for name, size in sizes:
        made = arms.cell("dense", build_task(name, size), seed=0, masked=True, sizes=size, **quick)
        rows += experiment.measure(cell.train(made))
    assert {verdict.outcome for verdict in experiment.judge(rows)} == {"inconclusive"}
    assert len(experiment.judge(rows)) == 5
    tables, pictures = experiment.show(rows)
    assert len(tables) == 6 and len(pictures) == 2
    assert len(experiment.show(pick_rows(rows, task="chains"))[1]) == 1


def made_up(**values: float) -> list[Row]:
    """Rows of three seeds on graphs."""
    now = {"found": 0.9, "untrained": 0.2, "shuffled": 0.1, "found_many": 0.9, "whole": 0.8, "one": 0.5}
    now |= {"follows": 0.9, "stays": 0.05, "control": 0.2} | values
    rows: list[Row] = []
    for seed in range(3):
        base = {"task": "reachability", "model": "dense", "seed": seed, "total": 1, "n": 10}
        for distance in superposition.DISTANCES:
            here = base | {"hops": distance, "loops": distance}
            rows += [here | {"metric": metric, "value": value - 0.001 * seed} for metric, value in now.items()]
        accuracy = values.get("accuracy", 1.0)
        rows += [base | {"metric": "accuracy", "hops": k, "loops": 8, "value": accuracy} for k in range(1, 6)]
    return rows


def outcomes(rows: list[Row]) -> dict[str, str]:
    rules = {rule: name for name, rule in Superposition.rules.items()}
    return {rules[verdict.rule]: verdict.outcome for verdict in Superposition().judge(rows)}


def test_judges_by_its_rules() -> None:
    assert outcomes(made_up()) == dict.fromkeys(("read", "counts", "many"), "holds")
    assert outcomes(made_up(shuffled=0.88))["read"] == outcomes(made_up(untrained=0.88))["read"] == "does not hold"
    assert outcomes(made_up(found_many=0.52))["many"] == "does not hold"
    assert outcomes(made_up(follows=0.22))["counts"] == "does not hold"
    assert set(outcomes(made_up(accuracy=0.6)).values()) == {"inconclusive"}
    assert set(outcomes([row for row in made_up() if row["seed"]]).values()) == {"inconclusive"}
