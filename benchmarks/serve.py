"""What HTTP costs: the same requests through the server, asked by another process, and in the engine alone; how soon
texts begin under load; and whether memory stays where it is."""

import argparse
import inspect
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from pathlib import Path
from typing import Any

from benchmarks.asking import Job, Told
from benchmarks.timing import limited
from benchmarks.torture.serve.server import Server, percentile, server
from ritornello.engine.engine import Engine
from ritornello.engine.generate import Loaded, load, requests_of
from ritornello.engine.request import Request
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.recipes import find_model
from ritornello.train import checkpoint

N_REQUESTS = 64
AT_ONCE = 1, 16, 64
SHARES = 0.25, 0.5, 0.75, 0.9  # of the most requests a second
WIDE: dict[str, Any] = {"dim": 512, "head_dim": 128, "ffn": "dense", "ffn_dim": 3072}  # beside the text model
LOADED_SECONDS, SETTLED = 600, 60
WANTED = 0.9
SEED = 0


@dataclass(frozen=True)
class Given:
    """A model behind HTTP and in this process, and the same requests to either; in each `turn` of other texts, of which
    neither has computed anything."""

    name: str
    loaded: Loaded
    engine: Engine
    found: Server
    clients: "Clients"
    how: dict[str, Any]
    seeds: Iterator[int] = field(default_factory=count)
    bodies: Sequence[dict[str, Any]] = ()
    requests: Sequence[Request] = ()

    def turn(self) -> "Given":
        rule: dict[str, Any] = {}
        if "exit" in self.how:
            from ritornello.config import exit_by

            rule["exit"] = exit_by(self.how["exit"], self.how.get("exit_threshold"), 1)
        prompts = drawn(self.loaded, next(self.seeds))
        common = {"model": "model", "temperature": 0, **self.how}
        bodies = [{"prompt": ids, "max_tokens": n, **common} for ids, n in prompts]
        asked = [requests_of(self.loaded, [ids], max_tokens=n, temperature=0, **rule)[0] for ids, n in prompts]
        return replace(self, bodies=bodies, requests=asked)

    @property
    def common(self) -> dict[str, Any]:
        attention = self.loaded.model.config.attention
        return {"bench": "serve", "shape": self.name, "attention": attention, "dtype": "fp32"}

    def row(
        self, metric: str, turns: Sequence[tuple[float, float]], peer: str, ceiling: float | None = None
    ) -> dict[str, Any]:
        """Of what the server and the engine alone took in each turn."""
        ratios = sorted(alone / http for http, alone in turns)
        http, alone = (statistics.median(side) for side in zip(*turns, strict=True))
        spread = {
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "ceiling": ceiling,
            "utilisation": None,
            "n": len(turns),
        }
        found = {"metric": metric, "ours": http, "peer": alone, "peer_name": peer, "ratio": statistics.median(ratios)}
        return self.common | found | spread

    def through_http(self, at_most: int, *, stream: bool, arrivals: Sequence[float] = ()) -> Told:
        """All requests, or the first few where they come one after another."""
        bodies = [body | {"stream": stream} for body in self.bodies[: 16 * at_most]]
        return self.clients.do(Job(bodies=bodies, at_most=at_most, arrivals=arrivals))

    def alone(self, at_most: int, *, arrivals: Sequence[float] = ()) -> "Alone":
        return direct(self.engine, self.requests[: 16 * at_most], at_most, arrivals)


@dataclass
class Alone:
    """Of each request, seconds from when it came to its first token, and its tokens; seconds of all."""

    first: list[float]
    tokens: list[list[int]]
    seconds: float = 0.0


@dataclass(frozen=True)
class Clients:
    process: subprocess.Popen[str]

    def do(self, job: Job) -> Told:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(asdict(job)), file=self.process.stdin, flush=True)
        return Told(**json.loads(self.process.stdout.readline()))


@contextmanager
def clients(port: int) -> Iterator[Clients]:
    command = [sys.executable, "-m", "benchmarks.asking", str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Clients(process)
        finally:
            process.kill()


@contextmanager
def given(name: str, **how: Any) -> Iterator[Given]:
    """how: settings of the requests, as HTTP and `requests_of` both name them."""
    from ritornello.serve.settings import settings_for
    from ritornello.serve.worker import engine_of

    with tempfile.TemporaryDirectory() as folder:
        run = str(find_model("python")) if name.startswith("python") else wide(Path(folder))
        loaded = load(run, device="cpu")
        n_loops = settings_for(loaded.model.config, "model").max_loops
        engine = engine_of(loaded, n_loops=n_loops, memory_mb=None, exact=False)
        with server("--name", "model", run=run) as found, clients(found.port) as process:
            yield Given(name, loaded, engine, found, process, how)


def drawn(loaded: Loaded, seed: int) -> list[tuple[list[int], int]]:
    """Prompts of 8 to 128 tokens out of a text, continued by 4 to 48, as in `engine`. seed: of where they begin."""
    text, found = loaded.tokenizer.encode(inspect.getsource(argparse)), []
    rng, starts = random.Random(SEED), random.Random(seed)
    for _ in range(N_REQUESTS):
        start, length = starts.randrange(len(text) - 128), rng.randint(8, 128)
        found.append((text[start : start + length], rng.randint(4, 48)))
    return found


def wide(folder: Path) -> str:
    """The text model with wider layers, not trained."""
    saved = checkpoint.load(find_model("python"))
    recipe = replace(saved.recipe, model=replace(saved.recipe.model, **WIDE))
    model = RecurrentDepthTransformer(recipe.model, seed=SEED)
    path = checkpoint.save(
        folder,
        step=1,
        model_state=model.state_dict(),
        recipe=recipe,
        tokenizer_json=saved.tokenizer_json,
        optimizer_state={},
        trainer_state={"step": 1},
        fingerprint=saved.manifest.fingerprint,
    )
    return str(path)


def direct(engine: Engine, asked: Sequence[Request], at_most: int, arrivals: Sequence[float] = ()) -> Alone:
    """In the engine alone: as many at once, at the same times."""
    n, begun, come, numbers, found = (
        len(asked),
        time.perf_counter(),
        0,
        {},
        Alone([0.0] * len(asked), [[] for _ in asked]),
    )
    came = list(arrivals) or [0.0] * n
    while come < n or engine.busy:
        now = time.perf_counter() - begun
        while come < n and len(numbers) < at_most and came[come] <= now:
            came[come] = came[come] if arrivals else now
            numbers[engine.submit(asked[come])] = come
            come += 1
        if not engine.busy:
            time.sleep(max(0.0, came[come] - (time.perf_counter() - begun)))
        for event in engine.step():
            at = time.perf_counter() - begun
            i = numbers[event.number]
            if event.token is not None and event.reason != "stop":
                found.first[i] = found.first[i] or at - came[i]
                found.tokens[i].append(event.token)
            if event.reason:
                del numbers[event.number]
    found.seconds = time.perf_counter() - begun
    return found


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    for name, how in (("python", {}), ("python, leaving early", {"exit": "hazard"}), ("text-wide", {})):
        with given(name, **how) as what:
            yield from throughput(what, n=n)
            yield from latencies(what, n=n)
            if name == "python":
                yield from memory(what)


def throughput(what: Given, *, n: int) -> Iterator[dict[str, Any]]:
    for at_most, stream in product(AT_ONCE, (False, True)):
        turns = [by_turns(what.turn(), at_most, stream=stream, first=bool(turn % 2)) for turn in range(n + 1)][1:]
        same = statistics.mean(is_same(what, *turn) for turn in turns)
        assert same > 0.8, f"only {same:.0%} of the texts are the same"
        tokens, share = (
            sum(map(len, turns[0][1].tokens)),
            statistics.median(told.worked / told.seconds for told, _ in turns),
        )
        yield what.row(
            f"seconds for {len(turns[0][1].tokens)} texts, {tokens} tokens, {at_most} at once"
            + (", streamed" if stream else ""),
            [(told.seconds, served.seconds) for told, served in turns],
            f"the engine alone; the clients take {share:.0%} of a core",
            ceiling=WANTED,
        )


def by_turns(what: Given, at_most: int, *, stream: bool, first: bool) -> tuple[Told, Alone]:
    """Both sides; first: the server's before the engine's."""
    told = what.through_http(at_most, stream=stream) if first else None
    alone = what.alone(at_most)
    return told or what.through_http(at_most, stream=stream), alone


def is_same(what: Given, told: Told, alone: Alone) -> float:
    """Share of the texts."""
    texts = [what.loaded.tokenizer.decode(tokens) for tokens in alone.tokens]
    return statistics.mean(a == b for a, b in zip(told.texts, texts, strict=True))


def latencies(what: Given, *, n: int) -> Iterator[dict[str, Any]]:
    """An open loop: requests come at random, streamed."""
    most = N_REQUESTS / min(what.turn().through_http(AT_ONCE[-1], stream=True).seconds for _ in range(3))
    for share in SHARES:
        sides: list[tuple[list[float], list[float]]] = []
        for turn in range(n):
            now, rng, at, arrivals = what.turn(), random.Random(turn), 0.0, []
            for _ in now.bodies:
                arrivals.append(at := at + rng.expovariate(share * most))
            http = now.through_http(N_REQUESTS, stream=True, arrivals=arrivals).first
            sides.append((http, now.alone(N_REQUESTS, arrivals=arrivals).first))
        for q in (50, 99):
            metric = f"seconds to the first token, p{q}, {share:.0%} of {most:.1f} requests a second"
            found = [(percentile(http, q), percentile(alone, q)) for http, alone in sides]
            yield what.row(metric, found, "the engine alone")


def memory(what: Given) -> Iterator[dict[str, Any]]:
    """Load for ten minutes; what the process holds, once a second."""
    over, sizes, n = threading.Event(), [], 0

    def watched() -> None:
        while not over.wait(1):
            sizes.append(what.found.resident())

    watching, end = threading.Thread(target=watched), time.monotonic() + LOADED_SECONDS
    watching.start()
    try:
        while time.monotonic() < end:
            what.turn().through_http(16, stream=n // N_REQUESTS % 2 == 0)
            n += N_REQUESTS
    finally:
        over.set()
        watching.join()
    settled = sizes[SETTLED:]
    slope = statistics.linear_regression(range(len(settled)), settled).slope * 3600
    metric = f"MiB resident at most, after a minute of {LOADED_SECONDS / 60:.0f} of load, {n} requests"
    row = limited(metric, max(settled), min(settled), name=f"at least; {slope:+.1f} MiB an hour", n=len(settled))
    yield what.common | {**row, "ratio_low": None, "ratio_high": None}
