"""How far converted models are from the originals' own code: prints the table of docs/converters.md.

    RITORNELLO_ORIGINALS=folder PYTHONPATH=. python scripts/converters_parity.py

Each number is the largest difference of a logit over 1, 3 and 6 loops. In bfloat16 both round, each its own way: beside
their difference stands how far each is from the original in float64 with the same rounded weights.
`freeze` as argument writes what the originals say in float64 into tests/hub/published.json, for every run of the tests.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.originals import CASES, ORIGINALS, SETTINGS, ours, theirs, tokens  # pyrefly: ignore

FROZEN = Path(__file__).parents[1] / "tests/hub/published.json"
LOOPS, FROZEN_LOOPS = (1, 3, 6), 5


def logits(name: str, kind: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Theirs and ours, by number of loops."""
    settings, ids = SETTINGS[name][kind], tokens()
    original, model = ORIGINALS[name](settings, dtype), ours(name, settings, dtype)
    with torch.no_grad():
        return [original.logits(ids, n) for n in LOOPS], [model(ids, n_loops=n).logits for n in LOOPS]


def rounded(name: str, kind: str) -> list[Tensor]:
    """Theirs in float64, with weights as bfloat16 has them."""
    settings = SETTINGS[name][kind]
    original = ORIGINALS[name](settings, torch.float64)
    original.model.load_state_dict(theirs(name, settings, torch.bfloat16), strict=False)
    return [original.logits(tokens(), n) for n in LOOPS]


def largest(a: list[Tensor], b: list[Tensor]) -> str:
    found = max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))
    return f"{found:.1e}".replace("e-0", "e-") if found else "0"


def table() -> None:
    print("| model | shape | largest logit | float64 | float32 | bfloat16 | theirs from exact | ours from exact |")
    print("|---|---|---|---|---|---|---|---|")
    for name, kind in CASES:
        pairs = [logits(name, kind, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        exact, size = rounded(name, kind), max(float(x.abs().max()) for x in pairs[0][0])
        numbers = [largest(*pair) for pair in pairs] + [largest(x, exact) for x in pairs[2]]
        print(f"| {name} | {kind} | {size:.1f} |", " | ".join(numbers), "|")


def freeze() -> None:
    found: dict[str, dict[str, list]] = {name: {} for name in SETTINGS}
    for name, kind in CASES:
        original = ORIGINALS[name](SETTINGS[name][kind], torch.float64)
        found[name][kind] = original.logits(tokens(1), FROZEN_LOOPS)[0].tolist()
    FROZEN.write_text(json.dumps({"n_loops": FROZEN_LOOPS, "logits": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze() if sys.argv[1:] == ["freeze"] else table()
