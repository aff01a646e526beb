"""Rewrite the table of docs/plan.md: what each preset from 1b to 1t needs.

python scripts/plan_table.py
"""

import sys
from pathlib import Path

from ritornello.commands.plan import Plan
from ritornello.planning.hardware import GPUS
from ritornello.planning.plan import Asked, plan
from ritornello.planning.report import facts

PAGE = Path(__file__).parent.parent / "docs/plan.md"
START, END = "<!-- scripts/plan_table.py -->\n", "<!-- end -->\n"
GPU, TOKENS = "h100", 1e12
COUNTS = {"1b": 8, "3b": 16, "10b": 64, "50b": 256, "100b": 512, "500b": 2048, "1t": 6144}
COLUMNS = (
    "preset",
    "GPUs",
    "layout",
    "again",
    "micro",
    "GB",
    "largest part",
    "s a step",
    "sending",
    "tokens/s",
    "days",
)


def row(name: str, n_gpus: int) -> str:
    recipe, settled = Plan(name=name).recipe()
    asked = Asked(recipe, GPUS[GPU], n_gpus, frozenset({"checkpoint_activations", "microbatch_size"}) - settled)
    found = plan(asked)
    told, best = facts(found, tokens=TOKENS), found.best
    memory, step = told["memory_bytes"], told["step"]
    parts = {part: n for part, n in memory.items() if part not in ("needed_when", "total", "usable")}
    most = max(parts, key=parts.__getitem__)
    again = "yes" if best.recipe.train.checkpoint_activations else "no"
    sending = sum(step["seconds_sending"].values()) / step["seconds"]
    cells = (name, f"{n_gpus:,}", best.layout, again, best.recipe.train.microbatch_size // best.layout.n_readers)
    numbers = (f"{memory['total'] / 1e9:.0f}", f"{most} {parts[most] / 1e9:.0f}", f"{step['seconds']:.3g}")
    rates = (f"{sending:.0%}", f"{step['tokens_per_second']:,.0f}", f"{told['budget']['days']:,.0f}")
    return "| " + " | ".join(map(str, (*cells, *numbers, *rates))) + " |"


def table() -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(row(name, n) for name, n in COUNTS.items())]) + "\n"


def main() -> int:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
