"""Clients that go, at every phase of a request: what they held is free within a second."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

from benchmarks import client
from benchmarks.torture.serve import control
from benchmarks.torture.serve.server import Server, milliseconds, server
from benchmarks.torture.subject import Row, row

N_TRIALS, BOUND = 200, 1.0
PROMPT = "import os\n" * 80  # most of the context
PHASES: dict[str, dict[str, Any]] = {
    "within the head": {},
    "within the body": {},
    "after the body": {},
    "in the prompt": {"prompt": PROMPT, "max_tokens": 2},
    "in the text": {},
    "in the text, streamed": {"stream": True},
    "in several texts": {"n": 8},
    "in several texts, streamed": {"n": 8, "stream": True},
    "while queued": {},
    "while queued, streamed": {"stream": True},
    "at the end": {"max_tokens": 4},
    "at the end, streamed": {"max_tokens": 4, "stream": True},
}
QUEUE = 40  # texts before one that is queued


def body(phase: str) -> dict[str, Any]:
    return {"model": "python", "prompt": "def f(", "max_tokens": 900, "temperature": 1, "seed": 1} | PHASES[phase]


async def gone(port: int, phase: str, rng: random.Random) -> None:
    """Ask, and go in this phase."""
    data = client.request("POST", "/v1/completions", body(phase))
    head = data.index(b"\r\n\r\n")
    async with client.connected(port) as connection:
        if phase == "within the head":
            data = data[: rng.randrange(1, head)]
        if phase == "within the body":
            data = data[: rng.randrange(head + 4, len(data) - 1)]
        connection.writer.write(data)
        await connection.writer.drain()
        if "streamed" in phase and "queued" not in phase:
            await first_events(connection, rng.randint(1, 4))
        elif phase != "after the body":
            await asyncio.sleep(rng.uniform(0, 0.3 if "end" not in phase else 0.1))
        (connection.abort if rng.random() < 0.5 else connection.writer.close)()


async def first_events(connection: client.Connection, n: int) -> None:
    _, headers = await connection.head()
    async for _ in connection.parts(headers):
        if (n := n - 1) == 0:
            break


async def trial(port: int, phase: str, rng: random.Random) -> None:
    n = QUEUE if "queued" in phase else 1
    await asyncio.gather(*(gone(port, phase, rng) for _ in range(n)))


def left(found: Server, n: int) -> tuple[list[str], list[float]]:
    rng, problems, seconds = random.Random(0), [], []
    problems += [] if found.idle(5) is not None else [f"not idle before: {found.busy()}"]
    for i in range(n):
        phase = tuple(PHASES)[i % len(PHASES)]
        try:
            asyncio.run(trial(found.port, phase, rng))
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            problems.append(f"{phase}: {type(error).__name__} {error}")
        taken = found.idle(5)
        if taken is None or taken > BOUND:
            problems.append(f"{phase}: {'still' if taken is None else f'{taken:.1f} s'} held: {found.busy()}")
        seconds += [] if taken is None else [taken]
    problems += [] if found.ask("POST", "/v1/completions", body("at the end")).status == 200 else ["serves no more"]
    return problems, seconds


def rows(scale: float) -> Iterator[Row]:
    with server() as found:
        n, before = round(N_TRIALS * scale), found.n_open()
        problems, seconds = left(found, n)
        problems += [f"{found.n_open()} files open, {before} before"] if found.n_open() > before + 2 else []
        note = f"{len(PHASES)} phases; all free after {max(seconds, default=0):.2f} s at most, {milliseconds(seconds)}"
        yield row("server: clients that go", n, problems, note)
    with server(command=control.command("leaks")) as found:
        problems, _ = left(found, len(PHASES))
    missed = [] if any("held" in said for said in problems) else ["a slot that stays was not noticed"]
    yield row("server: control, a slot that stays", len(PHASES), missed, f"noticed: {problems[0] if problems else ''}")
