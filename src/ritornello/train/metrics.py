"""The metrics of a run: one JSON object a line, each with the `step` after which it was measured."""

import json
import logging
import math
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ritornello.config import Recipe, TrainConfig, require
from ritornello.recipes import read_text
from ritornello.train import files
from ritornello.train.runs import METRICS, parsed

SINKS = ("tensorboard", "trackio", "wandb")  # settings of the same names as their packages and extras
logger = logging.getLogger("ritornello")


class Observer(Protocol):
    """Whoever watches a run."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...


class MetricsFile:
    """The file of `run_dir`. Opening it for a run with `step` steps done drops what later steps had written."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.path = run_dir / METRICS
        require(self.path.is_file() or not self.path.exists(), str(self.path), "something else", "a regular file")
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if (found := parsed(line)) is not None and found["step"] <= step]
            files.write_atomic(self.path, b"".join(kept))

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ArithmeticError naming what is not finite: the weights are lost, the last checkpoint is not."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ArithmeticError(f"step {step}: {', '.join(bad)} not finite: the run has diverged; lower train.lr")
        files.append(self.path, json.dumps({"step": step, **metrics}, allow_nan=False).encode() + b"\n")


class TensorBoard:
    """The same figures for TensorBoard, under `run_dir`/tensorboard."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class Tracker:
    """The same figures for W&B or Trackio, whose calls are alike: project `ritornello`, the run by its directory's
    name and a random number that it keeps as long as it goes on. Offline W&B writes to `run_dir`/wandb, to be sent by
    `wandb sync`. What fails once the run is on its way is a warning: it may be the network, and the file has it all.

    Steps after the last checkpoint come twice where a killed run is resumed: W&B keeps the first, Trackio both.
    """

    def __init__(self, package: str, run_dir: Path, *, step: int, config: dict[str, Any], offline: bool) -> None:
        self._package, self._module, self._warned = package, import_module(package), False
        name, number = run_dir.resolve().name, _number(run_dir, new=step == 0)
        about: dict[str, Any] = {"name": f"{name}-{number}"}
        if package == "wandb":
            mode = "offline" if offline else None
            about = {"name": name, "id": number, "dir": str(run_dir), "mode": mode}
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                self._module.init(project="ritornello", config=config, resume="allow", **about)
        except Exception as error:
            remedy = "--offline asks for no network" if package == "wandb" else "leave it out"
            raise ValueError(f"train.{package} = True: {package} did not start: {error}; {remedy}") from error

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(self._module.log, dict(metrics), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        failed = {"exit_code": int(kind is not None)} if self._package == "wandb" else {}
        self._try(self._module.finish, **failed)

    def _try(self, call: Callable[..., object], *arguments: Any, **others: Any) -> None:
        try:
            with redirect_stdout(sys.stderr):
                call(*arguments, **others)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on without
            if not self._warned:
                logger.warning("%s: %s; the figures are in %s", self._package, error, METRICS)
            self._warned = True


def _number(run_dir: Path, *, new: bool) -> str:
    path = run_dir / "tracked"
    if new or not path.exists():
        files.write_atomic(path, secrets.token_hex(4).encode())
    return read_text(path, max_bytes=99)


def require_packages(config: TrainConfig) -> None:
    """Raises ValueError if the package of a sink that was asked for is not there."""
    for name in SINKS:
        remedy = f"pip install 'ritornello[{name}]'"
        missing = getattr(config, name) and find_spec(name) is None
        require(not missing, f"train.{name}", True, f"False without the package {name}", remedy)


def observers(recipe: Recipe, run_dir: Path, *, step: int, offline: bool, stack: ExitStack) -> list[Observer]:
    """The metrics file, and what else the recipe asks for; `stack` closes them."""
    found: list[Observer] = [MetricsFile(run_dir, step=step)]
    if recipe.train.tensorboard:
        found.append(TensorBoard(run_dir, step=step))
    for package in SINKS[1:]:
        if getattr(recipe.train, package):
            tracker = Tracker(package, run_dir, step=step, config=asdict(recipe), offline=offline)
            found.append(stack.enter_context(tracker))
    return found


def to_host(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, waiting for the device once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([value.detach().float() for value in tensors.values()]).tolist() if tensors else []
    return {**metrics, **dict(zip(tensors, values, strict=True))}  # pyrefly: ignore
