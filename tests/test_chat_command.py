"""ritornello chat: lines in, answers out, commands between them, and Ctrl-C."""

import builtins
import io
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from ritornello import cli
from ritornello.engine import generate
from ritornello.train.tokenizer import ByteTokenizer
from tests.engine.test_chat import read, small, talk


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = small()
    monkeypatch.setattr(generate, "load", lambda path, device: found)
    return found


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *args: str
) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = cli.main(["chat", "run", "--max-tokens", "12", "--temperature", "0", *args])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_lines_of_a_pipe_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: Any
) -> None:
    expected = talk(loaded, system="s")
    answers = [read(expected.ask(question)) for question in ("one", "two")]
    code, out, err = chat(monkeypatch, capsys, "one\n\ntwo\r\n", "--system", "s")
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert [line.partition("tokens, ")[2] for line in err] == ["3.0 loops in the mean)"] * 2
    assert chat(monkeypatch, capsys, "one\ntwo", "--system", "s", "-q") == (0, out, [])
    assert chat(monkeypatch, capsys, "one\ntwo\n", "-q")[1] != out  # control: without the system's message


def test_commands_change_depth_and_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: Any
) -> None:
    expected = talk(loaded, n_loops=2)
    first = read(expected.ask("one"))
    expected.reset()
    again = read(expected.ask("two"))
    lines = "/loops 2\none\n/reset\ntwo\n/loops\n/loops x\n/loops 0\n/lops\n/help\n/exit\nthree\n"
    code, out, err = chat(monkeypatch, capsys, lines)
    assert (code, out) == (0, f"{first}\n{again}\n")
    said = [line for line in err if not line.startswith("(")]
    assert said[:3] == ["2 loops from here on", "forgotten", "2 loops"]
    wrong = "/loops = 'x': must be a number", "loops = 0: must be an integer in [1, 4096]", "/lops: no such command"
    assert [line.startswith(f"ritornello: error: {text}") for line, text in zip(said[3:], wrong, strict=False)] == [
        True
    ] * 3
    assert said[6].startswith("/loops N") and len(expected.messages) == 2


def test_a_mistake_ends_it_before_a_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: Any
) -> None:
    for args, problem in (
        (["--loops", "0"], "--loops = 0"),
        (["--min-loops", "2"], "--min-loops = 2"),
        (["--lops", "2"], "did you mean --loops?"),
    ):
        code, out, err = chat(monkeypatch, capsys, "one\n", *args)
        assert (code, out, len(err)) == (2, "", 1) and problem in err[0]
    plain = replace(loaded, tokenizer=ByteTokenizer())
    monkeypatch.setattr(generate, "load", lambda path, device: plain)
    code, out, err = chat(monkeypatch, capsys, "one\n")
    assert (code, out, len(err)) == (2, "", 1) and "must be a run trained on conversations; train one with" in err[0]


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = small(max_seq_len=64)
    monkeypatch.setattr(generate, "load", lambda path, device: found)
    code, out, err = chat(monkeypatch, capsys, "\n".join(["a" * 20, "b" * 20, "c" * 90, "d"]), "-q")
    assert code == 0 and out.count("\n") >= 3
    assert err[0] == "the oldest turn is forgotten: no room for more"
    assert "message = '93 tokens': must be fewer than max_seq_len = 64" in err[1]


def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: Any) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def typed(given: Iterable[Any]) -> Any:
        lines = iter(given)

        def ask(prompt: str) -> str:
            line = next(lines)
            if isinstance(line, type):
                raise line
            return line

        return ask

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", typed([KeyboardInterrupt, "one", EOFError]))
    assert cli.main(["chat", "run", "--max-tokens", "12", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == read(talk(loaded).ask("one")) + "\n"
    assert "/help names the commands" in err and "(Ctrl-D ends)" in err


ENDLESS = """
import sys, time
from ritornello.cli import main
from ritornello.engine import generate
from ritornello.engine.engine import Engine
from tests.engine.test_chat import small
loaded = small(max_seq_len=4096)
loaded.model.head.weight.data[256:] = 0  # never the likeliest: the answer does not end
step = Engine.step
def slow(self):
    time.sleep(0.002)
    return step(self)
Engine.step = slow
generate.load = lambda path, device: loaded
sys.exit(main(["chat", "run", "--max-tokens", "3000", "--temperature", "0"]))
"""


def test_control_c_stops_the_answer_and_not_the_program() -> None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", ENDLESS], **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        try:
            for _ in range(2):
                process.stdin.write(b"tell me everything\n")
                process.stdin.flush()
                assert process.stdout.read(3)  # it has begun
                process.send_signal(signal.SIGINT)
                assert process.stderr.readline().startswith(b"(stopped; ")
            process.stdin.close()
            assert process.wait(20) == 0
            assert process.stderr.read() == b""
        finally:
            process.kill()
