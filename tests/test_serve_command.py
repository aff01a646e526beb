"""`ritornello serve` as it is started, refused and ended; the recipes that start it."""

import configparser
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from ritornello import cli
from ritornello.commands.serve import Serve

RECIPES = Path(__file__).parents[1] / "examples" / "serve"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "::"], "--api-key-file"),
        (["--host", "example.org"], "--api-key-file"),
        (["--port", "65536"], "--port"),
        (["--max-loops", "0"], "--max-loops"),
        (["--max-loops", "5000"], "4096"),
        (["--max-requests", "0"], "--max-requests"),
        (["--memory-mb", "0"], "--memory-mb"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--name", ""], "name"),
        (["--memory-mb", "1"], "at least"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--api-key", "secret"], "unknown option"),
    ],
)
def test_mistakes_are_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "python", "--port", "0", *args]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and said in line


@pytest.mark.parametrize("text", ["", "\n \n", "two words", "k\x00ey", "schlüssel"])
def test_a_file_without_a_key_opens_nothing(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    assert cli.main(["serve", "python", "--port", "0", "--api-key-file", str(file)]) == 2
    said = capsys.readouterr().err
    assert "--api-key-file" in said and (not text.strip() or text.strip() not in said)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "python", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_it_answers_and_ends_as_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("Secret-Key\n")
    args = ["serve", "python", "--port", "0", "--api-key-file", str(file), "--name", "our python", "--access-log"]
    command = [sys.executable, "-m", "ritornello.cli", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stderr
            url = process.stdout.readline().split()[-1]
            assert "Secret" not in Path(f"/proc/{process.pid}/cmdline").read_text()
            body = {"model": "our python", "prompt": "import ", "loops": 2, "max_tokens": 60, "stream": True}
            with (
                httpx.Client(headers={"authorization": "Bearer Secret-Key"}, timeout=30) as client,
                client.stream("POST", f"{url}/v1/completions", json=body) as answer,
            ):
                lines = answer.iter_lines()
                assert next(lines).startswith("data: {")
                os.kill(process.pid, signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            assert process.wait(10) == 0
            assert process.stdout.read() == ""
            log = process.stderr.read()
        finally:
            process.kill()  # or a failure would wait for it for ever
    assert "POST /v1/completions" in log and "Secret" not in log and "Traceback" not in log


def test_the_recipes_start_what_there_is() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(RECIPES / "ritornello.service")
    started = shlex.split(unit["Service"]["ExecStart"])
    text = (RECIPES / "Dockerfile").read_text()
    entry, command = (json.loads(re.findall(rf"^{name} (\[.*\])", text, re.M)[0]) for name in ("ENTRYPOINT", "CMD"))
    for program, verb, *args in (started, [*entry, *command]):
        assert Path(program).name == "ritornello" and verb == "serve"
        found = cli.parse([verb, *args])
        assert isinstance(found, Serve) and found.api_key_file is not None
    assert float(unit["Service"]["TimeoutStopSec"]) > found.drain_seconds
    assert "/health" in re.findall(r"HEALTHCHECK[^\n]*\n[^\n]*", text)[0]
