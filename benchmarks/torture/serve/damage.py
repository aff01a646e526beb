"""What keeps it from starting, and what it leaves when it is killed."""

import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.client import HOST
from benchmarks.torture.serve.auth import refusal
from benchmarks.torture.serve.server import RUN, free_port, server
from benchmarks.torture.subject import Row, row
from ritornello.recipes import find_model


def unreadable(folder: Path) -> dict[str, str]:
    """Runs that are none, by what is wrong with them."""
    empty, cut, text = folder / "empty", folder / "cut", folder / "text"
    empty.mkdir()
    text.write_text("a file")
    cut.mkdir()
    for path in find_model(RUN).iterdir():
        data = path.read_bytes()
        (cut / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    names = {"nothing": folder / "none", "an empty folder": empty, "a file": text, "cut weights": cut}
    return {name: str(path) for name, path in names.items()} | {"control characters": "\x1b[31m"}


def rows(scale: float) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runs = unreadable(Path(folder))
        problems = [f"{name}: {said}" for name, run in runs.items() if (said := refusal(run=run))]
        yield row("server: a run that cannot be read", len(runs), problems, "one line, exit code 2")
    with socket.create_server((HOST, 0)) as taken:
        said = refusal(port=taken.getsockname()[1])
    yield row("server: a port that is in use", 1, [said] if said else [], "one line, exit code 2")
    yield killed(max(2, round(10 * scale)))


def killed(n: int) -> Row:
    """And started again on the same port at once, connections of before still open."""
    port, problems = free_port(), []
    for i in range(n):
        try:
            with server(port=port) as found, socket.create_connection((HOST, port)):
                if found.ask("GET", "/health").status != 200:
                    problems.append(f"trial {i}: not healthy")
                found.end(signal.SIGKILL)
        except RuntimeError as error:
            problems.append(f"trial {i}: {error}")
    return row("server: kill -9, started again on the same port", n, problems, "serves again at once")
