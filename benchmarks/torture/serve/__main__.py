"""python -m benchmarks.torture.serve: every case, or those of the groups named; their rows go to
benchmarks/results/torture.json, beside the others."""

import argparse
import sys
from collections.abc import Callable, Iterator

from benchmarks.torture.__main__ import recorded
from benchmarks.torture.serve import auth, damage, disconnect, drain, fuzz, overload, slow
from benchmarks.torture.subject import Row
from ritornello.config import pick

GROUPS: dict[str, Callable[[float], Iterator[Row]]] = {
    "auth": auth.rows,
    "damage": damage.rows,
    "fuzz": fuzz.rows,
    "slow": slow.rows,
    "disconnect": disconnect.rows,
    "overload": overload.rows,
    "drain": drain.rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture.serve", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(GROUPS)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    options = parser.parse_args()
    chosen = [pick(GROUPS, name, "group") for name in options.groups or GROUPS]
    return recorded(row for rows in chosen for row in rows(options.scale))


if __name__ == "__main__":
    sys.exit(main())
