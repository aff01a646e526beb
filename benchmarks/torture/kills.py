"""kill -9 at random moments and at every system call; signals that ask politely."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.torture.subject import SAVE_EVERY, STEPS, Row, Subject, ended, forked, place, row
from ritornello.train import files


def at_random(subject: Subject, n: int, *, background: bool) -> Row:
    """The same run again and again, resumed where the last kill left it; when it ends, a new one."""
    rng, problems, far, out, started = random.Random(background), [], 0, subject.folder / "killed", 0
    whole = subject.seconds(out, background=background)
    for trial in range(n):
        pid = forked(lambda: subject.run(out, background=background))
        time.sleep(rng.uniform(0, whole / 2))
        os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        intervals = 2 if background else 1  # one checkpoint may be on its way
        logged = subject.logged(out)
        least = max(started, (logged // SAVE_EVERY - intervals + (logged % SAVE_EVERY > 0)) * SAVE_EVERY)
        problem = subject.problem(out, least=least) if out.exists() else None
        problems += [f"trial {trial}: {problem}"] if problem else []
        started, far = least, far + (code == 0)
        if code == 0:
            problems += _whole(subject, out)
            shutil.rmtree(out)
            started = 0
    problems += [] if ended(forked(lambda: subject.run(out, background=background))) == 0 else ["cannot be resumed"]
    problems += _whole(subject, out)
    shutil.rmtree(out)
    name = f"kill -9 at a random moment, checkpoints in the {place(background)}"
    return row(name, n, problems, f"{far + 1} runs came to their end, equal to the undisturbed one bit for bit")


def _whole(subject: Subject, out: Path) -> list[str]:
    problem = subject.problem(out, least=STEPS)
    return [f"at the end: {problem}"] if problem else []


def at_every_call(subject: Subject, *, background: bool) -> Row:
    """Killed inside each write, sync, rename and removal of a run that saves, resumed, and compared at its end."""
    out, steps, problems = subject.folder / "called", 3 * SAVE_EVERY, []
    work = lambda: subject.run(out, background=background, steps=steps)  # noqa: E731
    index = 0
    while True:
        code = ended(forked(lambda: _dying(index, work)))  # noqa: B023
        problem = subject.problem(out) if out.exists() else None
        problems += [f"call {index}: {problem}"] if problem else []
        if code == 0:
            break
        problems += [] if ended(forked(work)) == 0 else [f"call {index}: cannot be resumed"]
        problem = subject.problem(out, least=steps)
        problems += [f"call {index}, resumed: {problem}"] if problem else []
        shutil.rmtree(out)
        index += 1
    shutil.rmtree(out)
    name = f"kill -9 at every system call, checkpoints in the {place(background)}"
    return row(name, index, problems, "each run resumed to its end, equal bit for bit")


def _dying(index: int, work: Callable[[], object]) -> None:
    """`work`, killed at its index-th system call, half of what is written on the disk."""
    run, calls = files._run, iter(range(1 << 30))

    def dying(operation: str, path: Path, call: Callable[..., Any], *arguments: Any) -> Any:
        if next(calls) == index:
            if operation.startswith("write"):
                descriptor, data = arguments
                call(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return run(operation, path, call, *arguments)

    files._run = dying
    work()


def asked_to_stop(subject: Subject, n: int, signum: signal.Signals, *, twice: bool = False) -> Row:
    """The signal at a random moment of a run; it must end as documented, and its continuation as undisturbed. A second
    one doesn't wait for the step."""
    rng, problems, out, codes = random.Random(signum), [], subject.folder / "asked", dict[int, int]()
    whole = subject.seconds(out)
    for trial in range(n):
        shutil.rmtree(out, ignore_errors=True)
        pid = forked(lambda: subject.run(out))
        time.sleep(rng.uniform(0, whole))
        for _ in range(1 + twice):
            os.kill(pid, signum)
            time.sleep(0.001)  # two that come at once are one
        code = ended(pid)
        codes[code] = codes.get(code, 0) + 1
        logged = subject.logged(out)
        saved = logged if code == 130 and not twice else 0  # before the first step nothing is there to be saved
        problem = subject.problem(out, least=saved) if out.exists() else None
        problems += [f"trial {trial}: {problem}"] if problem else []
        problems += [] if code in (0, 130, -signum) else [f"trial {trial}: exit code {code}"]
        problems += [] if ended(forked(lambda: subject.run(out))) == 0 else [f"trial {trial}: cannot be resumed"]
        problems += _whole(subject, out)
    shutil.rmtree(out)
    ends = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
    name = f"{signum.name}{' twice' * twice} at a random moment"
    return row(name, n, problems, f"ended {ends}; each resumed, equal bit for bit")


def rows(subject: Subject, *, scale: float) -> Iterator[Row]:
    for background in (True, False):
        yield at_random(subject, round(200 * scale), background=background)
    for background in (True, False):
        yield at_every_call(subject, background=background)
    for signum in (signal.SIGTERM, signal.SIGINT):
        yield asked_to_stop(subject, round(100 * scale), signum)
        yield asked_to_stop(subject, round(100 * scale), signum, twice=True)
