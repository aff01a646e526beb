"""python -m benchmarks.torture: every case, or those of the groups named; writes benchmarks/results/torture.json. All
of them take the better part of an hour."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.torture import damage, disk, engine, kills, power, ranks, steps
from benchmarks.torture.subject import Row, Subject, prepared
from ritornello.config import pick

GROUPS: dict[str, Callable[[Subject, float], Iterator[Row]]] = {
    "damage": lambda subject, scale: damage.rows(subject, scale=scale),
    "power": lambda subject, scale: power.rows(subject),
    "disk": lambda subject, scale: disk.rows(subject),
    "steps": lambda subject, scale: steps.rows(subject, scale=scale),
    "kills": lambda subject, scale: kills.rows(subject, scale=scale),
    "ranks": lambda subject, scale: ranks.rows(subject.folder / "ranks", scale=scale),
    "engine": lambda subject, scale: engine.rows(scale=scale),
}
RESULTS = Path(__file__).parent.parent / "results" / "torture.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(GROUPS)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of random trials")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads that a fork would lack
    chosen = [pick(GROUPS, name, "group") for name in options.groups or GROUPS]
    with tempfile.TemporaryDirectory() as folder:
        subject = prepared(Path(folder))
        rows = (row for rows in chosen for row in rows(subject, options.scale))
        return recorded(rows, others=bool(options.groups))


def recorded(rows: Iterable[Row], *, others: bool = True) -> int:
    """Print rows as they come and put them among the results, the other ones of which stay if `others`; 1 if anything
    failed."""
    found: dict[str, Row] = {}
    for row in rows:
        print(json.dumps(row), flush=True)
        found[row["case"]] = row
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if others and RESULTS.exists() else []
    everything = {row["case"]: row for row in kept} | found
    RESULTS.write_text(json.dumps(list(everything.values()), indent=1) + "\n", encoding="utf-8")
    return int(any(row["failures"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
