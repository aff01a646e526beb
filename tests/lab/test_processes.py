"""Work in processes of their own: all of it is done, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from ritornello.lab import processes
from ritornello.lab.processes import Beside, each_alone


class StrangeError(Exception):
    """Does not survive pickling, as exceptions with arguments of their own do not."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def work(folder: str, name: str) -> str:
    """What `name` asks for, and a file that says so."""
    if name == "fail":
        raise OSError(28, "disk full")
    if name == "strange":
        raise StrangeError(3, "at step 3")
    if name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if name == "die":
        os._exit(3)
    if name == "sleep":
        time.sleep(600)
    Path(folder, name).touch()
    return f"{name} {os.getpid()}"


SLEEPS = """
import time
from ritornello.lab.processes import each_alone
if __name__ == "__main__":
    for _ in each_alone(time.sleep, [(0.0,), (600.0,)], at_once=2):
        print("one", flush=True)
"""


def test_control_c_is_the_parents_alone(tmp_path: Path) -> None:
    """A terminal sends it to all; only one of them says so."""
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    how: Any = {"start_new_session": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(tmp_path / "sleeps.py")], **how) as process:
        assert process.stdout.readline() == b"one\n"
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert said.count(b"KeyboardInterrupt") == 1 and b"SpawnProcess" not in said


def test_beside_this_one(tmp_path: Path) -> None:
    asleep, done = Beside(work, str(tmp_path), "sleep"), Beside(work, str(tmp_path), "a")
    assert done.result().startswith("a ") and not asleep.ends_within(0.01)
    asleep.stop()
    asleep.end()
    assert not active_children()


def test_each_has_a_process_of_its_own(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    done = dict(line.split() for line in each_alone(work, [(str(tmp_path), name) for name in names], at_once=2))
    assert sorted(done) == names == sorted(path.name for path in tmp_path.iterdir())
    assert len({*done.values(), str(os.getpid())}) == 5
    assert not active_children()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fail", OSError, "disk full"),
        ("die", RuntimeError, "exit code 3"),
        ("strange", RuntimeError, "StrangeError: at step 3"),
    ],
)
def test_a_failure_ends_the_others(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message):
        list(each_alone(work, [(str(tmp_path), "sleep"), (str(tmp_path), name), (str(tmp_path), "later")], at_once=2))
    assert time.monotonic() - start < 60 and not active_children()
    assert not (tmp_path / "later").exists()


def test_one_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    lines = each_alone(work, [(str(tmp_path), "stubborn"), (str(tmp_path), "a")], at_once=2)
    assert next(lines).startswith("a ")
    time.sleep(1)  # it has been told to ignore by now, or is ended before: both must leave nothing behind
    lines.close()
    assert not active_children()


def test_leaving_ends_them(tmp_path: Path) -> None:
    lines = each_alone(work, [(str(tmp_path), "a"), (str(tmp_path), "sleep")], at_once=2)
    assert next(lines).startswith("a ")
    lines.close()
    assert not active_children()
