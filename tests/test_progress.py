"""Progress: plain lines off a terminal, a bar on one, colours only where they are welcome."""

import os
import pty
import re
import subprocess
import sys

import pytest

from ritornello.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(capsys: pytest.CaptureFixture[str], *, quiet: bool = False) -> list[str]:
    """Six reports, four seconds apart, of a run resumed at step 10."""
    clock = Clock()
    with Progress(60, quiet=quiet, every=10.0, clock=clock) as progress:
        for done in range(0, 30, 10):
            progress.stage("tokenise", done, 20)
            clock.now += 6.0
        for step in range(10, 70, 10):
            progress.update(step, {"loss": 3.0 - step / 100, "tok_per_s": 1234.0})
            clock.now += 4.0
        progress.update(60, {"bpb/1": 2.5, "bpb/4": 1.25})
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_plain_lines_come_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys) == [
        "tokenise 0%",
        "tokenise 100%",
        "step 10/60  loss 2.9000  1.2k tok/s",
        "step 40/60  loss 2.6000  1.2k tok/s  ETA 0:00:08",
        "step 60/60  loss 2.4000  1.2k tok/s  ETA 0:00:00",
        "step 60: bpb/1 2.5, bpb/4 1.25",
    ]


def test_things_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(0, every=10.0, clock=clock) as progress:
        for done in range(20, 31):
            progress.count(done, 30)
            clock.now += 3.0
    assert capsys.readouterr().err.splitlines() == [
        "20/30",
        "24/30  ETA 0:00:18",
        "28/30  ETA 0:00:06",
        "30/30  ETA 0:00:00",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, quiet=True) == []


BAR = """
import time
from ritornello.progress import Progress
with Progress(2) as progress:
    progress.stage("tokenise", 1, 2)
    time.sleep(0.5)  # the bar is drawn four times a second
    progress.update(1, {"loss": 3.0, "tok_per_s": 1234.0})
    time.sleep(0.5)
    progress.update(1, {"bpb": 2.5})
    progress.update(2, {"loss": 2.0})
"""


def on_a_terminal(**environment: str) -> str:
    """What a terminal of 100 columns receives."""
    reader, writer = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    clean |= {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    with subprocess.Popen([sys.executable, "-c", BAR], stderr=writer, env=clean) as process:
        os.close(writer)
        seen = b""
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not piece:
                break
            seen += piece
        assert process.wait() == 0
    os.close(reader)
    return seen.decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")


def test_a_terminal_gets_a_bar_with_loss_and_speed() -> None:
    seen = on_a_terminal()
    assert all(
        words in seen for words in ("tokenise 50%", "1/2", "2/2", "loss 3.0000", "1.2k tok/s", "ETA", "step 1: bpb 2.5")
    )
    assert COLOUR.search(seen)


def test_no_color_is_respected() -> None:
    seen = on_a_terminal(NO_COLOR="1")
    assert "loss 2.0000" in seen and not COLOUR.search(seen)


@pytest.mark.parametrize("there", [False, True], ids=["closed", "full"])
def test_nobody_has_to_read_it(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A standard error that is closed or takes nothing ends no run, and nothing is said elsewhere instead."""
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w") if there else None
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        with Progress(2) as progress:
            progress.note("x")
            progress.note("y")
    assert capsys.readouterr().out == ""
    if full is not None:
        with pytest.raises(OSError, match="No space"):  # what it could not be rid of
            full.close()
