"""A checkpoint of every format there ever was is read and continued.

`formats/format_<n>` was written by the code of its time after 20 steps of tests/train/small.py's recipe, and
`format_<n>.json` holds the losses of the ten steps after them. Neither is ever written again. Format 3
was written by two processes: the run goes on as it would have after one.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ritornello.train import checkpoint, runs
from ritornello.train.trainer import train
from tests.train.small import text_file

FORMATS = Path(__file__).parent / "formats"


def test_none_is_missing():
    assert [path.name for path in sorted(FORMATS.glob("*/"))] == [
        f"format_{n}" for n in range(1, checkpoint.SHARDED + 1)
    ]
    assert sorted(checkpoint.MIGRATIONS) == list(range(1, checkpoint.FORMAT))


@pytest.mark.parametrize("name", [f"format_{n}" for n in range(1, checkpoint.SHARDED + 1)])
def test_a_run_goes_on(tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(FORMATS / name, run / "checkpoints" / "step_000020")
    found = checkpoint.load(run)
    assert found.manifest.format == int(name.removeprefix("format_"))
    recipe = replace(found.recipe, data=replace(found.recipe.data, source=str(text_file(tmp_path))))
    recipe = replace(recipe, train=replace(recipe.train, steps=30))
    train(recipe, out=run, device="cpu", cache_dir=tmp_path / "cache", resume=True, other_data=True)
    losses = [line["loss"] for line in runs.lines(run) if "loss" in line]
    expected = json.loads((FORMATS / f"{name}.json").read_text())["losses"]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses != pytest.approx(expected[1:] + expected[:1], rel=1e-3)
    assert checkpoint.load(run).manifest.format == checkpoint.FORMAT
