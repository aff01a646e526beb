"""Clients that are slow, half gone, or speak something else: each connection ends in a bounded time, others are served
meanwhile, and nothing of them stays."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.torture.serve.server import Server, milliseconds, percentile, server
from benchmarks.torture.subject import Row, row

BOUND = 45.0  # seconds until the connection is gone, the server's own limits being 10 and 30
SHORT = 3.0  # where there is nothing to wait for
MEANWHILE, LEAST = 1.0, 3  # seconds for a small request of others, p99; of so many at least
LONG: dict[str, Any] = {
    "prompt": "def f(",
    "max_tokens": 900,
    "n": 8,
    "logprobs": 20,
    "stream": True,
}  # 10 MB of answer
BODY = client.request("POST", "/v1/completions", {"model": "python", "prompt": "def f(", "max_tokens": 2})
Ending = Callable[[client.Connection], Awaitable[str | None]]  # what went wrong


@dataclass(frozen=True)
class Kind:
    """What such a client does, how many of them at once, and seconds until it has to be over."""

    does: Ending
    n: int = 8
    bound: float = BOUND


async def until_closed(connection: client.Connection) -> None:
    with_reset = (ConnectionError, asyncio.IncompleteReadError)
    try:
        while await connection.reader.read(1 << 16):
            pass
    except with_reset:
        pass


async def trickled(connection: client.Connection, data: bytes) -> client.Answer:
    """A byte a second, for as long as somebody takes them."""

    async def send() -> None:
        for i in range(len(data)):
            connection.writer.write(data[i : i + 1])
            await asyncio.sleep(1)

    sending = asyncio.create_task(send())
    try:
        return await connection.answer()
    finally:
        sending.cancel()


async def slow_head(connection: client.Connection) -> str | None:
    answer = await trickled(connection, BODY)
    return None if answer.status in (0, 408) else f"{answer.status}"


async def silent(connection: client.Connection) -> None:
    await until_closed(connection)


async def slow_body(connection: client.Connection) -> str | None:
    head, _, body = BODY.partition(b"\r\n\r\n")
    connection.writer.write(head + b"\r\n\r\n")
    answer = await trickled(connection, body)
    return None if answer.status == 408 else f"{answer.status}, not 408"


async def body_that_stops(connection: client.Connection) -> str | None:
    connection.writer.write(BODY[:-5])
    answer = await connection.answer()
    return None if answer.status == 408 else f"{answer.status}, not 408"


async def never_reads(connection: client.Connection) -> None:
    """The system's buffers fill, and then the server's own. Who gives up here does not say so: the system is asked."""
    sock = connection.writer.get_extra_info("socket")
    connection.writer.transport.pause_reading()  # pyrefly: ignore
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.writer.write(client.request("POST", "/v1/completions", {"model": "python"} | LONG))
    ends = sock.getpeername()[1], sock.getsockname()[1]
    while is_established(*ends):
        await asyncio.sleep(0.5)


def is_established(local: int, remote: int) -> bool:
    """Whether a socket of this machine is connected, by its ports."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    found = (line.split()[1:4] for line in lines)
    return any(
        (int(mine[-4:], 16), int(theirs[-4:], 16), state) == (local, remote, "01") for mine, theirs, state in found
    )


async def half_closed(connection: client.Connection) -> str | None:
    """It has said all that it will, and still listens."""
    connection.writer.write(BODY.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    connection.writer.write_eof()
    answer = await connection.answer()
    return None if answer.status in (0, 200) else f"{answer.status}"


async def half_closed_within(connection: client.Connection) -> None:
    connection.writer.write(BODY[:-5])
    connection.writer.write_eof()
    await until_closed(connection)


def says(data: bytes) -> Ending:
    """And then waits for what comes."""

    async def spoken(connection: client.Connection) -> None:
        connection.writer.write(data)
        await until_closed(connection)

    return spoken


KINDS = {
    "a head of a byte a second": Kind(slow_head),
    "a connection without a word": Kind(silent, n=200),
    "a body of a byte a second": Kind(slow_body),
    "a body that stops": Kind(body_that_stops),
    "a stream that is never read": Kind(never_reads, n=4, bound=120.0),
    "half closed after a request": Kind(half_closed, bound=SHORT),
    "half closed within a body": Kind(half_closed_within, bound=SHORT),
    "TLS": Kind(says(bytes.fromhex("16030102000100") + bytes(509)), bound=SHORT),
    "HTTP/2": Kind(says(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)), bound=SHORT),
    "random bytes": Kind(says(bytes(range(256)) * 16), bound=SHORT),
    "a line without end": Kind(says(b"GET /" + b"a" * 4_000_000), bound=BOUND),
    "headers without end": Kind(says(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1_000_000), bound=BOUND),
}


async def tried(found: Server, name: str) -> tuple[list[str], list[float], list[float]]:
    """What went wrong; seconds until each connection was gone, and of others' requests meanwhile."""
    kind = KINDS[name]

    async def one() -> tuple[str | None, float]:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(kind.bound + BOUND), client.connected(found.port) as connection:
                said = await kind.does(connection)
                return said, time.monotonic() - begun
        except TimeoutError:
            return "still there", time.monotonic() - begun
        except ConnectionError:
            return None, time.monotonic() - begun

    async with others(found) as meanwhile:
        ends = await asyncio.gather(*(one() for _ in range(kind.n)))
        while len(meanwhile) < LEAST:
            await asyncio.sleep(0.05)
    seconds = [taken for _, taken in ends]
    problems = [f"{name}: {said}" for said, _ in ends if said]
    problems += [f"{name}: gone after {taken:.1f} s" for said, taken in ends if not said and taken > kind.bound]
    slowest = percentile(meanwhile, 99)
    problems += [f"{name}: others waited {slowest:.1f} s meanwhile"] if slowest > MEANWHILE else []
    return problems, seconds, meanwhile


@asynccontextmanager
async def others(found: Server) -> AsyncIterator[list[float]]:
    """Small requests, one after another; how long each took."""
    seconds: list[float] = []

    async def ask() -> None:
        while True:
            begun = time.monotonic()
            body = {"model": "python", "prompt": "import", "max_tokens": 1}
            answer = await client.once(found.port, "POST", "/v1/completions", body)
            seconds.append(time.monotonic() - begun if answer.status == 200 else 1e9)
            await asyncio.sleep(0.05)

    asking = asyncio.create_task(ask())
    try:
        yield seconds
    finally:
        asking.cancel()


def rows(scale: float) -> Iterator[Row]:
    with server() as found:
        for stream in (True, False):  # what such answers need, once
            found.ask("POST", "/v1/completions", {"model": "python"} | LONG | {"stream": stream})
        n_open, before = found.n_open(), found.resident()
        for name in KINDS:
            problems, seconds, meanwhile = asyncio.run(tried(found, name))
            problems += [] if found.idle(5) is not None else [f"{name}: a slot is still held: {found.busy()}"]
            problems += [f"{name}: {found.n_open()} files open, {n_open} before"] if found.n_open() > n_open + 2 else []
            note = f"gone after {max(seconds):.1f} s at most; others meanwhile {milliseconds(meanwhile)}"
            yield row(f"server: {name}", len(seconds), problems, note)
        grown = found.resident() / before - 1
        problems = [f"from {before:.0f} to {found.resident():.0f} MiB"] if grown > 0.1 else []
        yield row("server: memory after slow and dead clients", 1, problems, f"{grown:+.1%}")
