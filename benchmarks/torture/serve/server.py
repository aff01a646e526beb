"""A server as a process of its own, and what can be seen of it from outside."""

import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.client import HOST, Answer, once

OURS = (sys.executable, "-m", "ritornello.cli", "serve")
PATIENCE = 180.0  # seconds for it to start, or to end
RUN = "python"
STALE = 0.3  # seconds


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Server:
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    key: str | None = None

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """From outside of any event loop."""
        keyed = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return asyncio.run(once(self.port, method, path, body, **(keyed | headers)))

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def resident(self) -> float:
        """MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def n_open(self) -> int:
        """Sockets and files."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metrics(self) -> dict[str, float]:
        """By name and labels, as they stand there."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    def busy(self) -> tuple[int, int, int]:
        """Texts running and waiting, bytes of keys and values that are held for them."""
        found = self.metrics()
        running, waiting = (sum_of(found, f"ritornello_requests_{state}") for state in ("running", "waiting"))
        used, idle = (sum_of(found, "ritornello_kv_bytes", f'state="{state}"') for state in ("used", "idle"))
        return int(running), int(waiting), int(used - idle)

    def idle(self, seconds: float) -> float | None:
        """How long until nothing runs or waits and no keys and values are held, also a moment later, since what
        /metrics says may be a little old; None: longer than that."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            free, taken = not any(self.busy()), time.monotonic() - begun
            if free:
                time.sleep(STALE)
                if not any(self.busy()):
                    return taken
            time.sleep(0.02)
        return None

    def end(self, signum: int = signal.SIGTERM, seconds: float = PATIENCE) -> int | None:
        """Its exit code, None where it did not end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signum)
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None


def sum_of(metrics: dict[str, float], name: str, label: str = "") -> float:
    """Raises KeyError where there is none of that name."""
    found = [value for key, value in metrics.items() if re.match(rf"{name}(_total)?(\{{|$)", key) and label in key]
    if not found:
        raise KeyError(name)
    return sum(found)


@contextmanager
def server(
    *options: str, run: str = RUN, port: int | None = None, command: Sequence[str] = OURS, key: str | None = None
) -> Iterator[Server]:
    """One that answers already."""
    with tempfile.TemporaryDirectory() as folder:
        port = port or free_port()
        found = started(*options, run=run, port=port, command=command, log=Path(folder, "log"), key=key)
        try:
            wait_ready(found)
            yield found
        finally:
            found.process.kill()
            found.process.wait()


def started(
    *options: str, run: str, port: int, command: Sequence[str] = OURS, log: Path, key: str | None = None
) -> Server:
    with log.open("wb") as out:
        arguments = [*command, run, "--port", str(port), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
    return Server(port, process, log, key)


def wait_ready(found: Server) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and found.alive:
        if is_ready(found.port):
            return
        time.sleep(0.05)
    raise RuntimeError(f"not ready, exit code {found.process.poll()}: {found.said()[-2000:]}")


def is_ready(port: int) -> bool | None:
    """None: nobody listens."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/ready", timeout=5) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return None


@dataclass
class Watch:
    """How long /health took meanwhile, in seconds, and what went wrong."""

    server: Server
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.torture.serve.watch", str(self.server.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        told, _ = self._process.communicate()
        self.seconds, self.problems = json.loads(told)

    @property
    def p99(self) -> float:
        return percentile(self.seconds, 99)


def percentile(values: Sequence[float], share: int) -> float:
    if len(values) < 2:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def milliseconds(values: Sequence[float]) -> str:
    return ", ".join(f"p{share} {1000 * percentile(values, share):.0f} ms" for share in (50, 99))


def shown(answer: Answer) -> str:
    return f"{answer.status} {answer.body[:200]!r}"


def error_problem(answer: Answer) -> str | None:
    """What is wrong with a refusal: it has to be OpenAI's."""
    try:
        error = json.loads(answer.body)["error"]
        ok = set(error) >= {"message", "type", "param", "code"} and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        ok = False
    return None if ok and error["message"] else f"no error of OpenAI's form: {shown(answer)}"
