"""What Prometheus reads at `/metrics`."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ritornello.serve.answers import Piece
from ritornello.serve.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 4096)


class Metrics:
    """Counted where it happens; what the engine holds is asked of the worker when somebody reads."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter("ritornello_http_requests", "Answers.", ("route", "status"), **of)
        self.prompt_tokens = Counter("ritornello_prompt_tokens", "Tokens of prompts.", **of)
        self.tokens = Counter("ritornello_tokens", "Tokens written.", **of)
        self.refused = Counter("ritornello_overloaded", "Requests told to come back.", **of)
        self.first = Histogram("ritornello_first_token_seconds", "Until a text begins.", buckets=SECONDS, **of)
        self.loops = Histogram("ritornello_loops_per_token", "That a written token took.", buckets=LOOPS, **of)
        self.registry.register(_Engine(worker))

    def observe(self, piece: Piece, seconds: float, *, first: bool) -> None:
        """seconds: since its request was let in."""
        if first:
            self.first.observe(seconds)
        self.tokens.inc(len(piece.written))
        for event in piece.written:
            self.loops.observe(event.loops)


class _Engine(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        stats = self._worker.stats
        yield GaugeMetricFamily("ritornello_requests_running", "Texts under way.", stats.n_running)
        yield GaugeMetricFamily("ritornello_requests_waiting", "Texts that wait for memory.", stats.n_waiting)
        held = GaugeMetricFamily(
            "ritornello_kv_bytes", "Keys and values; idle: of used, for prompts to come.", labels=["state"]
        )
        for state in ("used", "idle", "total"):
            held.add_metric([state], getattr(stats, f"bytes_{state}"))
        yield held
        yield GaugeMetricFamily(
            "ritornello_engine_silent_seconds", "Since the engine's last sign.", self._worker.silent_for()
        )
        told = {
            "ticks": "Passes of the block.",
            "token_loops": "Single tokens through it.",
            "preempted": "Started over.",
        }
        told |= {"drafted": "Tokens guessed.", "agreed": "Guesses that stood."}
        for name, says in told.items():
            yield CounterMetricFamily(f"ritornello_{name}", says, getattr(stats, f"n_{name}"))
