"""The fit on curves that are known, every outcome of the rules on made-up rows, and the whole experiment, tiny."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch

from ritornello.lab import arms, cell, measure
from ritornello.lab.experiments import EXPERIMENTS, test_time_depth
from ritornello.lab.experiments.test_time_depth import LOOPS, MODELS, DepthAtTest
from ritornello.lab.measure import Questions, Row, nats, pick_rows, problems
from ritornello.lab.saturation import fit
from ritornello.lab.tasks import TASKS
from ritornello.train.data import NO_LABEL
from tests.lab.small_text import install, shrunk

EXPERIMENT = DepthAtTest()
Curve = Callable[[int], float]


@pytest.mark.parametrize(("floor", "height", "rate"), [(2.0, 0.5, 0.7), (0.0, 3.0, 0.05), (1.0, -0.4, 1.5)])
def test_the_fit_finds_what_made_the_curve(floor: float, height: float, rate: float) -> None:
    loops = (1, 2, 3, 4, 6, 8)
    found = fit(loops, [floor + height * exp(-rate * at) for at in loops])
    assert (found.floor, found.height, found.rate) == pytest.approx((floor, height, rate), rel=1e-3, abs=1e-3)
    assert found.r2 == pytest.approx(1)
    assert found.left(found.loops_until(0.01)) == pytest.approx(0.01)


def test_what_is_no_exponential_fits_worse() -> None:
    loops = tuple(range(1, 11))
    assert fit(loops, [float(at < 6) for at in loops]).r2 < 0.9
    noise = np.random.default_rng(0).normal(size=10)
    assert fit(loops, noise.tolist()).r2 < 0.7
    assert fit(loops, [1.0] * 10).r2 == 0.0  # nothing varies, nothing is explained


def settles(at: int) -> float:
    return 2 + 0.5 * exp(-at)


def turns(at: int) -> float:
    return settles(at) + 0.01 * max(0, at - 8)


def late(at: int) -> float:
    """Falls by as much with every loop, far beyond training."""
    return 3 - 0.02 * at


def by_power(at: int) -> float:
    return 2 + 0.5 / at


def flat(at: int) -> float:
    return 2 + 1e-4 * (at % 2)


def step(at: int) -> float:
    return float(at < 6)


def rows(curves: Mapping[str, Curve], seeds: int = 3) -> list[Row]:
    made: list[Row] = []
    for task, models in MODELS.items():
        for model in [model for model in models if model in curves]:
            for seed in range(seeds):
                base = {"task": task, "model": model, "seed": seed, "total": 1, "metric": "loss"}
                made += [base | {"loops": at, "value": curves[model](at) + 0.001 * seed} for at in LOOPS[task]]
    return made


def outcomes(curves: Mapping[str, Curve], claim: str, seeds: int = 3) -> list[str]:
    return [verdict.outcome for verdict in EXPERIMENT.judge(rows(curves, seeds)) if claim in verdict.claim]


@pytest.mark.parametrize(
    ("curve", "exponential", "settled", "stays"),
    [
        (settles, "holds", "holds", "holds"),
        (turns, "holds", "holds", "does not hold"),
        (late, "does not hold", "does not hold", "holds"),
        (by_power, "does not hold", "does not hold", "holds"),
        (flat, "does not hold", "inconclusive", "holds"),
    ],
)
def test_judges_one_model_by_its_rules(curve: Curve, exponential: str, settled: str, stays: str) -> None:
    claims = ("exponentially", "settled by 8 loops", "32 loops are no worse")
    assert [outcomes({"rdt": curve}, claim) for claim in claims] == [[exponential], [settled], [stays]]
    assert [outcomes({"rdt": curve}, claim, seeds=2) for claim in claims] == [["inconclusive"]] * 3


def test_a_step_is_no_exponential() -> None:
    assert outcomes({"dense": step}, "exponentially") == ["does not hold"]


def test_judges_two_models_by_its_rule() -> None:
    claim = "turns more than"
    assert outcomes({"rdt": settles, "fixed": turns}, claim) == ["holds"]
    assert outcomes({"rdt": settles, "fixed": settles}, claim) == ["does not hold"]
    assert outcomes({"rdt": turns, "fixed": settles}, claim) == ["does not hold"]
    assert outcomes({"dense": settles, "fixed-depth": turns, "short-training": settles}, claim) == [
        "holds",
        "does not hold",
    ]
    assert outcomes({"rdt": settles, "fixed": turns}, claim, seeds=2) == ["inconclusive"]


def test_nats_are_those_of_the_logits() -> None:
    sizes = {"n_nodes": 8, "n_chains": 2}
    made = arms.cell("dense", TASKS["chains"], seed=0, masked=True)
    task = replace(made, task_sizes=tuple(sizes.items())).build_task()
    model = cell.build(replace(made, model=replace(made.model, vocab_size=task.vocab_size))).eval()
    batch = problems(task, 3, told=False, n=16)
    found = nats(model, Questions({3: batch}), (2, 5))
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens), n_loops=5).logits
    labels = torch.from_numpy(batch.labels)
    expected = torch.nn.functional.cross_entropy(logits[labels != NO_LABEL], labels[labels != NO_LABEL])
    assert found[5][3] == pytest.approx(expected.item(), rel=1e-5)
    assert found[2][3] != pytest.approx(found[5][3], rel=1e-5)  # control


def test_models_are_those_of_its_sisters() -> None:
    ours = {cell.name for cell in EXPERIMENT.cells("full")}
    theirs = {
        cell.name
        for name in ("depth-extrapolation", "parameter-efficiency")
        for cell in EXPERIMENTS[name].cells("full")
    }
    assert ours < theirs


def short(one: cell.Cell) -> cell.Cell:
    if one.task == "text":
        return shrunk(one)
    return replace(one, train=replace(one.train, steps=2, batch_size=2, warmup_steps=0))


def test_any_part_of_a_run_can_be_judged_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    monkeypatch.setattr(test_time_depth, "N_QUESTIONS", 2)
    monkeypatch.setattr(measure, "N_QUESTIONS", 2)
    cells = [short(one) for one in EXPERIMENT.cells("full") if one.seed == 0]
    parts: Sequence[list[Row]] = [EXPERIMENT.run(one, tmp_path) for one in cells]
    for n in range(1, len(parts) + 1):
        found = [row for part in parts[:n] for row in part]
        assert {verdict.outcome for verdict in EXPERIMENT.judge(found)} == {"inconclusive"}
        if n in (1, 5):
            assert all(EXPERIMENT.show(found))
    every = [row for part in parts for row in part]
    assert len(pick_rows(every, metric="untrained loss")) == len(pick_rows(every, metric="loss"))
    (one,), (other,) = (pick_rows(every, model="dense", loops=8, metric=name) for name in ("loss", "untrained loss"))
    assert one["value"] != other["value"]
