"""The metrics of a run: one JSON object a line, each with the `step` after which it was measured."""

import json
import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ritornello.train import files
from ritornello.train.runs import METRICS, parsed


class Observer(Protocol):
    """Whoever watches a run."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...


class MetricsFile:
    """The file of `run_dir`. Opening it for a run with `step` steps done drops what later steps had written."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self.path = run_dir / METRICS
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
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            remedy = "pip install 'ritornello[tensorboard]'"
            raise ValueError(f"train.tensorboard = True: needs the package tensorboard; {remedy}") from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class Tracker:
    """The same figures for W&B or Trackio, whose calls are alike: project `ritornello`, the run by its directory's
    name, continued where it exists. Offline W&B keeps them in `run_dir`/wandb, to be sent by `wandb sync`."""

    def __init__(self, package: str, run_dir: Path, *, config: dict[str, Any], offline: bool) -> None:
        try:
            self._module = import_module(package)
        except ImportError as error:
            remedy = f"pip install 'ritornello[{package}]'"
            raise ValueError(f"train.{package} = True: needs the package {package}; {remedy}") from error
        name = run_dir.resolve().name
        own = {"id": name, "dir": str(run_dir), "mode": "offline" if offline else None} if package == "wandb" else {}
        with redirect_stdout(sys.stderr):  # standard output is for results
            self._module.init(project="ritornello", name=name, config=config, resume="allow", **own)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._module.finish()


def to_host(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, waiting for the device once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([value.detach().float() for value in tensors.values()]).tolist() if tensors else []
    return {**metrics, **dict(zip(tensors, values, strict=True))}  # pyrefly: ignore
