"""How long a newcomer waits: imports, the command's help, the largest preset without its numbers."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.timing import Work, alone, limited, paired

MODEL = "from ritornello import RecurrentDepthTransformer, preset"  # what is not asked for is not imported
MANY = 7  # turns, where two long times are subtracted
HELP = "from ritornello.cli import main; main(['--help'])"
LARGEST = """
import time, torch
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.presets import preset
config = preset("1t")
start = time.perf_counter()
with torch.device("meta"):
    RecurrentDepthTransformer(config)
print(time.perf_counter() - start)
"""


def python(*arguments: str) -> Work:
    return partial(subprocess.run, [sys.executable, *arguments], check=True, capture_output=True)


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    common = {"bench": "startup", "shape": "", "attention": "", "dtype": ""}
    both = (python("-c", f"import torch; {rest}") for rest in (MODEL, "pass"))
    imports = paired(*both, n=max(n, MANY))
    found = {"import ritornello, after torch's": (imports.ours - imports.peer, 0.3, imports.n)}
    found["ritornello --help"] = (alone(python("-c", HELP), n=n), 0.5, n)
    built = subprocess.run([sys.executable, "-c", LARGEST], check=True, capture_output=True, text=True).stdout
    found["the preset 1t on the meta device"] = (float(built), 2.0, 1)
    for what, (ours, limit, turns) in found.items():
        yield common | limited(f"{what}, seconds", ours, limit, name="wanted at most", n=turns)
