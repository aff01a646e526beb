"""Checkpoints damaged at random: bits, lengths, files missing, swapped or foreign. All must be seen, none be read."""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.torture.subject import SAVE_EVERY, STEPS, Row, Subject, measured, row
from ritornello.train import checkpoint

NAMES = (*sorted(checkpoint.CONTENTS), checkpoint.MANIFEST)
Damage = Callable[[bytes, random.Random], bytes | None]


def bit(data: bytes, rng: random.Random) -> bytes:
    return _changed(data, rng.randrange(len(data)), 1, 1 << rng.randrange(8))


def block(data: bytes, rng: random.Random) -> bytes:
    return _changed(data, rng.randrange(len(data)), 512, 255)


def _changed(data: bytes, start: int, n: int, mask: int) -> bytes:
    return data[:start] + bytes(x ^ mask for x in data[start : start + n]) + data[start + n :]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 99))


def missing(data: bytes, rng: random.Random) -> None:
    return None


KINDS: tuple[Damage, ...] = (bit, block, truncated, longer, missing)


def damage(newest: Path, older: Path, trial: int, rng: random.Random) -> tuple[str, str]:
    """Spoil one file; returns how, and its name. Every sixth time it becomes that of another checkpoint."""
    if trial % (len(KINDS) + 1) == len(KINDS):
        name = rng.choice([name for name in NAMES if (older / name).read_bytes() != (newest / name).read_bytes()])
        shutil.copy(older / name, newest / name)
        return "swapped", name
    name, kind = rng.choice(NAMES), KINDS[trial % (len(KINDS) + 1)]
    data = kind((newest / name).read_bytes(), rng)
    if data is None:
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(data)
    return kind.__name__, name


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
            kind, name = damage(newest, older, trial, rng)
            heard.said.clear()
            found = checkpoint.latest(out)
            if found != older:
                problems.append(f"trial {trial}, {kind} of {name}: {found} taken")
            elif name not in " ".join(heard.said) and name != checkpoint.MANIFEST:
                problems.append(f"trial {trial}, {kind} of {name}: not named in {heard.said}")
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
    for steps in range(1, STEPS + 1):
        subject.run(out, steps=steps)
        problem = subject.problem(out, least=steps)
        problems += [f"step {steps}: {problem}"] if problem else []
    problems += [] if measured(out) == subject.losses else ["other losses"]
    shutil.rmtree(out)
    return row("resumed at every step", STEPS, problems, "losses, weights and optimizer equal bit for bit")


def rows(subject: Subject, *, scale: float) -> Iterator[Row]:
    yield resumed(subject)
    yield damaged(subject, round(1000 * scale))
