"""A power cut: what a file system may have forgotten after any prefix of a run's system calls."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.torture.subject import SAVE_EVERY, Row, Subject, row
from ritornello.train import files


@dataclass
class Disk:
    """What of a folder has reached the disk. Contents do by fsync of their file, names by fsync of their directory.

    `forget(out)`: nothing else did. `forget(out, names=True)`: names did at once, contents not: an empty file under a
    name that was never synced is what journalling file systems leave.
    """

    contents: dict[int, bytes] = field(default_factory=dict)  # by inode, as last synced
    names: dict[int, dict[str, int]] = field(default_factory=dict)  # by the directory's inode, as last synced
    folders: set[int] = field(default_factory=set)  # inodes of directories among those names

    def see(self, operation: str, path: Path, arguments: tuple[Any, ...], result: Any) -> None:
        """A system call was made: remember what it made durable, and that a new inode has nothing yet."""
        if operation == "open" and arguments[1] & os.O_EXCL:
            self.contents.pop(os.fstat(result).st_ino, None)
        elif operation == "create the directory":
            self.names[path.stat().st_ino] = {}
        elif operation == "sync":
            found = os.fstat(arguments[0])
            if stat.S_ISDIR(found.st_mode):
                entries = list(os.scandir(arguments[0]))
                self.names[found.st_ino] = {entry.name: entry.inode() for entry in entries}
                self.folders |= {entry.inode() for entry in entries if entry.is_dir(follow_symlinks=False)}
            else:
                self.contents[found.st_ino] = Path(f"/proc/self/fd/{arguments[0]}").read_bytes()
                self.folders.discard(found.st_ino)

    def forget(self, source: Path, copy: Path, *, names: bool) -> None:
        """`copy` becomes what is left of the folder `source` after the power was cut now."""
        copy.mkdir(parents=True)
        inode = source.stat().st_ino
        entries = {entry.name: entry.inode() for entry in os.scandir(source)} if names else self.names.get(inode, {})
        for name, number in entries.items():
            present = source / name
            same = present.exists() and present.stat().st_ino == number
            if same and present.is_dir():
                self.forget(present, copy / name, names=names)
            elif not same and number in self.folders:
                self._lost_directory(number, copy / name)
            else:
                (copy / name).write_bytes(self.contents.get(number, b""))

    def _lost_directory(self, number: int, copy: Path) -> None:
        """A directory that was renamed or removed since its name was synced: only what was synced is known."""
        copy.mkdir()
        for name, inner in self.names.get(number, {}).items():
            if inner in self.folders:
                self._lost_directory(inner, copy / name)
            else:
                (copy / name).write_bytes(self.contents.get(inner, b""))


def cut(subject: Subject, *, lost: str = "") -> Row:
    """After each system call of a run, both kinds of forgetting: what is left must hold the newest promise.
    lost: controls, where syncs of "files" or of "directories" do nothing."""
    out, left, disk, problems, count = subject.folder / "cut", subject.folder / "left", Disk(), [], [0, 0]
    run = files._run

    def watched(operation: str, path: Path, call: Callable[..., Any], *arguments: Any) -> Any:
        result = run(operation, path, call, *arguments)
        folder = operation == "sync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
        if operation != "sync" or lost != ("directories" if folder else "files"):
            disk.see(operation, path, arguments, result)
        if out.exists():
            for names in (False, True):
                disk.forget(out, left, names=names)
                problem = subject.problem(left, least=count[1])
                problems.extend([f"call {count[0]}, {operation}: {problem}"] if problem else [])
                shutil.rmtree(left)
        count[0] += 1
        return result

    files._run = watched
    try:
        for steps in range(SAVE_EVERY, 4 * SAVE_EVERY + 1, SAVE_EVERY):
            subject.run(out, background=False, steps=steps)
            count[1] = steps
    finally:
        files._run = run
    shutil.rmtree(out)
    if lost:
        unnoticed = [] if problems else ["lost checkpoints were not noticed"]
        name = f"control: the same where no {lost} are synced"
        return row(name, 2 * count[0], unnoticed, f"a lost checkpoint was noticed {len(problems)} times")
    note = "names and contents that were not synced lost, or contents alone; every promised checkpoint is there"
    return row("power cut after every system call", 2 * count[0], problems, note)


def rows(subject: Subject) -> Iterator[Row]:
    for lost in ("", "files", "directories"):
        yield cut(subject, lost=lost)
