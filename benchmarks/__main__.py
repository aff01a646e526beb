"""python -m benchmarks: every theme, or those named; writes benchmarks/results/<theme>.md and latest.json."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import chain, product, starmap
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    decode,
    depth,
    engine,
    experts,
    hub,
    learning,
    loops,
    machine,
    plan,
    prefill,
    processes,
    published,
    rounding,
    saving,
    serve,
    startup,
    stream,
    training,
)
from benchmarks.shapes import DTYPES
from ritornello.config import pick

ATTENTIONS = ("gqa", "mla")
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def each(rows: Callable[..., Iterable[Row]], *values: Iterable[str]) -> Iterator[Row]:
    """The rows of every combination of values."""
    return chain.from_iterable(starmap(rows, product(*values)))


def train_themes(n: int, ceilings: dict[str, float]) -> Iterator[Row]:
    for dtype in DTYPES:
        for shape in ("S1", "S2"):
            for attention in ATTENTIONS:
                yield from training.beside_openmythos(shape, attention, dtype, n=n, ceiling=ceilings[dtype])
        if find_spec("parcae_lm"):  # its wheel on PyPI is empty: its repository has to be on the path
            yield from training.beside_parcae(dtype, n=n, ceiling=ceilings[dtype])
        yield from training.beside_transformers(dtype, n=n, ceiling=ceilings[dtype])
    for shape, attention in product(("S1", "S2"), ATTENTIONS):
        yield training.beside_float32(shape, attention, n=n, ceiling=ceilings["bf16"])


THEMES: dict[str, Callable[[int, dict[str, float]], Iterable[Row]]] = {
    "startup": lambda n, most: startup.rows(n=n),
    "experts": lambda n, most: each(lambda s, d: experts.rows(s, d, n=n, ceiling=most[d]), ("S1", "S2"), DTYPES),
    "training": train_themes,
    "loops": lambda n, most: each(lambda a: loops.rows("S1", a, n=n), ATTENTIONS),
    "prefill": lambda n, most: each(lambda a: prefill.rows(a, n=n, ceiling=most["fp32"]), ATTENTIONS),
    "depth": lambda n, most: each(lambda a: depth.rows("S1", a, n=n), ATTENTIONS),
    "decode": lambda n, most: each(lambda a: decode.rows(a, n=n, bandwidth=most["bandwidth"]), ATTENTIONS),
    "stream": lambda n, most: each(lambda w: stream.rows(w, n=n, bandwidth=most["bandwidth"]), stream.WEIGHTS),
    "plan": lambda n, most: plan.rows(),
    "processes": lambda n, most: each(lambda s: processes.rows(s, n=n), tuple(processes.MODELS)),
    "saving": lambda n, most: saving.rows(n=n),
    "rounding": lambda n, most: each(rounding.rows, stream.WEIGHTS[1:]),
    "engine": lambda n, most: engine.rows(n=n),
    "serve": lambda n, most: serve.rows(n=n),
    "published": lambda n, most: published.rows(n=n),
    "hub": lambda n, most: each(lambda s: hub.rows(s, n=n), ("S1", "S3")),
    "learning": lambda n, most: learning.rows(n=n),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("themes", nargs="*", metavar="theme", help=f"{', '.join(THEMES)}; default: all")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    themes = [(name, pick(THEMES, name, "theme")) for name in options.themes or THEMES]
    ceilings = {name: machine.matmul_ceiling(dtype) for name, dtype in DTYPES.items()}
    said = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; largest matmul rate "
    said += ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in ceilings.items())
    ceilings["bandwidth"] = machine.bandwidth()
    said += f"; {ceilings['bandwidth'] / 1e9:.1f} GB/s read"
    RESULTS.mkdir(exist_ok=True)
    latest = RESULTS / "latest.json"
    for theme, measure in themes:
        rows = []
        for row in measure(options.turns, ceilings):
            print(json.dumps(row), flush=True)
            rows.append(row)
        (RESULTS / f"{theme}.md").write_text(page(theme, rows, said), encoding="utf-8")
        kept = json.loads(latest.read_text(encoding="utf-8")) if latest.exists() else []
        kept = [row for row in kept if row["bench"] != theme]
        latest.write_text(json.dumps(kept + rows, indent=1) + "\n", encoding="utf-8")
    return 0


def page(theme: str, rows: list[Row], said: str) -> str:
    columns = ("shape", "attention", "dtype", "metric", "ours", "peer", "peer_name")
    columns += ("ratio", "ratio_low", "ratio_high", "utilisation", "n")
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(shown(row.get(name)) for name in columns) for row in rows]
    table = "".join(f"| {line} |\n" for line in lines)
    how = "Seconds: medians of n turns; ratio: the peer's over ours, turn by turn, with the least and the largest."
    return f"# {theme.capitalize()}\n\n{said}. {how} [What stands here](../../docs/benchmarks.md).\n\n{table}"


def shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
