"""python -m benchmarks.torture.ranks --folder FOLDER: runs of two processes of which one is killed, at random moments
and inside every system call of a checkpoint. Trials are kept in FOLDER; started again, it goes on from there.

All are forked from one process that has imported everything, so that a trial takes seconds. Nobody else ends the
survivors: they have to notice."""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp
import torch.distributed.tensor

from benchmarks.torture.subject import SAVE_EVERY, Row, Subject, digest, row, unchanged, written
from ritornello import cli
from ritornello.commands.train import label_lines
from ritornello.config import Recipe
from ritornello.train import checkpoint, files, watch
from ritornello.train.trainer import train

SIZE, STEPS = 2, 3 * SAVE_EVERY
PATIENCE = 60.0  # seconds for the survivors of a death
STALL_S = 600
SILENT = 1200.0  # and for anything
Trial = dict[str, Any]
Spoil = Callable[[int, list[int]], object]  # what is done to a process, by its number, and its own process' ids so far


class Run:
    """The processes of one run, by number."""

    def __init__(
        self,
        subject: Subject,
        out: Path,
        *,
        size: int = SIZE,
        stall_s: int = STALL_S,
        spoil: Spoil | None = None,
        **train: Any,
    ) -> None:
        self.said = subject.folder / "said"
        shutil.rmtree(self.said, ignore_errors=True)
        self.said.mkdir()
        self.codes: dict[int, int] = {}
        self.ends: dict[int, float] = {}  # by the monotonic clock
        self.pids: list[int] = []
        recipe = replace(subject.recipe, train=replace(subject.recipe.train, **train))
        recipe = replace(recipe, parallel=replace(recipe.parallel, stall_s=stall_s))
        port = _free_port()
        for rank in reversed(range(size)):  # the first one last: it knows the others
            where = {"MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}
            prepare = (lambda: None) if spoil is None else (lambda: spoil(rank, self.pids))  # noqa: B023
            how: Any = {"out": out, "cache_dir": subject.folder / "cache", "prepare": prepare}
            work = lambda: _process(recipe, where, **how)  # noqa: B023, E731
            self.pids.insert(0, _forked(self.said / str(rank), work))

    def wait(self, seconds: float = SILENT, *, apart: int | None = None) -> dict[int, int]:
        """Their exit codes, once all have ended, or all but the one apart; those that have not by then are killed."""
        end, left = time.monotonic() + seconds, set(range(len(self.pids))) - self.codes.keys()
        while left - {apart} and time.monotonic() < end:
            for rank in tuple(left):
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.ends[rank] = time.monotonic()
                    left.remove(rank)
            time.sleep(0.01)
        for rank in left:
            os.kill(self.pids[rank], signal.SIGKILL)
            self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])
        return self.codes

    def last(self, begun: float) -> float:
        """Seconds from then until the last one ended."""
        return max(self.ends.values(), default=begun) - begun

    def text(self, rank: int) -> str:
        return (self.said / str(rank)).read_text(errors="replace")

    def orphans(self) -> int:
        """Of their own groups of processes, those in which somebody is left."""
        return sum(_somebody(pid) for pid in self.pids)


def _somebody(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _forked(said: Path, work: Callable[[], int]) -> int:
    """The pid of a child that does the work and exits with what it returns; what it says goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = work()
    finally:
        os._exit(code)


def _process(
    recipe: Recipe, where: dict[str, int], *, out: Path, cache_dir: Path, prepare: Callable[[], object]
) -> int:
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in where.items()})
    label_lines(where["RANK"])
    logging.getLogger("ritornello").setLevel(logging.ERROR)
    prepare()
    try:
        train(recipe, out=out, resume=True, device="cpu", cache_dir=cache_dir, offline=True)
    except KeyboardInterrupt as interrupt:
        cli.say(interrupt, str(interrupt) or "interrupted")
        return 130
    except Exception as error:  # noqa: BLE001 - the boundary, as in the command line
        code, message = cli.explain(error, "Train")
        cli.say(error, f"error: {cli.one_line(message)}")
        return code
    return 0


def warm(subject: Subject) -> None:
    """A step in this process, so that those forked from it have all that is imported late."""
    out = subject.folder / "warm"
    recipe = replace(subject.recipe, train=replace(subject.recipe.train, steps=1, save_in_background=False))
    train(recipe, out=out, device="cpu", cache_dir=subject.folder / "cache", offline=True)
    shutil.rmtree(out)


def together(folder: Path) -> Subject:
    """A run by several processes, and what it has after each step when left alone."""
    recipe = written(folder)
    subject = Subject(folder, replace(recipe, train=replace(recipe.train, steps=STEPS)), {0: unchanged(recipe)}, {})
    warm(subject)
    out = folder / "together"
    run = Run(subject, out, save_every=1, keep_checkpoints=STEPS)
    assert set(run.wait().values()) == {0}, (run.codes, run.text(0))
    found = {checkpoint.verify(path).step: digest(path) for path in (out / "checkpoints").glob("step_*")}
    assert sorted(found) == list(range(1, STEPS + 1)) and len(set(found.values())) == STEPS
    shutil.rmtree(out)
    return replace(subject, undisturbed=subject.undisturbed | found)


def judged(subject: Subject, run: Run, out: Path, victim: int, killed: float) -> Trial:
    """What the survivors did, and what they left. killed: when, by the monotonic clock."""
    codes = run.wait()
    survivors = [rank for rank in range(len(run.pids)) if rank != victim]
    name = f"process {victim} of {len(run.pids)} (host {socket.gethostname()}, pid {run.pids[victim]}) died"
    problems = [
        f"process {rank} exits with {codes.get(rank)}" for rank in survivors if codes.get(rank) != watch.STALLED
    ]
    problems += [f"not named: {run.text(rank)[-300:]!r}" for rank in survivors if name not in run.text(rank)]
    problems += [f"{run.orphans()} orphans"] if run.orphans() else []
    logged = subject.logged(out) if out.exists() else 0
    least = max(0, (logged // SAVE_EVERY - 1) * SAVE_EVERY)  # one may be on its way
    problem = subject.problem(out, least=least) if out.exists() else None
    problems += [problem] if problem else []
    return {"victim": victim, "seconds": run.last(killed), "problems": problems}


def dead(subject: Subject, index: int, whole: float) -> Trial | None:
    """One of two, killed at a random moment after they have met, None if that was too late; and resumed."""
    rng, out = random.Random(index), subject.folder / "dead"
    shutil.rmtree(out, ignore_errors=True)
    begun, run, victim = time.monotonic(), Run(subject, out), rng.randrange(SIZE)
    while not out.exists():  # who dies before is missed as one that never starts, by all after five minutes
        time.sleep(0.001)
    time.sleep(rng.uniform(0, max(0.0, whole - (time.monotonic() - begun))))
    pid, status = os.waitpid(run.pids[victim], os.WNOHANG)
    if pid:
        run.codes[victim] = os.waitstatus_to_exitcode(status)
        return None if set(run.wait().values()) == {0} else {"victim": victim, "problems": [f"ended: {run.codes}"]}
    os.kill(run.pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    if (codes := run.wait()) and all(code == 0 for rank, code in codes.items() if rank != victim):
        return None  # all had been done
    trial = judged(subject, run, out, victim, killed)
    return _resumed(subject, out, trial)


def _resumed(subject: Subject, out: Path, trial: Trial) -> Trial:
    run = Run(subject, out)
    if set(run.wait().values()) != {0}:
        trial["problems"].append(f"not resumed: {run.codes} {run.text(0)[-300:]!r}")
    elif problem := subject.problem(out, least=STEPS):
        trial["problems"].append(f"resumed: {problem}")
    return trial


def saving(subject: Subject, index: int, victim: int) -> Trial | None:
    """One of two, killed inside the first one's index-th system call; None if there are not so many."""
    out, fell = subject.folder / "saving", subject.folder / "fell"
    shutil.rmtree(out, ignore_errors=True)
    fell.unlink(missing_ok=True)
    run = Run(subject, out, spoil=lambda rank, pids: _kills(index, victim, pids, fell) if rank == 0 else None)
    run.wait()
    if not fell.exists():
        return None
    trial = judged(subject, run, out, victim, float(fell.read_text()))
    return _resumed(subject, out, trial)


def _kills(index: int, victim: int, others: list[int], fell: Path) -> None:
    """This process kills the victim, itself or another, in its index-th system call."""
    run, calls = files._run, iter(range(1 << 30))

    def killing(operation: str, path: Path, call: Callable[..., Any], *arguments: Any) -> Any:
        if next(calls) == index:
            fell.write_text(str(time.monotonic()))
            if victim == 0 and operation.startswith("write"):
                descriptor, data = arguments
                call(descriptor, data[: len(data) // 2])
            os.kill(os.getpid() if victim == 0 else others[victim - 1], signal.SIGKILL)
        return run(operation, path, call, *arguments)

    files._run = killing


def asked(subject: Subject, index: int, whole: float) -> Trial | None:
    """Both are asked to stop: they finish the same step, save once, and the first one says so."""
    rng, out = random.Random(index), subject.folder / "asked"
    shutil.rmtree(out, ignore_errors=True)
    run = Run(subject, out)
    while not subject.logged(out):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, whole / 2))
    signum = (signal.SIGTERM, signal.SIGINT)[index % 2]
    for pid in run.pids:
        os.kill(pid, signum)
    sent = time.monotonic()
    codes = run.wait()
    if set(codes.values()) <= {0, -signum} and not subject.problem(out, least=STEPS):
        return None  # all had been done
    problems = [] if codes == dict.fromkeys(range(SIZE), 130) else [f"exit codes {codes}"]
    problems += [] if sum("saved in" in run.text(rank) for rank in range(SIZE)) == 1 else ["not said once"]
    problem = subject.problem(out, least=subject.logged(out))
    problems += [problem] if problem else []
    trial: Trial = {"seconds": run.last(sent), "problems": problems}
    return _resumed(subject, out, trial)


def kept(folder: Path, case: str, indices: range, work: Callable[[int], Trial | None]) -> Iterator[Trial]:
    """Trials by their index: those on the disk, and then those that are still to be made, until one is None."""
    path = folder / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {line["index"]: line["trial"] for line in lines if line["case"] == case}
    for index in indices:
        trial = done[index] if index in done else work(index)
        if index not in done:
            with path.open("a") as out:
                print(json.dumps({"case": case, "index": index, "trial": trial}), file=out)
            print(case, index, trial, flush=True)
        if trial is not None:
            yield trial


def summed(case: str, trials: list[Trial], note: str) -> Row:
    seconds = [trial["seconds"] for trial in trials if "seconds" in trial]
    problems = [problem for trial in trials for problem in trial["problems"][:1]]
    problems += [f"{max(seconds):.0f} s until all had ended"] if max(seconds, default=0) > PATIENCE else []
    times = (
        f"; ended after {statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} at most" if seconds else ""
    )
    return row(case, len(trials), problems, note + times)


def rows(folder: Path, *, scale: float) -> Iterator[Row]:
    """Of trials that are kept in `folder`."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    subject = together(work)
    begun = time.monotonic()
    assert set(Run(subject, subject.folder / "timed").wait().values()) == {0}
    whole = time.monotonic() - begun
    n = round(100 * scale)
    trials = list(kept(folder, "dead", range(n), lambda index: dead(subject, index, whole)))
    note = "the other one named it, exit code 3; nobody left; resumed, equal bit for bit"
    yield summed("two processes: kill -9 of one at a random moment", trials, note)
    for victim in range(SIZE):
        indices = range(0, 250, max(1, round(1 / scale)))
        one = lambda index: saving(subject, index, victim)  # noqa: B023, E731
        trials = list(kept(folder, f"saving {victim}", indices, one))
        yield summed(f"two processes: kill -9 of process {victim} at every system call of the first one", trials, note)
    trials = list(kept(folder, "asked", range(n), lambda index: asked(subject, index, whole)))
    yield summed("two processes: SIGTERM or SIGINT at a random moment", trials, "exit code 130, said once, saved")


def main() -> int:
    from benchmarks.torture.__main__ import recorded

    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture.ranks", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where trials are kept")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return recorded(rows(options.folder, scale=options.scale))


if __name__ == "__main__":
    sys.exit(main())
