import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ritornello.train import files

Ops = list[tuple[str, Path]]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Ops:
    """Every system call that `files` makes, in order."""
    log: Ops = []
    run = files._run

    def record(operation: str, path: Path, call: Callable[..., Any], *arguments: object) -> Any:
        log.append((operation, path))
        return run(operation, path, call, *arguments)

    monkeypatch.setattr(files, "_run", record)
    return log


def fail_at(monkeypatch: pytest.MonkeyPatch, index: int, code: int) -> None:
    """Let the `index`-th system call from now fail with errno `code`."""
    run, count = files._run, iter(range(10**9))

    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def injected(operation: str, path: Path, call: Callable[..., Any], *arguments: object) -> Any:
        return run(operation, path, failing if next(count) == index else call, *arguments)

    monkeypatch.setattr(files, "_run", injected)


def short_writes(monkeypatch: pytest.MonkeyPatch, *, capacity: int) -> None:
    """A disk that takes three bytes a call, and `capacity` bytes in all."""
    write, left = os.write, [capacity]

    def limited(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: min(3, left[0])])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_write_atomic_syncs_before_it_renames(tmp_path: Path, operations: Ops):
    target = tmp_path / "a"
    files.write_atomic(target, b"old")
    operations.clear()
    files.write_atomic(target, memoryview(b"new!"))
    assert target.read_bytes() == b"new!"
    steps = ["open", "write 4 bytes", "sync", "rename into place", "open", "sync"]
    assert operations == [(step, target) for step in steps[:4]] + [(step, tmp_path) for step in steps[4:]]
    assert names(tmp_path) == ["a"]


def test_create_streams_and_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    short_writes(monkeypatch, capacity=100)
    with files.create(tmp_path / "a") as out:
        assert out.write(b"0123456789") == 10
        assert out.write(bytearray(b"abc")) == 3
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_create_leaves_nothing_when_the_block_fails(tmp_path: Path, error: type[BaseException]):
    files.write_atomic(tmp_path / "a", b"old")
    with pytest.raises(error), files.create(tmp_path / "a") as out:
        out.write(b"new")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("index", range(6))
def test_every_failure_of_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, code: int):
    target = tmp_path / "a"
    files.write_atomic(target, b"old")
    fail_at(monkeypatch, index, code)
    with pytest.raises(OSError) as caught:
        files.write_atomic(target, b"new")
    assert caught.value.errno == code and type(caught.value) is type(OSError(code, ""))
    assert "cannot " in str(caught.value) and caught.value.filename == str(target if index < 4 else tmp_path)
    assert ("3 bytes" in str(caught.value)) == (index == 1)
    assert target.read_bytes() == (b"old" if index < 4 else b"new") and names(tmp_path) == ["a"]


def test_no_failure_without_injection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_at(monkeypatch, 6, errno.EIO)
    files.write_atomic(tmp_path / "a", b"new")  # the six calls above are all there are


def test_a_cleanup_that_fails_too_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(operation: str, path: Path, call: Callable[..., Any], *arguments: object) -> Any:
        if operation in ("sync", "remove"):
            raise OSError(errno.EIO, operation)
        return call(*arguments)

    monkeypatch.setattr(files, "_run", broken)
    with pytest.raises(OSError, match="sync") as caught:
        files.write_atomic(tmp_path / "a", b"new")
    assert caught.value.__notes__ == ["left behind: [Errno 5] remove"]


def test_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    files.append(path, b"one\n")
    files.append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    short_writes(monkeypatch, capacity=4)
    with pytest.raises(OSError, match="cannot write"):
        files.append(path, b"three\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_make_directory(tmp_path: Path, operations: Ops):
    files.make_directory(tmp_path / "a" / "b")
    assert [path for step, path in operations if step == "sync"] == [tmp_path, tmp_path / "a"]
    operations.clear()
    files.make_directory(tmp_path / "a" / "b")
    assert operations == []
    files.write_atomic(tmp_path / "file", b"")
    with pytest.raises(FileExistsError, match="cannot create the directory"):
        files.make_directory(tmp_path / "file" / "b")


def fill(directory: Path, content: bytes) -> Path:
    files.make_directory(directory / "deep")
    (directory / "a").write_bytes(content)
    (directory / "deep" / "b").write_bytes(content)
    return directory


def test_publish_syncs_everything_then_renames(tmp_path: Path, operations: Ops):
    temporary, final = fill(tmp_path / ".tmp-x", b"new"), tmp_path / "final"
    operations.clear()
    files.publish(temporary, final)
    synced = [path for step, path in operations if step == "sync"]
    assert synced == [temporary / "deep" / "b", temporary / "deep", temporary / "a", temporary, tmp_path]
    assert operations.index(("rename into place", final)) == operations.index(("sync", temporary)) + 1
    assert names(tmp_path) == ["final"] and (final / "deep" / "b").read_bytes() == b"new"


@pytest.mark.parametrize("index", range(13))
def test_every_failure_of_publishing_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int):
    final = fill(tmp_path / "final", b"old")
    fail_at(monkeypatch, index, errno.EIO)
    with pytest.raises(OSError, match="cannot"), files.create_directory(final) as temporary:
        (temporary / "a").write_bytes(b"new")
        if index == 12:
            raise OSError(errno.EIO, "cannot go on")  # the calls before it are all there are
    left = set(names(tmp_path)) - {"final"}
    assert (final / "a").read_bytes() in ((b"new",) if left else (b"old", b"new"))
    assert all(name.startswith(files.TEMPORARY) for name in left), "only what could not be removed stays"


def test_create_directory(tmp_path: Path):
    final = fill(tmp_path / "final", b"old")
    with files.create_directory(final) as temporary:
        (temporary / "a").write_bytes(b"new")
        assert (final / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["final"] and names(final) == ["a"]


def test_remove_tree_keeps_what_a_link_points_to(tmp_path: Path):
    kept = fill(tmp_path / "kept", b"x")
    doomed = fill(tmp_path / "doomed", b"x")
    (doomed / "link").symlink_to(kept)
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").write_bytes(b"")
    for name in ("doomed", "link", "file"):
        files.remove_tree(tmp_path / name)
    assert names(tmp_path) == ["kept"] and names(kept) == ["a", "deep"]


def test_require_space(tmp_path: Path):
    files.require_space(tmp_path, 1)
    with pytest.raises(OSError, match=f"{2**62} bytes needed") as caught:
        files.require_space(tmp_path, 2**62)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)


def test_lock_names_the_holder_and_dies_with_it(tmp_path: Path):
    script = (
        "import sys, time\nfrom ritornello.train import files\n"
        "with files.lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid};"), files.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with files.lock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()};"), files.lock(tmp_path):
        pass
    with files.lock(tmp_path):
        pass


def test_a_file_is_held_by_one_beside_it(tmp_path: Path):
    target = tmp_path / "a"
    with files.lock_file(target):
        files.write_atomic(target, b"another file of that name")
        with pytest.raises(ValueError, match=f"^{target}: in use by process {os.getpid()};"), files.lock_file(target):
            pass
        with files.lock_file(tmp_path / "b"):
            pass
    with files.lock_file(target):
        pass
