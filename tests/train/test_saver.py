"""Checkpoints in the background: what was handed over, whatever happens to it later, and no failure unsaid."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ritornello.config import Recipe
from ritornello.train import checkpoint, files, tensors
from ritornello.train.saver import Saver


def state(step: int) -> dict[str, Any]:
    weight = torch.full((40, 30), float(step))
    return {
        "step": step,
        "model_state": {"weight": weight, "tied": weight, "other": torch.arange(5.0) + step},
        "optimizer_state": {"AdamW/weight/exp_avg": torch.full((40, 30), -float(step)), "AdamW/weight/step": step},
        "recipe": Recipe(),
        "tokenizer_json": '{"kind": "bytes"}',
        "trainer_state": {"step": step},
        "fingerprint": "f" * 64,
    }


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written until this is set."""
    event, write = threading.Event(), checkpoint._write

    def waiting(*arguments: Any) -> None:
        assert event.wait(20)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "_write", waiting)
    return event


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_write", failing)


def overwrite(given: dict[str, Any]) -> None:
    for part in ("model_state", "optimizer_state"):
        for value in given[part].values():
            if isinstance(value, Tensor):
                value.fill_(99.0)


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, gate: threading.Event) -> None:
    given, expected = state(3), state(3)
    with Saver(tmp_path, keep=2) as saver:
        saver.save(**given)
        overwrite(given)
        assert saver.newest is None and not (tmp_path / "checkpoints").exists(), "training went on before the disk did"
        gate.set()
        assert saver.wait() == tmp_path / "checkpoints" / "step_000003"
    found = checkpoint.load(tmp_path)
    assert torch.equal(found.model_state["weight"], expected["model_state"]["weight"])
    assert found.model_state["tied"].data_ptr() == found.model_state["weight"].data_ptr()
    optimizer, trainer = checkpoint.training_state(found)
    assert torch.equal(optimizer["AdamW/weight/exp_avg"], expected["optimizer_state"]["AdamW/weight/exp_avg"])
    assert trainer == {"step": 3} and not torch.equal(given["model_state"]["weight"], found.model_state["weight"])


def test_the_bytes_are_those_of_a_checkpoint_in_the_foreground(tmp_path: Path) -> None:
    for name, background in (("one", True), ("two", False)):
        with Saver(tmp_path / name, keep=2, background=background) as saver:
            saver.save(**state(1))
    for name in checkpoint.CONTENTS:
        parts = [(tmp_path / run / "checkpoints" / "step_000001" / name).read_bytes() for run in ("one", "two")]
        assert parts[0] == parts[1], name


def test_one_at_a_time_and_the_newest_stay(tmp_path: Path) -> None:
    with Saver(tmp_path, keep=2) as saver:
        for step in (1, 2, 3, 4):
            saver.save(**state(step))
    assert saver.newest == tmp_path / "checkpoints" / "step_000004"
    assert saved(tmp_path) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("at", ["the next save", "waiting", "the end"])
def test_a_failure_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    with Saver(tmp_path, keep=2) as saver:
        saver.save(**state(1))
    fail_with(monkeypatch, OSError(errno.ENOSPC, "full", str(tmp_path)))
    calls: dict[str, Callable[[Saver], object]] = {
        "the next save": lambda saver: saver.save(**state(3)),
        "waiting": Saver.wait,
        "the end": lambda _: None,
    }
    with pytest.raises(OSError, match="full"), Saver(tmp_path, keep=2) as saver:
        saver.save(**state(2))
        calls[at](saver)
        pytest.fail("not raised") if at != "the end" else None
    assert checkpoint.load(tmp_path).manifest.step == 1


def test_a_failure_does_not_hide_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, OSError(errno.EIO, "broken", str(tmp_path)))
    with pytest.raises(ArithmeticError, match="diverged") as caught, Saver(tmp_path, keep=2) as saver:
        saver.save(**state(1))
        raise ArithmeticError("diverged")
    assert "broken" in caught.value.__notes__[0]


def test_an_error_waits_for_what_is_being_written(tmp_path: Path, gate: threading.Event) -> None:
    with pytest.raises(ArithmeticError), Saver(tmp_path, keep=2) as saver:
        saver.save(**state(1))
        threading.Timer(0.05, gate.set).start()
        raise ArithmeticError
    assert checkpoint.load(tmp_path).manifest.step == 1


def test_copies_keep_ties_and_nothing_else_in_common() -> None:
    weight = torch.randn(4, 4)
    given = {"a": weight, "b": weight, "column": weight[:, 0], "none": torch.empty(0), "void": torch.empty(0)}
    found = tensors.copied(given)
    assert found["a"] is found["b"] and torch.equal(found["column"], weight[:, 0])
    assert len({found[name].data_ptr() for name in ("a", "column")} | {weight.data_ptr()}) == 3
    assert tensors.pack(found) == tensors.pack(given) and tensors.copied({"step": 3}) == {"step": 3}


def test_a_held_directory_is_told_from_a_free_one(tmp_path: Path) -> None:
    assert not files.is_locked(tmp_path)
    with files.lock(tmp_path):
        pid = os.fork()
        if not pid:
            os._exit(int(files.is_locked(tmp_path)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert not files.is_locked(tmp_path) and (tmp_path / ".lock").exists()
