"""Checkpoints damaged at random: bits, lengths, files missing, swapped or foreign. All must be seen, none be read."""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.torture.kills import Row, row
from benchmarks.torture.subject import SAVE_EVERY, Subject
from ritornello.train import checkpoint

NAMES = (*sorted(checkpoint.CONTENTS), checkpoint.MANIFEST)
Damage = Callable[[Path, Path, random.Random], str]


def bit(newest: Path, older: Path, rng: random.Random) -> str:
    path = newest / rng.choice(NAMES)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path.name


def truncated(newest: Path, older: Path, rng: random.Random) -> str:
    path = newest / rng.choice(NAMES)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return path.name


def longer(newest: Path, older: Path, rng: random.Random) -> str:
    path = newest / rng.choice(NAMES)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 99)))
    return path.name


def zeros(newest: Path, older: Path, rng: random.Random) -> str:
    path = newest / rng.choice(NAMES)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    block = slice(start, start + 512)
    data[block] = bytes(255 - x for x in data[block])
    path.write_bytes(data)
    return path.name


def missing(newest: Path, older: Path, rng: random.Random) -> str:
    path = newest / rng.choice(NAMES)
    path.unlink()
    return path.name


def swapped(newest: Path, older: Path, rng: random.Random) -> str:
    """A file of another checkpoint; those that are equal in both are no damage."""
    differ = [name for name in NAMES if (older / name).read_bytes() != (newest / name).read_bytes()]
    name = rng.choice(differ)
    shutil.copy(older / name, newest / name)
    return name


KINDS: tuple[Damage, ...] = (bit, truncated, longer, zeros, missing, swapped)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def damaged(subject: Subject, n: int) -> Row:
    """The newest checkpoint is damaged: the one before must be taken, with a warning that names the file."""
    rng, problems, out = random.Random(0), [], subject.folder / "damaged"
    subject.run(out, steps=2 * SAVE_EVERY)
    older, newest = sorted((out / "checkpoints").iterdir())
    whole = subject.folder / "whole"
    shutil.copytree(newest, whole)
    heard = _Warnings()
    checkpoint.logger.addHandler(heard)
    try:
        for trial in range(n):
            kind = KINDS[trial % len(KINDS)]
            name = kind(newest, older, rng)
            heard.said.clear()
            found = checkpoint.latest(out)
            if found != older:
                problems.append(f"trial {trial}, {kind.__name__} of {name}: {found} taken")
            elif name not in " ".join(heard.said) and name != checkpoint.MANIFEST:
                problems.append(f"trial {trial}, {kind.__name__} of {name}: not named in {heard.said}")
            shutil.rmtree(newest)
            shutil.copytree(whole, newest)
    finally:
        checkpoint.logger.removeHandler(heard)
    problems += [] if checkpoint.latest(out) == newest else ["an undamaged one was refused"]
    shutil.rmtree(out)
    shutil.rmtree(whole)
    return row("a damaged checkpoint", n, problems, "all seen and named, the one before taken")


def resumed(subject: Subject) -> Row:
    """Stopped after every step and continued."""
    problems, out = [], subject.folder / "resumed"
    for steps in sorted(subject.undisturbed):
        subject.run(out, steps=steps)
        problem = subject.problem(out, least=steps)
        problems += [f"step {steps}: {problem}"] if problem else []
    shutil.rmtree(out)
    return row("resumed at every step", len(subject.undisturbed), problems, "weights and optimizer equal bit for bit")


def rows(subject: Subject, *, scale: float) -> Iterator[Row]:
    yield resumed(subject)
    yield damaged(subject, round(1000 * scale))
