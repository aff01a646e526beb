"""python -m benchmarks.asking PORT: clients in a process of their own. Jobs and answers are lines of JSON."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import client


@dataclass(frozen=True, kw_only=True)
class Job:
    """bodies: of completions. at_most: so many at once, each by a connection that stays. arrivals: when each comes,
    in seconds from the beginning; none: as soon as there is room."""

    bodies: Sequence[dict[str, Any]]
    at_most: int
    arrivals: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Told:
    """Seconds: of all, of each since it came until its first and its last bytes, of this process' own work."""

    seconds: float
    first: list[float]
    last: list[float]
    texts: list[str]
    worked: float


async def work(port: int, job: Job) -> Told:
    n = len(job.bodies)
    first, last, data = [0.0] * n, [0.0] * n, [b""] * n
    left = iter(range(n))
    begun, cpu = time.perf_counter(), time.process_time()

    async def ask(connection: client.Connection, i: int) -> None:
        came = begun
        if job.arrivals:
            came = begun + job.arrivals[i]
            await asyncio.sleep(max(0.0, came - time.perf_counter()))
        elif job.bodies[i].get("stream"):
            came = time.perf_counter()
        connection.writer.write(client.request("POST", "/v1/completions", job.bodies[i]))
        status, headers = await connection.head()
        async for part in connection.parts(headers):
            now = time.perf_counter()
            first[i] = first[i] or now - came
            data[i] += part
        last[i] = time.perf_counter() - came
        if status != 200:
            raise RuntimeError(f"{status}: {data[i][:300]!r}")

    async def one_after_another() -> None:
        async with client.connected(port) as connection:
            for i in left:
                await ask(connection, i)

    await asyncio.gather(*(one_after_another() for _ in range(min(job.at_most, n))))
    seconds, worked = time.perf_counter() - begun, time.process_time() - cpu
    texts = [text(some, stream=bool(body.get("stream"))) for some, body in zip(data, job.bodies, strict=True)]
    return Told(seconds=seconds, first=first, last=last, texts=texts, worked=worked)


def text(data: bytes, *, stream: bool) -> str:
    if not stream:
        return json.loads(data)["choices"][0]["text"]
    events = [event[6:] for event in data.split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asdict(asyncio.run(work(int(sys.argv[1]), Job(**json.loads(line)))))), flush=True)


if __name__ == "__main__":
    main()
