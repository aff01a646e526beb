"""Who has no key, or part of one, gets nothing; and a key is told to nobody."""

import asyncio
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import client
from benchmarks.torture.serve import control
from benchmarks.torture.serve.server import OURS, PATIENCE, RUN, Server, error_problem, free_port, server, shown
from benchmarks.torture.subject import Row, row

KEY = "Rt-7f3A9c2E5b8D1a4C6e0B"
OPEN = {"/", "/health", "/ready"}
WRONG = {
    "none": None,
    "another": "Bearer " + "x" * len(KEY),
    "lower-cased": f"Bearer {KEY.lower()}",
    "upper-cased": f"Bearer {KEY.upper()}",
    "a prefix": f"Bearer {KEY[:-1]}",
    "longer": f"Bearer {KEY}x",
    "with a blank": f"Bearer {KEY} {KEY}",
    "empty": "Bearer ",
    "no scheme": KEY,
    "Basic": f"Basic {KEY}",
    "a surrogate": "Bearer \udcff",
    "huge": "Bearer " + "x" * 8000,
}
METHODS = "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"
UNKNOWN = "/none", "/v1", "/v1/models/x", "/docs/oauth2-redirect", "/redoc", "/v1/../metrics", "//metrics", "/metrics/"


def paths(found: Server) -> list[str]:
    known = json.loads(found.ask("GET", "/openapi.json").body)["paths"]
    return [*(path.replace("{", "").replace("}", "") for path in known), "/docs", "/openapi.json", "/metrics", *UNKNOWN]


def unkeyed(found: Server, methods: Sequence[str] = METHODS) -> tuple[list[str], int]:
    """Every route by every method with every wrong key."""
    problems, n = [], 0
    for path in dict.fromkeys(paths(found)):
        for method in methods:
            for name, value in WRONG.items():
                answer = asyncio.run(client.once(found.port, method, path, b"{}", Authorization=value))
                n += 1
                if path in OPEN:
                    continue
                refused = answer.status == 401 and (method == "HEAD" or not error_problem(answer))
                problems += [] if refused else [f"{method} {path}, key {name}: {shown(answer)}"]
                problems += [f"{method} {path} tells the key"] if KEY.encode() in answer.body else []
    return problems, n


def keyed(found: Server) -> list[str]:
    """The right one opens, also the second of the file; nobody can read it anywhere."""
    problems = []
    for key in (KEY, "second-" + KEY):
        answer = asyncio.run(client.once(found.port, "GET", "/v1/models", Authorization=f"Bearer {key}"))
        problems += [] if answer.status == 200 else [f"the right key: {shown(answer)}"]
    asyncio.run(client.once(found.port, "POST", f"/v1/{KEY}?key={KEY}", b"{", Authorization=f"Bearer {KEY}"))
    argv = Path(f"/proc/{found.process.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{found.process.pid}/environ").read_bytes()
    problems += ["in argv or the environment"] if KEY.encode() in argv + environment else []
    lines = [line for line in found.said().splitlines() if KEY in line and f"/v1/{KEY}" not in line]
    return problems + ([f"in the log: {lines[0]}"] if lines else [])


def rows(scale: float) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys")
        path.write_text(f"{KEY}\nsecond-{KEY}\n")
        path.chmod(0o600)
        with server("--api-key-file", str(path), key=KEY) as found:
            problems, n = unkeyed(found)
            yield row("server: no key, or a wrong one", n, problems, "401 on all routes but /, /health and /ready")
            yield row("server: the key is told nowhere", 1, keyed(found), "no log line, argument or answer")
    with server(command=control.command("open")) as found:
        problems, n = unkeyed(found)
    yield row("server: control, a server without locks", n, [] if problems else ["not noticed"], problems[0])
    yield row("server: refused starts", len(REFUSED), refused_starts(), "one line, exit code 2")
    with server() as found:
        yield row("server: another host's name", len(HOSTS), rebound(found), "refused on loopback without a key")


REFUSED = {
    "the world without a key": ("--host", "0.0.0.0"),
    "the world without a key, IPv6": ("--host", "::"),
    "no such file of keys": ("--api-key-file", "/none/such"),
    "an empty file of keys": ("--api-key-file", "/dev/null"),
    "a directory of keys": ("--api-key-file", "/tmp"),
    "no port": ("--port", "65536"),
}
HOSTS = "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1].evil", "a b"


def refused_starts() -> list[str]:
    found = ((name, refusal(*options)) for name, options in REFUSED.items())
    return [f"{name}: {said}" for name, said in found if said]


def refusal(*options: str, run: str = RUN, port: int | None = None) -> str | None:
    """What is wrong with how it refuses to start: in one line, with exit code 2."""
    command = [*OURS, run, "--port", str(port or free_port()), *options]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "it runs"
    lines = ended.stderr.strip().splitlines()
    ok = ended.returncode == 2 and len(lines) == 1 and "Traceback" not in ended.stderr
    return None if ok else f"exit code {ended.returncode}, {len(lines)} lines: {lines[-2:]}"


def rebound(found: Server) -> list[str]:
    """A page of another site whose name was made to lead here."""
    problems = []
    for host in HOSTS:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/"), ("GET", "/metrics")):
            answer = asyncio.run(client.once(found.port, method, path, b"{}", Host=host))
            problems += [] if 400 <= answer.status < 500 else [f"Host: {host}, {path}: {shown(answer)}"]
    for host in (f"127.0.0.1:{found.port}", f"localhost:{found.port}", "localhost", f"[::1]:{found.port}"):
        answer = asyncio.run(client.once(found.port, "GET", "/v1/models", Host=host))
        problems += [] if answer.status == 200 else [f"Host: {host}: {shown(answer)}"]
    return problems
