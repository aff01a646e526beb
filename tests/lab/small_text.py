"""A small text in the place of Python's standard library, for tests."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ritornello.lab.cell import Cell
from ritornello.lab.tasks import text

WORDS = "the loop reads what it wrote before and writes it again until nothing changes any more".split()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 files of a few thousand bytes each; the cache goes to `folder` too."""
    rng = random.Random(0)
    source = folder / "source"
    source.mkdir()
    for i in range(30):
        lines = (" ".join(rng.choices(WORDS, k=8)) for _ in range(60))
        (source / f"part-{i}.txt").write_text(f"file {i}\n" + "\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(text, "SOURCE", str(source))
    monkeypatch.setenv("HOME", str(folder))


def shrunk(cell: Cell) -> Cell:
    """The same with a model of a few parameters, windows of 16 tokens and three steps."""
    sizes: dict[str, Any] = {"vocab_size": 300, "dim": 16, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 16}
    train = replace(cell.train, steps=3, batch_size=2, warmup_steps=0)
    task_sizes = (("seq_len", 16), ("vocab_size", 300))
    return replace(cell, model=replace(cell.model, **sizes), train=train, task_sizes=task_sizes)
