"""An end that is asked for: what is under way is completed, what comes is refused, and the process ends well."""

import asyncio
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import client
from benchmarks.torture.serve import control
from benchmarks.torture.serve.server import (
    OURS,
    RUN,
    Server,
    error_problem,
    free_port,
    server,
    shown,
    started,
)
from benchmarks.torture.subject import Row, row

N_TRIALS, IN_FLIGHT = 20, 10
TOKENS = 200
HURRY = 10.0  # seconds until it has ended after all
BODY: dict[str, Any] = {"model": "python", "prompt": "def f(", "max_tokens": TOKENS, "temperature": 1, "logprobs": 0}


async def complete(port: int, stream: bool, seed: int, max_tokens: int = TOKENS) -> str | None:
    """What is wrong with one that should come whole."""
    body, path = BODY | {"seed": seed, "stream": stream, "max_tokens": max_tokens}, "/v1/completions"
    reasons: list[str | None] = []
    try:
        async with client.connected(port) as connection:
            if stream:
                events = [event async for event in connection.stream(path, body)]
                if events[-1:] != [b"[DONE]"]:
                    return f"cut after {len(events)} events"
                if b'"error"' in events[-2]:
                    return f"told: {events[-2]!r:.200}"
                choices = [json.loads(event)["choices"] for event in events[:-1]]
                reasons = [choice["finish_reason"] for some in choices for choice in some]
            else:
                answer = await connection.ask("POST", path, body)
                if answer.status != 200:
                    return shown(answer)
                reasons = [choice["finish_reason"] for choice in answer.json()["choices"]]
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        return f"{type(error).__name__} {error}"
    return None if reasons and reasons[-1] in ("length", "stop") else f"not ended: {reasons[-3:]}"


async def drained(found: Server, signals: Sequence[int], *, stream: bool) -> list[str]:
    """Asked to end with requests in flight; what went wrong."""
    asking = [asyncio.create_task(complete(found.port, stream, i)) for i in range(IN_FLIGHT)]
    await all_running(found, asking)
    found.process.send_signal(signals[0])
    problems, refusals, statuses = [], 0, set()
    while not all(task.done() for task in asking):
        try:
            ready = await client.once(found.port, "GET", "/ready")
            late = await client.once(found.port, "POST", "/v1/completions", BODY | {"max_tokens": 1})
        except (OSError, ValueError):
            continue
        if all(task.done() for task in asking):
            break
        statuses.add(ready.status)
        refusals += late.status == 503
        if late.status == 503 and (said := error_problem(late)):
            problems.append(said)
        elif late.status not in (0, 200, 503) or (late.status == 503 and "retry-after" not in late.headers):
            problems.append(f"a late one: {shown(late)}")
        await asyncio.sleep(0.02)
    problems += [said for task in asking if (said := await task)]
    problems += [] if 503 in statuses and refusals else [f"/ready told {statuses or 'nothing'}, {refusals} refused"]
    return problems


async def all_running(found: Server, asking: Sequence[asyncio.Task[Any]]) -> None:
    while (await asyncio.to_thread(found.busy))[0] < IN_FLIGHT:
        if all(task.done() for task in asking):
            raise RuntimeError(f"over before they were seen: {[task.result() for task in asking]}")
        await asyncio.sleep(0.02)


def ends(found: Server, code: int, seconds: float = 10) -> list[str]:
    try:
        ended = found.process.wait(seconds)
    except Exception as error:  # noqa: BLE001 - a timeout
        return [f"has not ended: {error}"]
    said = [] if ended == code else [f"exit code {ended}, not {code}: {found.said()[-300:]}"]
    return said + (["a traceback in the log"] if "Traceback" in found.said() else [])


def drains(n: int, command: Sequence[str] = OURS) -> list[str]:
    problems = []
    for i in range(n):
        with server("--drain-seconds", "300", command=command) as found:
            signum, code = ((signal.SIGTERM, 0), (signal.SIGINT, 130))[i // 2 % 2]
            said = asyncio.run(drained(found, [signum], stream=i % 2 == 0))
            said += ends(found, code)
            problems += [f"trial {i}: {'; '.join(said[:3])}"] if said else []
    return problems


async def hurried(found: Server, signals: Sequence[int], *, stream: bool) -> tuple[float, list[str]]:
    """Signals while requests are in flight; seconds from the last one until the process had ended, and what the
    requests were told amiss."""
    asking = [asyncio.create_task(complete(found.port, stream, i, 900)) for i in range(IN_FLIGHT)]
    await all_running(found, asking)
    for signum in signals:
        found.process.send_signal(signum)
        await asyncio.sleep(0.3)
    begun = time.monotonic()
    await asyncio.to_thread(found.process.wait, 60)
    taken = time.monotonic() - begun
    told = [said for said in await asyncio.gather(*asking) if said and said.startswith("500")]
    return taken, told


def rows(scale: float) -> Iterator[Row]:
    n = round(N_TRIALS * scale)
    note = f"{IN_FLIGHT} in flight came whole, /ready 503 meanwhile, others refused with 503; exit code 0, or 130"
    yield row("server: SIGTERM or Ctrl-C with requests in flight", n, drains(n), note)
    problems = drains(2, control.command("drops"))
    yield row("server: control, it ends at once", 2, [] if len(problems) == 2 else ["not noticed"], f"{problems[:1]}")
    yield hurry("server: a second signal", [], (signal.SIGTERM, signal.SIGTERM), max(2, n // 4))
    yield hurry("server: Ctrl-C twice", [], (signal.SIGINT, signal.SIGINT), max(2, n // 4))
    yield hurry("server: a drain shorter than the work", ["--drain-seconds", "0.5"], (signal.SIGTERM,), max(2, n // 4))
    yield early(max(2, n // 2))


def hurry(case: str, options: Sequence[str], signals: Sequence[int], n: int) -> Row:
    """It does not wait for what is under way."""
    problems, seconds = [], []
    for i in range(n):
        with server(*options) as found:
            taken, told = asyncio.run(hurried(found, signals, stream=i % 2 == 0))
            seconds.append(taken)
            problems += [f"trial {i}: {said}" for said in told[:1]]
            code = found.process.wait()
            problems += [f"trial {i}: {taken:.1f} s"] if taken > HURRY else []
            problems += [f"trial {i}: exit code {code}"] if code not in (0, 1, 130, 143) else []
            problems += [f"trial {i}: a traceback"] if "Traceback" in found.said() else []
    return row(case, n, problems, f"ended within {max(seconds):.1f} s, no traceback")


def early(n: int) -> Row:
    """A signal at some moment of the start."""
    problems, codes = [], set()
    for i in range(n):
        with tempfile.TemporaryDirectory() as folder:
            found = started(run=RUN, port=free_port(), log=Path(folder, "log"))
            time.sleep(0.2 + 3.0 * i / n)
            codes.add(code := found.end(signal.SIGTERM, 20))
            problems += [f"after {0.2 + 3 * i / n:.1f} s: {code}"] if code not in (0, 130, 143, -signal.SIGTERM) else []
            problems += [f"trial {i}: a traceback"] if "Traceback" in found.said() else []
            found.process.kill()
    return row("server: SIGTERM while it starts", n, problems, f"exit codes {sorted(map(str, codes))}, no traceback")
