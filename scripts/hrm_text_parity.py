"""How far our HRM-Text is from transformers' own: prints the table of docs/converters-hrm-text.md.

`python -m scripts.hrm_text_parity` from the repository. Each number is the largest difference of a logit over 1, 2 and
4 high cycles. In bfloat16 both round, each its own way: beside their difference stands how far each is from theirs in
float64 with the same rounded weights.
"""

import torch
from torch import Tensor

from tests.hub.test_hrm_text import SETTINGS, ours, said, theirs, tokens  # pyrefly: ignore

LOOPS = (1, 2, 4)


@torch.no_grad()
def logits(setting: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Theirs and ours, by number of loops."""
    code, model = theirs(setting, dtype), ours(setting, dtype)
    return [said(code, tokens(), n) for n in LOOPS], [model(tokens(), n_loops=n).logits for n in LOOPS]


def rounded(setting: str) -> list[Tensor]:
    """Theirs in float64, with weights as bfloat16 has them."""
    code = theirs(setting)
    code.load_state_dict({name: x.bfloat16() for name, x in code.state_dict().items()})
    return [said(code, tokens(), n) for n in LOOPS]


def largest(a: list[Tensor], b: list[Tensor]) -> str:
    found = max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))
    return f"{found:.1e}".replace("e-0", "e-").replace("e+0", "e+") if found else "0"


def main() -> None:
    print("| setting | largest logit | float64 | float32 | bfloat16 | theirs from exact | ours from exact |")
    print("|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        pairs = [logits(setting, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
        exact, size = rounded(setting), max(float(x.abs().max()) for x in pairs[0][0])
        numbers = [largest(*pair) for pair in pairs] + [largest(x, exact) for x in pairs[2]]
        print(f"| {setting} | {size:.1f} |", " | ".join(numbers), "|")


if __name__ == "__main__":
    main()
