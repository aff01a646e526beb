"""How long a newcomer waits: imports, the command's help, the largest preset without its numbers."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.timing import Work, alone, paired

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
    ours, theirs = (python("-c", f"import torch; {rest}") for rest in (MODEL, "pass"))
    imports = paired(ours, theirs, n=max(n, MANY))
    yield common | limited("import ritornello, after torch's", imports.ours - imports.peer, 0.3, max(n, MANY))
    yield common | limited("ritornello --help", alone(python("-c", HELP), n=n), 0.5, n)
    found = subprocess.run([sys.executable, "-c", LARGEST], check=True, capture_output=True, text=True).stdout
    yield common | limited("the preset 1t on the meta device", float(found), 2.0, 1)


def limited(metric: str, ours: float, limit: float, n: int) -> dict[str, Any]:
    said = {"metric": f"{metric}, seconds", "ours": ours, "peer": limit, "peer_name": "wanted at most"}
    return said | {"ratio": limit / max(ours, 1e-3), "ceiling": limit, "utilisation": ours / limit, "n": n}
