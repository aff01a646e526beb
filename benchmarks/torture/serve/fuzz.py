"""Bodies that nobody should send: each is answered, the server neither restarts nor grows, and others are served."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator

from benchmarks import client
from benchmarks.torture.serve import control
from benchmarks.torture.serve.bodies import Case, Fuzz
from benchmarks.torture.serve.server import Server, Watch, error_problem, milliseconds, server, shown
from benchmarks.torture.subject import Row, row

N_BODIES, AT_ONCE = 10_000, 16
DEADLINE = 30.0  # seconds for any answer
GROWTH = 0.05  # of what the server held after a tenth of them
HEALTH, WORST = 0.1, 2.0  # seconds, p99 and most


def problem(case: Case, answer: client.Answer) -> str | None:
    """What is wrong with an answer to it."""
    if answer.status == 0:
        return None if case.bare else "closed without an answer"
    if answer.status >= 500 or (case.allowed and answer.status not in case.allowed):
        return f"expected {sorted(case.allowed) or 'less than 500'}, {shown(answer)}"
    if case.bare:
        return None
    return error_problem(answer) if answer.status >= 300 else whole_problem(answer)


def whole_problem(answer: client.Answer) -> str | None:
    """What is wrong with an answer of 200."""
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return None if answer.body.endswith(b"data: [DONE]\n\n") else f"an open end: {answer.body[-100:]!r}"
    try:
        return None if json.loads(answer.body)["object"] else "no object"
    except (ValueError, KeyError, TypeError):
        return f"no JSON: {shown(answer)}"


async def answered(port: int, case: Case) -> client.Answer | str:
    """Or why there is none."""
    try:
        async with asyncio.timeout(DEADLINE), client.connected(port) as connection:
            connection.writer.write(case.data)
            return await connection.answer(without_body=case.name.startswith("HEAD"))
    except (OSError, ValueError, asyncio.LimitOverrunError) as error:  # a deadline is an OSError too
        return f"no answer: {type(error).__name__} {error}"


async def bombarded(found: Server, cases: Iterator[Case], problems: list[str]) -> Counter[int]:
    statuses: Counter[int] = Counter()

    async def one_after_another() -> None:
        for case in cases:
            answer = await answered(found.port, case)
            said = answer if isinstance(answer, str) else problem(case, answer)
            if said:
                problems.append(f"{case.name}: {said}")
            statuses[-1 if isinstance(answer, str) else answer.status] += 1

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return statuses


def hostile(found: Server, n: int) -> tuple[list[str], str]:
    """n cases against a server; what went wrong, and what was measured."""
    models = found.ask("GET", "/v1/models").json()["data"]
    fuzz, problems = Fuzz(models[0]["id"], vocab_size=1024), []
    first = asyncio.run(bombarded(found, (fuzz.case() for _ in range(n // 10)), problems))
    before, pid = found.resident(), found.process.pid
    with Watch(found) as watch:
        statuses = first + asyncio.run(bombarded(found, (fuzz.case() for _ in range(n - n // 10)), problems))
    after = found.resident()
    problems += [f"pid {pid} ended"] if not found.alive else []
    grown = after / before - 1
    problems += [f"grew from {before:.0f} to {after:.0f} MiB"] if abs(grown) > GROWTH else []
    problems += [f"/health took {milliseconds(watch.seconds)}"] if watch.p99 > HEALTH else []
    problems += [f"/health took {worst:.1f} s once"] if (worst := max(watch.seconds, default=0)) > WORST else []
    problems += watch.problems
    told = ", ".join(f"{count} × {status or 'closed'}" for status, count in sorted(statuses.items()))
    return (
        problems,
        f"{told}; {before:.0f} MiB after a tenth, {after:.0f} at the end; /health {milliseconds(watch.seconds)}",
    )


def rows(scale: float) -> Iterator[Row]:
    with server() as found:
        yield row("server: hostile requests", n := round(N_BODIES * scale), *hostile(found, n))
    with server(command=control.command("defects")) as found:
        problems, _ = hostile(found, 500)
    missed = [] if any("500 b" in said for said in problems) else ["a defect was not noticed"]
    yield row("server: control, one answer in fifty is a defect", 500, missed, f"noticed: {problems[0]}")
