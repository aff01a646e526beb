"""Copy trained models into the package, so that pages, examples and benchmarks have weights without training.

ritornello demo && ritornello lab run depth-extrapolation --full
python scripts/ship_models.py [--demo runs/demo/rdt] [--lab runs/lab]
"""

import argparse
import shutil
import sys
from pathlib import Path

from ritornello.lab import arms
from ritornello.lab.tasks import TASKS
from ritornello.train import checkpoint

SHIPPED = Path(__file__).parent.parent / "src/ritornello/shipped/models"
FROM_LAB = {"chains": "dense", "chains-moe": "article"}
MAX_BYTES = 5_000_000


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", type=Path, default=Path("runs/demo/rdt"))
    parser.add_argument("--lab", type=Path, default=Path("runs/lab"))
    options = parser.parse_args()
    made = SHIPPED.with_name("models.new")
    shutil.rmtree(made, ignore_errors=True)
    ship_text(options.demo, made / "python")
    for name, arm in FROM_LAB.items():
        cell = arms.cell(arm, TASKS["chains"], seed=0, masked=True)
        shutil.copytree(options.lab / "models" / cell.name, made / name)
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    print(f"{size:,} bytes of {MAX_BYTES:,}")
    if size > MAX_BYTES:
        return 1
    shutil.rmtree(SHIPPED, ignore_errors=True)
    made.rename(SHIPPED)
    return 0


def ship_text(run: Path, target: Path) -> None:
    """The run's last checkpoint without what only training needs."""
    found = checkpoint.load(run)
    saved = checkpoint.save(
        target,
        step=found.manifest.step,
        model_state=found.model_state,
        recipe=found.recipe,
        tokenizer_json=found.tokenizer_json,
        optimizer_state={},
        trainer_state={"step": found.manifest.step},
        fingerprint=found.manifest.fingerprint,
    )
    for path in saved.iterdir():
        shutil.move(path, target / path.name)
    shutil.rmtree(target / "checkpoints")


if __name__ == "__main__":
    sys.exit(main())
