"""Ten times as many requests at once as the server takes: each is answered, rightly, or told when to come back."""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import client
from benchmarks.torture.serve import control
from benchmarks.torture.serve.server import Server, Watch, error_problem, milliseconds, server, shown
from benchmarks.torture.subject import Row, row

N_REQUESTS, TIMES = 4096, 10
DEADLINE = 300.0  # seconds
PROMPTS = "def f(", "import os\n", "class A:\n    def", "for i in range(", "return ", "if x is not None:", "# The "
Told = tuple[int, float, str | None]  # status, seconds, what is wrong


def asked(i: int) -> dict[str, Any]:
    """One of so many that few are alike."""
    rng = random.Random(i)
    prompt = rng.choice(PROMPTS) + " " * rng.randint(0, 3)
    return {"model": "python", "prompt": prompt, "max_tokens": rng.choice((4, 8, 16)), "temperature": 0}


async def one(found: Server, body: dict[str, Any], expected: str) -> Told:
    begun = time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE):
            answer = await client.once(found.port, "POST", "/v1/completions", body)
    except (OSError, ValueError) as error:
        return -1, time.monotonic() - begun, f"no answer: {type(error).__name__} {error}"
    return answer.status, time.monotonic() - begun, problem(answer, expected)


def problem(answer: client.Answer, expected: str) -> str | None:
    if answer.status == 200:
        return None if answer.text == expected else f"another text: {answer.text!r}, not {expected!r}"
    if answer.status != 429:
        return shown(answer)
    seconds = answer.headers.get("retry-after", "")
    return error_problem(answer) if seconds.isdigit() and int(seconds) > 0 else f"Retry-After {seconds!r}"


async def all_at_once(found: Server, bodies: Sequence[dict[str, Any]], expected: Sequence[str]) -> list[Told]:
    return await asyncio.gather(*(one(found, *pair) for pair in zip(bodies, expected, strict=True)))


def overloaded(found: Server, n: int, *, kinds: int = 64) -> tuple[list[str], str]:
    bodies = [asked(i % kinds) for i in range(n)]
    alone: dict[str, str] = {}
    for body in bodies:
        if (key := str(body)) not in alone:
            alone[key] = found.ask("POST", "/v1/completions", body).text
    with Watch(found) as watch:
        told = asyncio.run(all_at_once(found, bodies, [alone[str(body)] for body in bodies]))
    problems = [said for _, _, said in told if said] + watch.problems
    served, refused = ([taken for status, taken, _ in told if status == wanted] for wanted in (200, 429))
    problems += [] if served else ["none was served"]
    problems += [] if found.idle(5) is not None else ["something is still held"]
    note = f"{len(served)} answered as alone ({len(alone)} kinds), {milliseconds(served)}; "
    note += f"{len(refused)} told to come back, {milliseconds(refused)}; /health {milliseconds(watch.seconds)}"
    return problems, note


def rows(scale: float) -> Iterator[Row]:
    n = round(N_REQUESTS * scale)
    with server("--max-requests", str(max(1, n // TIMES))) as found:
        yield row("server: ten times its capacity at once", n, *overloaded(found, n))
    for fault, word in {"another": "another text", "wordless": "Retry-After", "defects": "500"}.items():
        with server(command=control.command(fault)) as found:
            problems, _ = overloaded(found, 200, kinds=8)
        missed = [] if any(word in said for said in problems) else ["not noticed"]
        yield row(f"server: control, overload, {fault}", 200, missed, f"noticed: {problems[0] if problems else ''}")
