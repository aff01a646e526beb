"""How long a newcomer waits: imports, the command's help, the largest preset without its numbers."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.timing import alone, limited

HELP = "from ritornello.cli import main; main(['--help'])"
IMPORT = """
import time, torch
start = time.perf_counter()
from ritornello import RecurrentDepthTransformer, preset  # what is not asked for is not imported
print(time.perf_counter() - start)
"""
LARGEST = """
import time, torch
from ritornello import RecurrentDepthTransformer, preset
config = preset("1t")
start = time.perf_counter()
with torch.device("meta"):
    RecurrentDepthTransformer(config)
print(time.perf_counter() - start)
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def rows(*, n: int) -> Iterator[dict[str, Any]]:
    found = {
        "import ritornello, after torch's": (statistics.median(float(python(IMPORT)) for _ in range(n)), 0.3),
        "ritornello --help": (alone(lambda: python(HELP), n=n), 0.5),
        "the preset 1t on the meta device": (statistics.median(float(python(LARGEST)) for _ in range(n)), 2.0),
    }
    for what, (ours, limit) in found.items():
        row = limited(f"{what}, seconds", ours, limit, name="wanted at most", n=n)
        yield {"bench": "startup", "shape": "", "attention": "", "dtype": ""} | row
