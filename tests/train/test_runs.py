"""Runs on the disk: found, described, compared and removed; nothing else is ever removed."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ritornello import cli
from ritornello.train import files, runs
from ritornello.train.trainer import train
from tests.train.small import recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs that differ in two settings, one of them stopped early, and something that is no run."""
    root = tmp_path_factory.mktemp("runs")
    given = recipe(root, steps=4, eval_every=2, save_every=2)
    other = replace(given, train=replace(given.train, lr=2e-2), model=replace(given.model, dim=24))
    for name, a_recipe in (("one", given), ("two", other)):
        train(a_recipe, out=root / "all" / name, device="cpu", cache_dir=root / "cache")
    stopped = replace(other, train=replace(other.train, steps=9))
    longer = json.loads((root / "all" / "two" / "config.json").read_text())
    longer["train"]["steps"] = stopped.train.steps
    (root / "all" / "two" / "config.json").write_text(json.dumps(longer))
    (root / "all" / "notes").mkdir()
    (root / "all" / "notes" / "config.json").write_text("{}")
    yield root / "all"


def test_runs_are_found_and_described(folder: Path) -> None:
    assert runs.find(folder) == [folder / "one", folder / "two"]
    one, two = (runs.read(path) for path in runs.find(folder))
    assert (one.state, one.step, two.state, two.step) == ("done", 4, "stopped", 4)
    assert {"loss", "val_bpb_1", "tok_per_s"} <= one.metrics.keys() and "step" not in one.metrics
    assert one.n_bytes == sum(path.stat().st_size for path in one.path.rglob("*") if path.is_file())


def test_a_run_in_progress(folder: Path) -> None:
    with files.lock(folder / "one"):
        assert runs.read(folder / "one").state == "running"
    assert runs.read(folder / "one").state == "done"


def test_settings_that_differ_are_named(folder: Path) -> None:
    found = runs.differences([runs.read(path) for path in runs.find(folder)])
    assert found == {"model.dim": [16, 24], "train.lr": [1e-2, 2e-2], "train.steps": [4, 9]}


def test_a_line_cut_short_is_left_out(folder: Path, tmp_path: Path) -> None:
    content = (folder / "one" / runs.METRICS).read_bytes()
    (tmp_path / runs.METRICS).write_bytes(content + b'{"step": 4, "lo')
    assert runs.lines(tmp_path) == runs.lines(folder / "one") != []


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(["runs", *args])
    return code, *capsys.readouterr()


def test_the_command_lists_and_compares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "ls", str(folder), "--json")
    first, second = json.loads(out)
    assert code == 0 and (first["state"], first["step"], second["step"]) == ("done", "4/4", "4/9")
    code, out, _ = said(capsys, "compare", str(folder / "one"), str(folder / "two"))
    assert code == 0 and "model.dim" in out and "model.n_heads" not in out and "val_bpb_1" in out
    code, out, _ = said(capsys, "ls", str(folder))
    assert code == 0 and "stopped" in out and "notes" not in out


def test_a_run_is_removed_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = recipe(tmp_path, steps=2)
    train(given, out=tmp_path / "run", device="cpu", cache_dir=tmp_path / "cache")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for path in (tmp_path / "cache", tmp_path, tmp_path / "link", tmp_path / "run" / "checkpoints" / "step_000002"):
        code, out, err = said(capsys, "rm", str(path))
        assert (code, out) == (2, "") and "must be the directory of a run" in err and path.exists()
    with files.lock(tmp_path / "run"):
        code, _, err = said(capsys, "rm", str(tmp_path / "run"))
        assert code == 2 and "in use by process" in err and (tmp_path / "run").exists()
    code, out, _ = said(capsys, "rm", str(tmp_path / "run"))
    assert code == 0 and "freed" in out and not (tmp_path / "run").exists() and (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ls", "nowhere"], "a directory with runs"),
        (["compare", "one"], "at least 2 runs"),
        (["rm"], "at least 1 runs"),
        (["mv", "a"], "mv"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    code, out, err = said(capsys, *args)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_one_that_cannot_be_read_hides_no_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "odd"):
        shutil.copytree(folder / "one", tmp_path / name)
    (tmp_path / "odd" / runs.METRICS).unlink()
    os.mkfifo(tmp_path / "odd" / runs.METRICS)
    with pytest.raises(ValueError, match=r"metrics\.jsonl = 'something else': must be a regular file"):
        runs.read(tmp_path / "odd")
    assert cli.main(["runs", "ls", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert [Path(row["run"]).name for row in json.loads(said.out)] == ["good"] and "odd" in said.err


def test_peak_memory_is_that_of_all_processes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "run")
    for peak in (9e6, 4.0):
        files.append(tmp_path / "run" / runs.METRICS, json.dumps({"step": 4, "peak_mb": peak}).encode() + b"\n")
    assert runs.read(tmp_path / "run").metrics["peak_mb"] == 9e6
