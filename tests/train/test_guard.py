"""Steps that are left out."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ritornello import recipes
from ritornello.config import Recipe
from ritornello.model.norm import RMSNorm
from ritornello.train import checkpoint, runs, step
from ritornello.train.guard import IN_A_ROW, WINDOW, Guard, Limits, NonFiniteError, Seen, SpikeError
from tests.train.small import recipe
from tests.train.test_trainer import run, untimed, weights

NAN = float("nan")


def poison(monkeypatch: pytest.MonkeyPatch, steps: Iterable[int], factor: float = NAN) -> None:
    """In these steps every norm's output is multiplied by `factor`."""
    real, chosen = step.accumulate, frozenset(steps)

    def accumulate(model: Any, plan: Any, settings: Any, world: Any) -> Any:
        if plan.key[1] not in chosen:
            return real(model, plan, settings, world)
        spoil = lambda module, inputs, out: out * factor if isinstance(module, RMSNorm) else None  # noqa: E731
        handle = torch.nn.modules.module.register_module_forward_hook(spoil)
        try:
            return real(model, plan, settings, world)
        finally:
            handle.remove()

    monkeypatch.setattr(step, "accumulate", accumulate)


def skipped(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["skipped_steps"]) for line in runs.lines(directory) if "skipped_steps" in line]


def test_steps_that_are_not_finite_change_nothing(tmp_path, monkeypatch, caplog):
    """Two in a row are left out, at any place; what follows is what would follow had they been tried by nobody."""
    given = recipe(tmp_path, steps=9, save_every=1, keep_checkpoints=9)
    poison(monkeypatch, (0, 3, 4, 8))
    out = run(given, tmp_path).parent
    found = [checkpoint.load(out / f"step_{done:06d}") for done in range(1, 10)]
    same = [equal(a.model_state, b.model_state) for a, b in itertools.pairwise(found)]
    assert same == [False, False, True, True, False, False, False, True]
    same = [
        checkpoint.training_state(a)[0].keys() == checkpoint.training_state(b)[0].keys()
        and equal(tensors_of(a), tensors_of(b))
        for a, b in itertools.pairwise(found)
    ]
    assert same == [False, False, True, True, False, False, False, True]
    assert skipped(tmp_path / "run") == [(1, 1), (4, 2), (5, 3), (9, 4)]
    said = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(said) == 4 and said[1].startswith("step 3: ") and "sequences 12, 13, 14, 15" in said[1]


def tensors_of(found: checkpoint.Checkpoint) -> dict[str, Tensor]:
    return {name: x for name, x in checkpoint.training_state(found)[0].items() if isinstance(x, Tensor)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_three_in_a_row_end_the_run_with_their_sequences(tmp_path, monkeypatch):
    given = recipe(tmp_path, steps=20, save_every=5)
    with monkeypatch.context() as patch:
        poison(patch, (7, 8, 9))
        with pytest.raises(NonFiniteError, match=r"step 9: 3 steps in a row .*step 7: .*28, 29, 30, 31; step 8: 32, "):
            run(given, tmp_path)
    assert checkpoint.load(tmp_path / "run").manifest.step == 5
    assert weights(run(given, tmp_path, resume=True)) == weights(run(given, tmp_path, "whole"))


def test_a_resumed_run_counts_on(tmp_path, monkeypatch):
    """What the guard has seen is in the checkpoint: a run restarted for ever doesn't run for ever."""
    poison(monkeypatch, range(8, 99))
    for steps in (9, 10):
        run(recipe(tmp_path, steps=steps, schedule="constant"), tmp_path, resume=True)
    with pytest.raises(NonFiniteError, match=f"{IN_A_ROW} steps in a row"):
        run(recipe(tmp_path, steps=11, schedule="constant"), tmp_path, resume=True)


def spiky(folder: Path, **train: Any) -> Recipe:
    settings = {"skip_spikes": 6.0, "lr": 1e-3, "schedule": "constant", "router_bias_cooldown": 0.0, "steps": 80}
    return recipe(folder, **settings | {"save_every": 73, "eval_every": 80} | train)


def test_a_spike_is_left_out_and_a_resumed_run_leaves_out_the_same(tmp_path, monkeypatch):
    poison(monkeypatch, (70, 75), factor=30.0)
    whole = run(spiky(tmp_path), tmp_path)
    assert skipped(tmp_path / "run") == [(71, 1), (76, 2)]
    run(spiky(tmp_path, steps=73), tmp_path, "cut")
    assert weights(run(spiky(tmp_path), tmp_path, "cut", resume=True)) == weights(whole)
    assert untimed(tmp_path / "cut")[-1] == untimed(tmp_path / "run")[-1]
    assert weights(run(spiky(tmp_path, skip_spikes=0.0), tmp_path, "all")) != weights(whole)
    assert not skipped(tmp_path / "all")


def test_limits_come_from_finite_steps_only():
    guard = Guard(6.0)
    for i in range(WINDOW // 2):
        assert guard.limits() == Limits()
        guard.done(2.0 + i % 2, 1.0)
    limits = guard.limits()
    assert limits.loss == pytest.approx(2.5 + 6 * 0.5) and limits.grad_norm == pytest.approx(1.006)
    with pytest.raises(NonFiniteError) as lost:
        limits.check(3, [1, 2], NAN, 1.0)
    guard.skipped(lost.value)
    assert guard.limits() == limits
    for loss, norm in ((5.6, 1.0), (2.0, 1.1)):
        with pytest.raises(SpikeError, match=r"step 3: (loss|gradient norm) .* a spike; nothing was updated"):
            limits.check(3, [1, 2], loss, norm)
    limits.check(3, [1, 2], 5.4, 1.0)


@pytest.mark.parametrize("values", [(NAN, 1.0), (1.0, math.inf), (1.0, 1.0, (0.0, NAN))])
def test_any_value_that_is_not_finite_counts(values):
    with pytest.raises(NonFiniteError):
        Limits().check(0, [0], *values)


@pytest.mark.parametrize("noise", [0.1, 1e-6, 0.0])
def test_a_lasting_jump_is_soon_no_spike(noise):
    guard, left_out = Guard(6.0), 0
    for i in range(WINDOW):
        guard.done(2.0 + noise * (i % 2), 1.0)
    for _ in range(WINDOW):
        try:
            guard.limits().check(0, [0], 4.0, 1.0)
            guard.done(4.0, 1.0)
        except SpikeError as error:
            guard.skipped(error)
            left_out += 1
    assert 0 < left_out < (20 if noise == 0.1 else 60)  # though it is 39 standard deviations, or many more


@pytest.mark.parametrize("size", [6.0, 1e3, 1e30])
def test_one_spike_of_any_size_leaves_the_guard_awake(size):
    guard = Guard(6.0)
    for i in range(WINDOW):
        guard.done(2.0 + 0.1 * (i % 2), 1.0 + 0.1 * (i % 2))
    for _ in range(2):
        with pytest.raises(SpikeError) as caught:
            guard.limits().check(0, [0], size, size)
        guard.skipped(caught.value)
    with pytest.raises(SpikeError):
        guard.limits().check(0, [0], 3.0, 1.0)


def test_a_long_list_of_sequences_is_cut():
    with pytest.raises(NonFiniteError, match=r"62, 63 and 36 more$"):
        Limits().check(0, list(range(100)), NAN, 1.0)


def test_a_spike_between_does_not_count_as_lost(tmp_path):
    guard = Guard(1.0)
    for step_now, (loss, kind) in enumerate([(NAN, NonFiniteError), (NAN, NonFiniteError), (9.0, SpikeError)] * 2):
        with pytest.raises(kind) as caught:
            Limits(loss=1.0).check(step_now, [0], loss, 1.0)
        guard.skipped(caught.value)
    assert guard.n_skipped == 6 and not guard.lost
    twin = Guard(1.0)
    twin.restore(recipes.validated(Seen, guard.state()))
    assert twin == guard
