"""One cell of an experiment: a model trained on a task from one seed, stored so that nothing is trained twice."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ritornello import recipes
from ritornello.accounting import at_mean_loops, count_parameters, flops_per_token
from ritornello.config import ModelConfig, TrainConfig, require
from ritornello.lab.tasks import Material, Problems, Task, build_task
from ritornello.model.carry import SingleStream
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import depth, files, tensors
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.guard import NonFiniteError
from ritornello.train.halting import fit_gate
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step

Role = Literal["looped", "plain", "ablation"]
DATA_STREAM = 2  # of the host's random numbers of one (seed, step); 0 and 1 draw depths and probed states
TEST_SEED = 2**31 - 2  # tuning, up to entry 8 of experiments/LOG.md, read the problems of 2**31 - 1
GATE_BATCHES = 8
MODEL, CELL = "model.safetensors", "cell.json"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained: all that decides the weights, and the names under which results are filed.

    task: a name in MATERIALS, which takes `task_sizes`. hops: the deepest question asked in training.
    masked: only questions that a sequence's loops can reach are asked in training, hops <= loops.
    bf16_carry: the state is rounded to bfloat16 after each loop.
    """

    arm: str
    role: Role
    task: str
    seed: int
    model: ModelConfig
    train: TrainConfig
    task_sizes: tuple[tuple[str, int], ...] = ()
    hops: int = 5
    masked: bool = False
    bf16_carry: bool = False

    @property
    def name(self) -> str:
        """Distinct for cells that differ in anything. Defaults are left out: a setting that a later version adds, off,
        changes no name, and a default that it changes is found when a stored cell is read."""
        what = json.dumps(_chosen(self))
        return f"{self.task}-{self.arm}-s{self.seed}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    def build_material(self) -> Material:
        return build_task(self.task, dict(self.task_sizes))

    def build_task(self) -> Task:
        """Of a cell whose material has an oracle: any but text."""
        task = self.build_material()
        assert isinstance(task, Task)
        return task


def _chosen(config: "Cell | ModelConfig | TrainConfig") -> dict[str, Any]:
    """What differs from the defaults."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in ("arm", "role")}
    defaults = {field.name: field.default for field in fields(config)}
    nested = {name: _chosen(x) if is_dataclass(x) else x for name, x in values.items()}
    return {name: x for name, x in nested.items() if x != defaults[name]}


class Bfloat16Carry(SingleStream):
    """Rounds the state that goes from loop to loop, as a model kept in bfloat16 would."""

    def write(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return y.to(torch.bfloat16).to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of a training: steps, seconds, FLOPs, the last loss, peak memory of the process in bytes.

    loss: None before the first step; diverged: the step at which loss or gradient was no longer finite, or None.
    """

    steps: int
    seconds: float
    flops: float
    peak_bytes: int
    loss: float | None
    diverged: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """cell.json"""

    cell: Cell
    trained: Facts


@dataclass(frozen=True, kw_only=True)
class Trained(Facts):
    cell: Cell
    model: RecurrentDepthTransformer


Watch = Callable[[int, RecurrentDepthTransformer, Batch], None]


def build(cell: Cell) -> RecurrentDepthTransformer:
    """The cell's model before training."""
    model = RecurrentDepthTransformer(cell.model, seed=cell.seed)
    if cell.bf16_carry:
        model.carry = Bfloat16Carry()
    return model


def batch(cell: Cell, task: Material, step: int) -> Batch:
    """The training batch of `step`, a function of (seed, step) and the task; the same problems for every arm."""
    train = cell.train
    n = train.batch_size
    rng = depth.generator(train.seed, step, DATA_STREAM)
    loops = depth.sample(train, step=step, n_sequences=n)
    hops = np.full(n, cell.hops)
    if task.loops_say_hops:
        hops = loops if not cell.model.is_plain else depth.sample(looped(train, cell.hops), step=step, n_sequences=n)
    problems = task.sample(rng, hops, split="train")
    return to_batch(task, problems, loops=loops if cell.masked else None, told=cell.model.is_plain, first=step * n)


def looped(train: TrainConfig, hops: int) -> TrainConfig:
    """How a looped model that may loop `hops` times draws its depths."""
    return replace(train, depth="uniform", min_loops=1, max_loops=hops, mean_loops=(1 + hops) / 2)


def to_batch(task: Material, problems: Problems, *, loops: Any = None, told: bool, first: int = 0) -> Batch:
    """loops (n,): leave out questions of more hops; told: write the hop count in where loops would say it."""
    tokens = task.tell(problems) if told else problems.tokens
    labels = problems.answers
    if loops is not None:
        labels = np.where(problems.hops <= loops[:, None], labels, NO_LABEL)
    n, length = labels.shape
    return Batch(
        tokens=tokens,
        labels=labels,
        documents=np.zeros((n, length), np.int64),
        indices=first + np.arange(n),
        n_bytes=np.ones(n, np.int64),
    )


def train(cell: Cell, *, watch: Watch | None = None, losses: list[float] | None = None) -> Trained:
    """Train from scratch. `watch` sees every batch after its step, `losses` gets each loss in nats; divergence is a
    result."""
    task, model, settings, start = cell.build_material(), build(cell), cell.train, time.perf_counter()
    optimizers = build_optimizers(model, settings)
    step, tokens, seq_len, loops, loss, diverged = 0, 0, 1, 0.0, None, None
    while step < settings.steps:
        now = batch(cell, task, step)
        try:
            measured = train_step(model, optimizers, now, train=settings, step=step)
        except NonFiniteError:
            diverged = step
            break
        loss, step = float(measured["loss"]), step + 1
        tokens, seq_len = tokens + now.labels.size, now.labels.shape[1]
        loops += float(measured.get("mean_loops", 1.0))
        if losses is not None:
            losses.append(loss)
        if watch is not None:
            watch(step, model, now)
    if diverged is None and cell.model.halting == "gate" and settings.halting_loss == "frozen":
        after = (batch(cell, task, step + i) for i in range(GATE_BATCHES))
        fit_gate(model, after, n_loops=settings.max_loops, seed=cell.seed)
    return Trained(
        cell=cell,
        model=model.eval(),
        steps=step,
        seconds=time.perf_counter() - start,
        flops=tokens * training_flops(cell, seq_len=seq_len, loops=loops / max(1, step)),
        peak_bytes=peak_bytes(),
        loss=loss,
        diverged=diverged,
    )


def training_flops(cell: Cell, *, seq_len: int, loops: float) -> float:
    """Per token, at a mean number of loops; what little the exit probe and the gate take is left out."""
    how: Any = {"seq_len": seq_len, "training": True, "convention": "full"}
    return at_mean_loops(lambda n: flops_per_token(cell.model, n_loops=n, **how), loops)


def peak_bytes() -> int:
    """Of this process since it started (Linux counts kibibytes, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trained(cell: Cell, store: Path) -> Trained:
    """The cell's model from `store`, trained now if it isn't there. What is there is complete: it appears at once."""
    folder = store / cell.name
    if not folder.exists():
        found = train(cell)
        with files.create_directory(folder) as temporary:
            files.write_atomic(temporary / MODEL, tensors.pack(found.model.state_dict()))
            files.write_atomic(temporary / CELL, describe(found).encode())
    return load(folder, cell)


def describe(found: Trained) -> str:
    """cell.json"""
    facts = {field.name: getattr(found, field.name) for field in fields(Facts)}
    return json.dumps({"cell": asdict(found.cell), "trained": facts}, indent=2, allow_nan=False) + "\n"


def read(folder: Path) -> Stored:
    """Raises ValueError, which names the file."""
    source = folder / CELL
    mapping = recipes.parse_json(recipes.read_text(source), source)
    require(isinstance(mapping, dict), str(source), mapping, "what the lab wrote")
    try:
        return recipes.validated(Stored, mapping)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load(folder: Path, cell: Cell | None = None) -> Trained:
    """A stored cell; `cell`, if given, is the one that it must be.

    Raises:
        ValueError: files that are missing, damaged or another model's.
    """
    stored = read(folder)
    if cell is not None:
        same = replace(stored.cell, arm=cell.arm, role=cell.role) == cell
        remedy = "a default has changed since; remove it to train it again"
        require(same, str(folder), "another cell", "of the settings asked for", remedy)
    with torch.device("meta"):
        shapes = RecurrentDepthTransformer(stored.cell.model).state_dict()
    state = tensors.read(folder / MODEL)
    tensors.check(state, shapes, folder / MODEL)
    model = build(stored.cell)
    model.load_state_dict(state)
    return Trained(cell=stored.cell, model=model.eval(), **vars(stored.trained))


def sizes(cell: Cell) -> dict[str, int]:
    counted = count_parameters(cell.model)
    return {name: counted[name] for name in ("total", "active", "non_embedding")}
