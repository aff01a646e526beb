"""The runs on this disk: what each is, how far it came, how two differ, and their removal. Needs no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ritornello import recipes
from ritornello.config import Recipe, require, shown
from ritornello.train import files

CONFIG, METRICS, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"


@dataclass(frozen=True)
class Run:
    """A run's directory. metrics: the last value of each; n_bytes: on the disk; changed: seconds since the epoch."""

    path: Path
    recipe: Recipe
    state: str  # running, done, or stopped
    step: int
    metrics: dict[str, float]
    n_bytes: int
    changed: float


def find(root: str | Path) -> list[Path]:
    """The runs in `root`, at any depth, by name; `root` itself if it is one."""
    root = Path(root)
    require(root.is_dir(), "DIR", str(root), "a directory with runs", "ritornello train RECIPE makes one")
    return sorted(path.parent for path in root.rglob(CONFIG) if is_run(path.parent))


def is_run(path: Path) -> bool:
    """Whether training wrote here: a checkpoint inside a run has a configuration too, but no checkpoints."""
    started = (path / METRICS).is_file() or (path / CHECKPOINTS).is_dir()
    return (path / CONFIG).is_file() and started and not path.is_symlink()


def read(path: str | Path) -> Run:
    """
    Raises:
        ValueError: not a run, or a configuration that can't be read; the file is named.
    """
    path = Path(path)
    require(is_run(path), "RUN", str(path), "the directory of a run", "ritornello runs ls names them")
    recipe = recipes.read_json(path / CONFIG)
    metrics: dict[str, float] = {}
    for line in lines(path):
        most = {name: max(line[name], metrics.get(name, 0.0)) for name in line if name == "peak_mb"}  # of all processes
        metrics |= line | most
    step = int(metrics.pop("step", 0))
    files_inside = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    done = "done" if step >= recipe.train.steps else "stopped"
    return Run(
        path=path,
        recipe=recipe,
        state="running" if files.is_locked(path) else done,
        step=step,
        metrics=metrics,
        n_bytes=sum(file.stat().st_size for file in files_inside),
        changed=max(file.stat().st_mtime for file in files_inside),
    )


def newest(path: str | Path) -> Path | None:
    """The last checkpoint of a run by its name, which it only has when it is complete; unread."""
    found = Path(path, CHECKPOINTS).glob("step_*")
    return max(found, key=lambda each: (len(each.name), each.name), default=None)


def lines(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics, in order; without those that a kill cut short, or that hold anything but a step
    and finite numbers (which a resumed run removes)."""
    source = Path(path, METRICS)
    require(source.is_file() or not source.exists(), str(source), "something else", "a regular file")
    found = [parsed(line) for line in source.read_bytes().splitlines()] if source.exists() else []
    return [line for line in found if line is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line of metrics, if it is one: finite numbers, and a step."""
    try:
        found = json.loads(line)
        good = isinstance(found, dict) and all(type(x) in (int, float) and math.isfinite(x) for x in found.values())
    except (ValueError, RecursionError, OverflowError):
        return None
    return found if good and type(found.get("step")) is int else None


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which the runs differ, by name, with the value of each run."""
    tables = [asdict(run.recipe) for run in runs]
    found = {}
    for table in ("model", "data", "train"):
        for name in tables[0][table]:
            values = [recipe[table][name] for recipe in tables]
            if any(value != values[0] for value in values):
                found[f"{table}.{name}"] = values
    return found


def remove(path: str | Path) -> int:
    """Remove a run with all its checkpoints; returns the bytes freed.

    Raises:
        ValueError: not a run, or one in use.
    """
    run = read(path)
    with files.lock(run.path):
        files.remove_tree(run.path)
    return run.n_bytes


def text(value: object) -> str:
    """A setting or metric in a table."""
    if isinstance(value, str):
        return value if value.isprintable() else shown(value)
    return f"{value:.5g}" if isinstance(value, float) else shown(value)
