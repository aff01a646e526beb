"""Steps whose numbers are not finite, at every place in a run; and a second trainer in a run's directory."""

import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.subject import STEPS, Row, Subject, ended, forked, row
from ritornello.train import step
from ritornello.train.guard import NonFiniteError

Spoil = Callable[[torch.nn.Module], Any]
REFUSED = 4  # the exit code of a second trainer
logger = logging.getLogger("ritornello")


def loss(model: torch.nn.Module) -> Any:
    """NaN in the forward pass."""
    return model.norm.register_forward_hook(lambda module, inputs, out: out * float("nan"))  # pyrefly: ignore


def gradient(model: torch.nn.Module) -> Any:
    """An infinite gradient of a finite loss."""
    return model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))  # pyrefly: ignore


def spoiled(spoil: Spoil, first: int, n: int, work: Callable[[], object]) -> None:
    """`work`, in which the steps from `first` on, n of them, are spoiled; that each is warned of is left out."""
    real, level = step.accumulate, logger.level

    def accumulate(model: Any, plan: Any, train: Any, world: Any) -> Any:
        if not first <= plan.key[1] < first + n:
            return real(model, plan, train, world)
        handle = spoil(model)
        try:
            return real(model, plan, train, world)
        finally:
            handle.remove()

    step.accumulate = accumulate
    logger.setLevel(logging.ERROR)
    try:
        work()
    finally:
        step.accumulate = real
        logger.setLevel(level)


def left_out(subject: Subject, spoil: Spoil) -> Row:
    """One step after the other is spoiled: what is saved after it must be what was there before it."""
    problems, out = [], subject.folder / "spoiled"
    clean = subject.folder / "clean"
    for done in range(STEPS):
        if done:
            subject.run(clean, steps=done)
            shutil.copytree(clean, out)
        spoiled(spoil, done, 1, lambda: subject.run(out, steps=done + 1))  # noqa: B023
        same = subject.saved(out) == (done + 1, subject.undisturbed[done])
        problems += [] if same else [f"step {done}: something changed"]
        shutil.rmtree(out)
    shutil.rmtree(clean)
    name = f"a {spoil.__name__} that is not finite, at every step"
    return row(name, STEPS, problems, "left out; no bit of weights or optimizer changed")


def ended_by_three(subject: Subject, spoil: Spoil) -> Row:
    """Three in a row, from every step on: the run ends, names them, has saved nothing of them, and can be resumed."""
    problems, out, n = [], subject.folder / "three", STEPS - 2
    for first in range(n):
        try:
            spoiled(spoil, first, 3, lambda: subject.run(out))
            problems.append(f"from step {first}: went on")
        except NonFiniteError as error:
            named = all(f"step {first + i}: " in str(error) for i in range(3))
            problems += [] if named else [f"from step {first}: not named"]
        found = subject.saved(out)
        if found is not None:  # it may have been saved between the first of them and the last
            same = found[1] == subject.undisturbed[min(found[0], first)]
            problems += [] if same else [f"from step {first}: something changed"]
        subject.run(out)
        ends = subject.saved(out)
        problems += [] if ends is not None and ends[0] == STEPS else [f"from step {first}: cannot be resumed"]
        if ends is not None and (found is None or found[0] <= first):  # nothing had been left out by then
            problems += [] if ends[1] == subject.undisturbed[STEPS] else [f"from step {first}: resumed to another end"]
        shutil.rmtree(out)
    return row(f"three steps in a row, {spoil.__name__} not finite", n, problems, "ended, all named; can be resumed")


def two_trainers(subject: Subject, n: int) -> Row:
    """A second one comes at a random moment: it is refused, or, the first having ended, finds nothing left to do."""
    rng, problems, out, refused = random.Random(0), [], subject.folder / "two", 0
    whole = subject.seconds(out)
    for trial in range(n):
        first = forked(lambda: subject.run(out))
        time.sleep(rng.uniform(0.1, 0.8) * whole)
        second = ended(forked(lambda: _refused(subject, out, first)))  # noqa: B023
        refused += second == REFUSED
        problems += [] if second in (0, REFUSED) else [f"trial {trial}: the second exits with {second}"]
        problems += [] if ended(first) == 0 else [f"trial {trial}: the first was disturbed"]
        problem = subject.problem(out, least=STEPS)
        problems += [f"trial {trial}: {problem}"] if problem else []
        shutil.rmtree(out)
    problems += [] if refused or not n else ["none was refused"]
    note = f"refused {refused} times, with the first one's process id"
    return row("a second trainer in the directory", n, problems, note)


def _refused(subject: Subject, out: Path, holder: int) -> None:
    try:
        subject.run(out)
    except ValueError as error:
        os._exit(REFUSED if f"in use by process {holder};" in str(error) else 3)


def rows(subject: Subject, *, scale: float) -> Iterator[Row]:
    for spoil in (loss, gradient):
        yield left_out(subject, spoil)
    for spoil in (loss, gradient):
        yield ended_by_three(subject, spoil)
    yield two_trainers(subject, round(50 * scale))
