"""python -m benchmarks.torture: every case; writes benchmarks/results/torture.json. Takes half an hour."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.torture import damage, disk, kills, power, steps
from benchmarks.torture.subject import prepared

RESULTS = Path(__file__).parent.parent / "results" / "torture.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of random trials")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads that a fork would lack
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subject = prepared(Path(folder))
        for rows in (
            damage.rows(subject, scale=options.scale),
            power.rows(subject),
            disk.rows(subject),
            steps.rows(subject, scale=options.scale),
            kills.rows(subject, scale=options.scale),
        ):
            for row in rows:
                print(json.dumps(row), flush=True)
                found.append(row)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(row["failures"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
