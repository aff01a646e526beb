"""Two things timed by turns, so that whatever else the machine does falls on both."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Work = Callable[[], object]


@dataclass(frozen=True)
class Paired:
    """Medians in seconds over n turns; the median, least and largest of their ratios."""

    ours: float
    peer: float
    ratio: float
    ratio_low: float
    ratio_high: float
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
    ratios = sorted(b / a for a, b in turns)
    return Paired(
        ours=statistics.median(a for a, _ in turns),
        peer=statistics.median(b for _, b in turns),
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
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


def memory(ours: Work, peer: Work, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row like `row` for both sides' peaks, where the system tells them (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        both = [statistics.median(peak_bytes(work) / 2**20 for _ in range(3)) for work in (ours, peer)]
        said = {"metric": "peak MiB beyond what rests", "ours": both[0], "peer": both[1], "ratio": both[1] / both[0]}
        yield {**row, **said, "ratio_low": None, "ratio_high": None, "ceiling": None, "utilisation": None, "n": 3}


def peak_bytes(work: Work) -> int:
    """How much more memory the process holds at most while this runs than it held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but not given back would hide as much
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
