"""Two things timed by turns, so that whatever else the machine does falls on both."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[[], object]


@dataclass(frozen=True)
class Paired:
    """Medians in seconds over n turns, and the median of the ratios of each turn: how many times as fast is ours."""

    ours: float
    peer: float
    ratio: float
    n: int


def paired(ours: Work, peer: Work, *, n: int, warmup: int = 1) -> Paired:
    """A B, B A, A B, ...: who goes first changes with every turn."""
    for _ in range(warmup):
        ours(), peer()
    turns = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(n):
            order = (ours, peer) if turn % 2 == 0 else (peer, ours)
            taken = {work: seconds(work) for work in order}
            turns.append((taken[ours], taken[peer]))
    finally:
        gc.enable()
    return Paired(
        ours=statistics.median(a for a, _ in turns),
        peer=statistics.median(b for _, b in turns),
        ratio=statistics.median(b / a for a, b in turns),
        n=n,
    )


def alone(work: Work, *, n: int, warmup: int = 1) -> float:
    """The median of n runs, in seconds."""
    for _ in range(warmup):
        work()
    return statistics.median(seconds(work) for _ in range(n))


def limited(metric: str, ours: float, limit: float, *, name: str, n: int = 1) -> dict[str, Any]:
    """The part of a row that sets a figure beside its limit, both the smaller the better."""
    share = limit / max(ours, 1e-3)
    said: dict[str, Any] = {"metric": metric, "ours": ours, "peer": limit, "peer_name": name, "ratio": share, "n": n}
    return said | {"ceiling": limit, "utilisation": share}


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
