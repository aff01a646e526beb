"""The model stays readable in one sitting: fail when a part of it outgrows its budget, and say by how much."""

import sys
from pathlib import Path

MODEL = Path(__file__).parent.parent / "src/ritornello/model"
BUDGETS = {MODEL: 1800, MODEL / "rdt.py": 400}


def n_lines(path: Path) -> int:
    """Lines of a Python file, or of all below a folder."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def main() -> int:
    sizes = {path: n_lines(path) for path in BUDGETS}
    for path, size in sizes.items():
        print(f"{path.name}: {size} of {BUDGETS[path]} lines")
    return int(any(size > BUDGETS[path] for path, size in sizes.items()))


if __name__ == "__main__":
    sys.exit(main())
