"""Several processes to which something happens, all forked from one that has imported everything; a launch takes
seconds. python -m tests.distributed.faults RESULTS FOLDER SIZE"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.torture.ranks import Run, warm
from benchmarks.torture.subject import Subject, digest
from ritornello.train import checkpoint, files, step
from tests.train.small import recipe

STEPS = 4
STALL_S = 6  # longer than a step beside other tests
LAST = 1  # the process to which it happens, where it isn't the first
Spoil = Callable[[int, list[int]], None]


def at(first: int, rank: int, work: Callable[[], object], *, n: int = 1) -> Spoil:
    """In the steps from `first` on, n of them, the process of that number does `work` before its part of the step."""
    real = step.accumulate

    def prepare(own: int, pids: list[int]) -> None:
        def accumulate(model: Any, plan: Any, train: Any, world: Any) -> Any:
            if own == rank and first <= plan.key[1] < first + n:
                work()
            return real(model, plan, train, world)

        step.accumulate = accumulate

    return prepare


def poisoned(first: int, n: int) -> Spoil:
    """One micro-batch of one process gets a loss that is no number."""
    real = step._forward

    def prepare(own: int, pids: list[int]) -> None:
        seen: list[int] = []

        def micro_step(model: Any, micro: step.Micro) -> Any:
            now = micro.plan.key[1]
            if own != LAST or not first <= now < first + n or now in seen:
                return real(model, micro)
            seen.append(now)
            nan = lambda module, inputs, out: out * float("nan")  # noqa: E731
            handle = model.norm.register_forward_hook(nan)
            try:
                return real(model, micro)
            finally:
                handle.remove()

        step._forward = micro_step

    return prepare


def full(own: int, pids: list[int]) -> None:
    """The first process' disk is full when the second checkpoint is written."""
    if own:
        return
    real = files.require_space

    def require_space(directory: Any, n_bytes: int) -> None:
        if any(Path(directory).glob("step_*")):
            raise OSError(errno.ENOSPC, "no space", str(directory))
        real(directory, n_bytes)

    files.require_space = require_space


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("no good")


def hang() -> None:
    time.sleep(3600)


FOREGROUND: dict[str, Any] = {"save_in_background": False}
CASES: dict[str, tuple[Spoil | None, dict[str, Any]]] = {
    "died": (at(2, LAST, die), {}),
    "first died": (at(2, 0, die), {}),
    "poisoned": (poisoned(1, 1), {"microbatch_size": 4}),
    "poisoned on": (poisoned(1, 3), {"microbatch_size": 4}),
    "full": (full, FOREGROUND),
    "failed": (at(2, LAST, fail), {}),
    "hangs": (at(2, LAST, hang), {"stall_s": STALL_S}),
    "silent": (at(2, LAST, stop), {"stall_s": STALL_S}),
    "asked": (None, {"steps": 1000, "save_every": 1000, "eval_every": 1000}),
}
OF_FOUR = ("died", "first died", "poisoned", "hangs", "asked")


def subject_in(folder: Path) -> Subject:
    given = recipe(folder, steps=STEPS, save_every=1, keep_checkpoints=STEPS, batch_size=8, eval_every=STEPS)
    return Subject(folder, given, {}, {})


def ended(run: Run, out: Path) -> dict[str, Any]:
    """What a run came to: exit codes and words by process, the seconds from the first end to the last, and what each
    checkpoint is."""
    codes = run.wait()
    found = {checkpoint.verify(path).step: digest(path) for path in (out / "checkpoints").glob("step_*")}
    left = [path.name for path in out.rglob(f"{files.TEMPORARY}*")]
    return {
        "codes": [codes.get(rank) for rank in range(len(run.pids))],
        "pids": run.pids,
        "said": [run.text(rank) for rank in range(len(run.pids))],
        "seconds": max(run.ends.values()) - min(run.ends.values()),
        "steps": found,
        "left": left,
        "orphans": run.orphans(),
    }


def case(subject: Subject, name: str, size: int) -> dict[str, Any]:
    spoil, settings = CASES[name]
    out = subject.folder / name
    run = Run(subject, out, size=size, spoil=spoil, **settings)
    if name == "asked":
        while not subject.logged(out):
            time.sleep(0.05)
        for pid in run.pids:
            os.kill(pid, signal.SIGTERM)
    if name == "silent":
        run.wait(apart=LAST)
    found = ended(run, out)
    if name.endswith("died"):
        resumed = ended(Run(subject, out, size=size), out)
        found |= {"resumed": resumed}
    return found


def main() -> None:
    torch.set_num_threads(1)  # no pool of threads that a fork would lack
    results, folder, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    subject = subject_in(folder)
    warm(subject)
    out = folder / "alone"
    found = {"undisturbed": ended(Run(subject, out, size=size, microbatch_size=0), out)}
    for name in CASES if size == 2 else OF_FOUR:
        found[name] = case(subject, name, size)
        results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
