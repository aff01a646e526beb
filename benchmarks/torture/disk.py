"""A disk that fails: every system call of a run in turn, with each of four errors."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.torture.subject import SAVE_EVERY, Row, Subject, ended, forked, place, row
from ritornello.train import files

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)
SAID, UNTOUCHED = 4, 5  # exit codes of a child whose error named the path, and of one that made no such call


def failing(subject: Subject, code: int, *, background: bool) -> Row:
    """The index-th system call fails, later ones work: the run must stop with a message, or go on where nothing is lost
    by that, and its continuation must end as if nothing had happened."""
    out, steps, problems, index = subject.folder / "failing", 3 * SAVE_EVERY, [], 0
    work = lambda: subject.run(out, background=background, steps=steps)  # noqa: E731
    while (end := ended(forked(lambda: _one_fails(index, code, work, out)))) != UNTOUCHED:  # noqa: B023
        found = [subject.problem(out)] if out.exists() else []
        found += [f"exit code {end}"] if end not in (0, SAID) else []
        if end == SAID:
            found += [f"{path.name} left behind" for path in out.rglob(f"{files.TEMPORARY}*")]
        found += [] if ended(forked(work)) == 0 else ["cannot be resumed"]
        found += [subject.problem(out, least=steps)]
        problems += [f"call {index}: {problem}" for problem in found if problem]
        shutil.rmtree(out)
        index += 1
    shutil.rmtree(out)
    name = f"{errno.errorcode[code]} at every system call, checkpoints in the {place(background)}"
    return row(name, index, problems, "each said where, or went on; nothing temporary left; resumed, equal bit for bit")


def _one_fails(index: int, code: int, work: Callable[[], object], out: Path) -> None:
    run, calls = files._run, [0]

    def injected(operation: str, path: Path, call: Callable[..., Any], *arguments: Any) -> Any:
        this, calls[0] = calls[0], calls[0] + 1

        def fail(*_: Any) -> None:
            raise OSError(code, os.strerror(code))

        return run(operation, path, fail if this == index else call, *arguments)

    files._run = injected
    try:
        work()
    except OSError as error:
        os._exit(SAID if str(out.parent) in str(error) else 3)  # in which `out` itself is made
    os._exit(0 if calls[0] > index else UNTOUCHED)


def rows(subject: Subject) -> Iterator[Row]:
    for code in ERRORS:
        for background in (True, False):
            yield failing(subject, code, background=background)
