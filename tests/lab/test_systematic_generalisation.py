"""Walks of known, mixed and new facts: what is measured of a model, and what follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ritornello.accounting import count_parameters
from ritornello.lab import measure
from ritornello.lab.cell import Trained, build, training_flops
from ritornello.lab.experiments import systematic_generalisation as sg
from ritornello.lab.experiments.systematic_generalisation import EVERY, HOPS, KINDS, LOOPS, SystematicGeneralisation
from ritornello.lab.measure import Questions, Row, pick_rows
from ritornello.lab.tasks.walks import Walks
from ritornello.train.data import NO_LABEL

EXPERIMENT = SystematicGeneralisation()
NOTHING: dict[str, Any] = {"steps": 0, "seconds": 0.0, "flops": 0.0, "peak_bytes": 0, "loss": None}


def made_up(
    known: dict[str, float], new: dict[str, float], *, harm: float = 0.0, single: float = 1.0, first: int = LOOPS[-1]
) -> list[Row]:
    """Rows of 3 seeds: accuracy on known facts, on walks that hold new ones, `single` on new ones alone; `harm` is
    lost from `first` loops on."""
    rows: list[Row] = []
    for arm in known:
        for seed, kind, hops in ((s, k, h) for s in range(3) for k in KINDS for h in HOPS):
            value = known[arm] if kind == "in" else single if hops == 1 else new[arm] + 0.001 * seed
            base = {"task": "walks", "model": arm, "seed": seed, "total": 1, "kind": kind, "hops": hops}
            for loops in (0,) if arm.startswith("plain") else LOOPS:
                lost = harm if loops >= first else 0.0
                rows.append(base | {"metric": "accuracy", "loops": loops, "value": value - lost})
    return rows


SOLVED = dict.fromkeys(EVERY, 1.0)
APART = {"tied": 0.2, "anchored": 0.95, "plain-tied-5x32": 0.01, "plain-tied-depth": 0.02}


def outcomes(claim: str, *args: Any, **options: Any) -> set[str]:
    found = [verdict.outcome for verdict in EXPERIMENT.judge(made_up(*args, **options)) if claim in verdict.claim]
    assert found
    return set(found)


def test_it_judges_by_its_rules() -> None:
    better = "anchored: better than plain, equal depth, tied at 2 hops of new facts"
    reaches, harmless = "anchored: 0.9 on 2 hops", "anchored: 24 loops"
    for claim in (better, reaches, harmless, "has not seen"):
        assert outcomes(claim, SOLVED, APART) == {"holds"}
    assert outcomes("model, tied: 0.9 on 2 hops", SOLVED, APART) == {"does not hold"}
    assert outcomes("better than smallest looped model, tied at", SOLVED, APART) == {"holds"}
    assert outcomes("better than smallest looped model, tied at", SOLVED, APART | {"tied": 0.95}) == {"does not hold"}
    assert outcomes(better, SOLVED, APART | {"plain-tied-depth": 0.93}) == {"does not hold"}
    assert outcomes(better, SOLVED | {"plain-tied-depth": 0.8}, APART) == {"inconclusive"}
    assert outcomes("depth, tied: answers walks", SOLVED | {"plain-tied-depth": 0.8}, APART) == {"does not hold"}
    assert outcomes(reaches, SOLVED, APART | {"anchored": 0.85}) == {"does not hold"}
    assert outcomes(reaches, SOLVED, APART, single=0.8) == {"inconclusive"}  # what would it combine?
    assert outcomes(harmless, SOLVED, APART, harm=0.1) == {"does not hold"}
    assert outcomes(harmless, SOLVED, APART, harm=0.5, first=6) == {"does not hold"}  # at training's most loops already
    assert outcomes("model, tied: 24 loops", SOLVED, APART, harm=0.1) == {"inconclusive"}  # little to lose
    two_seeds = [row for row in made_up(SOLVED, APART) if row["seed"] < 2]
    assert {verdict.outcome for verdict in EXPERIMENT.judge(two_seeds)} == {"inconclusive"}


def test_arms_differ_in_what_their_names_say() -> None:
    cells = {cell.arm: cell for cell in EXPERIMENT.cells("full") if cell.seed == 0}
    tied, anchored, depth = (cells[arm] for arm in ("tied", "anchored", "plain-tied-depth"))
    assert replace(tied, arm="anchored", model=replace(tied.model, anchored=True)) == anchored
    assert depth.model.n_layers == anchored.train.max_loops and depth.model.dim == tied.model.dim
    sizes = {arm: count_parameters(cell.model)["total"] for arm, cell in cells.items()}
    assert sizes["plain-tied-5x32"] == pytest.approx(sizes["tied"], rel=0.02)
    spent = {arm: c.train.steps * training_flops(c, seq_len=10, loops=c.train.mean_loops) for arm, c in cells.items()}
    assert spent["plain-tied-depth"] == pytest.approx(sg.TIMES * spent["anchored"], rel=0.01)
    assert cells["plain-tied-5x32"].train.steps == sg.MOST * tied.train.steps  # else it would take more FLOPs
    assert len({cell.train.batch_size for cell in cells.values()}) == 1


def test_a_cell_is_measured_on_every_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "N_QUESTIONS", 8)
    monkeypatch.setattr(sg, "HOPS", (1, 2, 3, 4, 5))
    monkeypatch.setattr(sg, "LOOPS", (*range(1, 9), 24))
    rows, run = [], ("anchored", "plain-tied-depth")
    for arm in run:
        (cell,) = [cell for cell in EXPERIMENT.cells("full") if cell.arm == arm and cell.seed == 0]
        short = replace(cell, train=replace(cell.train, steps=2, batch_size=2, warmup_steps=0))
        rows += EXPERIMENT.run(short, tmp_path)
    for kind in KINDS:
        looped = pick_rows(rows, model="anchored", kind=kind, metric="accuracy")
        assert [(row["loops"], row["hops"]) for row in looped] == [(n, k) for n in sg.LOOPS for k in sg.HOPS]
        assert len(pick_rows(rows, kind=kind, metric="another_answer")) == len(run)
    assert len(pick_rows(rows, model="plain-tied-depth", metric="accuracy")) == len(KINDS) * 5
    assert {verdict.outcome for verdict in EXPERIMENT.judge(rows)} == {"inconclusive"}
    tables, pictures = EXPERIMENT.show(rows)
    assert len(tables) == 3 and len({picture.name for picture in pictures}) == 4


def test_the_control_asks_for_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is always right, the control finds about as much as guessing would get."""
    task = Walks(kind="out")

    def oracle(_: Any, questions: Questions, loops: tuple[int]) -> dict[int, dict[int, float]]:
        (batch,) = questions.asked.values()
        asked, right = batch.labels != NO_LABEL, task.solve(batch.tokens, np.full(len(batch.tokens), 5))
        return {loops[0]: {sg.PAIR: float((right == batch.labels)[asked].mean())}}

    monkeypatch.setattr(sg, "accuracy", oracle)
    found = Trained(cell=EXPERIMENT.cells("quick")[0], model=build(EXPERIMENT.cells("quick")[0]), **NOTHING)
    assert sg.another_answer(found, task) < 0.12
    assert oracle(None, Questions.of(found.model, task, (sg.PAIR,)), (8,)) == {8: {sg.PAIR: 1.0}}  # positive control
