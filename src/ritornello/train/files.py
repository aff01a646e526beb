"""The one module that opens for writing, writes, syncs, renames and removes.

A reader sees the old content or the new, never a part: everything is written under a temporary name beside its target,
synced, and renamed into place. Every system call goes through `_run`, so a test can fail each of them in turn.
An `OSError` keeps its class and errno; its message names the operation, the path and the bytes needed.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
AnyPath = str | os.PathLike[str]
TEMPORARY = ".tmp-"  # every temporary name starts so: what a killed process left can be told, and is never read


def _run(operation: str, path: Path, call: Callable[..., Result], *arguments: object) -> Result:
    """One system call; its error says what was attempted where."""
    try:
        return call(*arguments)
    except OSError as error:
        raise type(error)(error.errno, f"cannot {operation}: {error.strerror}", str(path)) from error


@contextmanager
def _opened(path: Path, flags: int, target: Path | None = None) -> Generator[int, None, None]:
    """A descriptor of `path`; errors name `target`, the final name of a temporary."""
    descriptor = _run("open", target or path, os.open, path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as descriptor:
        _run("sync", path, os.fsync, descriptor)


class Writer:
    """An unbuffered binary stream: hand it large pieces. Errors name `path`, the final name."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`, a contiguous buffer; returns its bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:  # one call writes at most 2 GiB, and less on a nearly full disk
            left = left[_run(f"write {len(left)} bytes", self.path, os.write, self._descriptor, left) :]
        return size


@contextmanager
def create(path: AnyPath) -> Generator[Writer, None, None]:
    """A binary writer for `path`, which appears, complete and synced, when the block ends without an error."""
    path = Path(path)
    with _temporary(path) as temporary:
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, path) as descriptor:
            yield Writer(path, descriptor)
            _run("sync", path, os.fsync, descriptor)
        _run("rename into place", path, os.replace, temporary, path)
    _sync(path.parent)


def write_atomic(path: AnyPath, data: bytes | memoryview) -> None:
    """Replace the content of `path` by `data`, durably and all at once."""
    with create(path) as out:
        out.write(data)


def append(path: AnyPath, data: bytes) -> None:
    """Add `data` at the end of `path`, all or nothing. Outlives a killed process, not a power cut: it is not synced."""
    path = Path(path)
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        size = os.fstat(descriptor).st_size
        try:
            Writer(path, descriptor).write(data)
        except BaseException:
            os.ftruncate(descriptor, size)  # half a line would swallow the next one
            raise


def make_directory(path: AnyPath) -> None:
    """Create `path` and its missing parents, durably; one that exists is left alone."""
    path = Path(path)
    if path.is_dir():
        return
    make_directory(path.parent)
    _run("create the directory", path, lambda: path.mkdir(exist_ok=True))
    _sync(path.parent)


@contextmanager
def create_directory(path: AnyPath) -> Generator[Path, None, None]:
    """A temporary directory to fill, which is published as `path` when the block ends without an error."""
    path = Path(path)
    with _temporary(path) as temporary:
        make_directory(temporary)
        yield temporary
        publish(temporary, path)


def publish(temporary_dir: AnyPath, final_dir: AnyPath) -> None:
    """Sync every file and directory inside `temporary_dir` and rename it to `final_dir`.

    A `final_dir` that exists is moved aside first, put back if the rename fails, and removed at the end.
    """
    temporary_dir, final_dir = Path(temporary_dir), Path(final_dir)
    for folder, _, names in os.walk(temporary_dir, topdown=False):
        for path in [Path(folder, name) for name in names] + [Path(folder)]:
            _sync(path)
    aside = _sibling(final_dir) if final_dir.exists() else None
    if aside:
        _run("move aside", final_dir, os.rename, final_dir, aside)
    try:
        _run("rename into place", final_dir, os.rename, temporary_dir, final_dir)
    except BaseException:
        if aside:
            _run("put back", final_dir, os.rename, aside, final_dir)
        raise
    _sync(final_dir.parent)
    if aside:
        remove_tree(aside)


def remove_tree(path: AnyPath) -> None:
    """Remove a file or a whole directory. Its name is gone at once, even if the process dies half-way."""
    path = doomed = Path(path)
    if not path.name.startswith(TEMPORARY):
        doomed = _sibling(path)
        _run("rename for removal", path, os.rename, path, doomed)
    _run("remove", path, shutil.rmtree if doomed.is_dir() and not doomed.is_symlink() else os.unlink, doomed)


def require_space(directory: AnyPath, n_bytes: int) -> None:
    """Raise `OSError` (ENOSPC) if the disk of `directory` has less than `n_bytes` free."""
    directory = Path(directory)
    free = _run("read the free space", directory, shutil.disk_usage, directory).free
    if free < n_bytes:
        message = f"not enough disk space: {n_bytes} bytes needed, {free} free; remove old runs or choose another disk"
        raise OSError(errno.ENOSPC, message, str(directory))


@contextmanager
def lock(directory: AnyPath, *, shared: bool = False) -> Generator[None, None, None]:
    """Hold `directory` for this process. The kernel frees a dead process's lock, so nothing is ever left locked.
    shared: with others that share it.

    Raises:
        ValueError: another process holds it; the message names its pid.
    """
    with _held(Path(directory, ".lock"), Path(directory), fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
        yield


@contextmanager
def lock_file(path: AnyPath) -> Generator[None, None, None]:
    """Hold the file `path` as `lock` does a directory, whether it exists or not: by another beside it, since
    `path` itself may be replaced meanwhile. It stays: whoever removed it might take it from the next holder."""
    path = Path(path)
    with _held(path.with_name(f".{path.name}.lock"), path):
        yield


@contextmanager
def _held(path: Path, what: Path, kind: int = fcntl.LOCK_EX) -> Generator[None, None, None]:
    with _opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            _run("lock", path, fcntl.flock, descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            remedy = "wait for it, or choose another name"
            raise ValueError(f"{what}: in use by process {holder}; {remedy}") from error
        os.ftruncate(descriptor, 0)
        _run("write the process id", path, os.write, descriptor, str(os.getpid()).encode())
        yield


def is_locked(directory: AnyPath) -> bool:
    """Whether a process holds `directory`, as `lock` does."""
    path = Path(directory, ".lock")
    if not path.exists():
        return False
    with _opened(path, os.O_RDONLY) as descriptor:
        try:
            _run("lock", path, fcntl.flock, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sibling(path: Path) -> Path:
    """An unused name on the same file system, so that a rename is one step."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:12]}")


@contextmanager
def _temporary(path: Path) -> Generator[Path, None, None]:
    """A sibling's name; what bears it is removed if the block fails, and a second failure must not hide the first."""
    temporary = _sibling(path)
    try:
        yield temporary
    except BaseException as error:
        try:
            if temporary.exists():
                remove_tree(temporary)
        except OSError as second:
            error.add_note(f"left behind: {second}")
        raise
