"""Several processes do what one does: the same losses and parameters, the same runs, from the same checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ritornello import recipes
from ritornello.engine.generate import load
from ritornello.train import checkpoint
from ritornello.train.consolidate import consolidate
from ritornello.train.trainer import train
from tests.distributed.worker import SABOTAGE, cases, layouts
from tests.train.small import recipe

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 900  # seconds, beside other tests on two cores


@pytest.fixture(scope="module", params=[2, 4])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """One launch for all cases: what its processes found, and the folder with their runs."""
    folder = tmp_path_factory.mktemp(f"of-{request.param}")
    rates: Any = {"schedule": "constant", "router_bias_cooldown": 0.0}  # that do not hang on how many steps are to come
    rates |= {"steps": 8, "save_every": 4, "eval_every": 4, "batch_size": 8, "microbatch_size": 4}
    given = recipe(folder, model={"halting": "gate", "n_recurrent_layers": 2}, **rates)
    (folder / "recipe.json").write_text(recipes.to_json(given))
    train(given, out=folder / "alone", cache_dir=folder)
    train(replace(given, train=replace(given.train, steps=4)), out=folder / "alone first", cache_dir=folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(request.param)]
    command += ["-m", "tests.distributed.worker", str(folder / "results.json"), str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = run.communicate(timeout=TIMEOUT)
    finally:
        run.terminate()  # and it, those that it started
        run.wait()
    assert run.returncode == 0, said[-8000:]
    train(given, out=folder / handed_on(folder), cache_dir=folder, resume=True)
    yield json.loads((folder / "results.json").read_text()), folder


@pytest.mark.parametrize("layout", [*layouts(2), *layouts(4)])
def test_a_step_is_that_of_one_process(launched: tuple[Any, Path], layout: str) -> None:
    if layout not in launched[0]["steps"]:
        pytest.skip("of another number of processes")
    found = launched[0]["steps"][layout]
    size = 2 if layout in layouts(2) else 4
    assert list(found) == [name for name, *_ in cases(layouts(size)[layout], size)]
    for name, (metrics, parameters) in found.items():
        # the gate's feature log KL makes of 1e-16 in a probability a relative 1e-11 where two loops hardly differ
        most = 1e-11 if name == "expected" else 1e-12
        assert metrics <= most and parameters <= most, (name, metrics, parameters)


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_without_its_sum_a_step_is_another(launched: tuple[Any, Path], sabotage: str) -> None:
    """A part of a gradient that is not added up shows."""
    if "sabotage" not in launched[0]:
        pytest.skip("of two processes")
    assert launched[0]["sabotage"][sabotage] > 1e-3


def test_in_bfloat16_every_matrix_has_its_gradient(launched: tuple[Any, Path]) -> None:
    """Where loops without gradients come first, too: a copy that these made would have none."""
    assert min(launched[0]["bf16"].values()) > 0.98, launched[0]["bf16"]


def test_muon_takes_the_same_step_as_far_as_bfloat16_goes(launched: tuple[Any, Path]) -> None:
    """Its iterates are in bfloat16, and products of parts are rounded otherwise."""
    if not launched[0]["muon"]:
        pytest.skip("of two processes")
    for found in launched[0]["muon"].values():
        assert len(found) > 10 and max(found.values()) < 0.1, found


def test_weights_are_put_together_as_often_as_said(launched: tuple[Any, Path]) -> None:
    """The looped layer once a step, or once for each loop and once on the way back; gradients once."""
    found = launched[0]["gathers"]
    for loops in (4, 8):
        once, each = (found[gather][str(loops)] for gather in ("step", "loop"))
        assert once == {"all_gather_single": 6, "reduce_scatter_single": 4}
        assert each == {"all_gather_single": 5 + 2 * loops, "reduce_scatter_single": 4}


def test_a_run_is_that_of_one_process(launched: tuple[Any, Path]) -> None:
    """In float32: equal up to rounding, whoever began it and whoever went on."""
    _, folder = launched
    alone = checkpoint.load(folder / "alone")
    for name in ("together", "alone first", handed_on(folder)):
        found = checkpoint.load(folder / name)
        assert found.manifest.step == 8
        assert far(found.model_state, alone.model_state) < 5e-3  # Adam divides rounding by what is hardly more
        assert metrics(folder / name).keys() == metrics(folder / "alone").keys()
        for step, values in metrics(folder / "alone").items():
            assert metrics(folder / name)[step]["loss"] == pytest.approx(values["loss"], rel=1e-4)
    other = checkpoint.load(checkpoint.path_of(folder / "alone", 4))
    assert far(other.model_state, alone.model_state) > 1e-2


def test_a_checkpoint_is_read_in_any_layout(launched: tuple[Any, Path]) -> None:
    """Six layouts by six, of one, two and four processes: parameters and optimizer states, bit for bit; and a process
    reads the bytes that it holds, no others."""
    found = launched[0]["checkpoints"]
    for pair, (equal, control, read) in found.get("topologies", {}).items():
        assert equal and not control, pair
        assert all(n_read == n_held for n_read, n_held in read), (pair, read)
    assert len(found.get("topologies", {})) in (0, 36)


def test_any_tensor_is_written_once_and_read_in_parts(launched: tuple[Any, Path]) -> None:
    """49 layouts on a mesh of two dims, rows dealt out in turns among them."""
    found = launched[0]["checkpoints"]["any layout"]
    total, *sizes = found["bytes"]
    assert found["whole"] and found["in other layouts"] and not found["control"]
    assert found["parts of one tensor"] > 2
    assert max(sizes) < total, "each process wrote a part"


def test_a_checkpoint_in_the_background_is_of_its_moment(launched: tuple[Any, Path]) -> None:
    assert launched[0]["checkpoints"]["background"] == {"early": True, "equal": True, "control": False}


def test_where_one_process_fails_all_know_and_nothing_is_lost(launched: tuple[Any, Path]) -> None:
    found = launched[0]["checkpoints"]
    assert len(found["failures"]) == 8 and all(found["failures"].values()), found["failures"]
    assert len(found["kept"]) == 4 and all(found["kept"].values()), found["kept"]


def test_several_processes_write_parts_and_one_a_whole(launched: tuple[Any, Path]) -> None:
    """By default; and the whole is made of the parts, without another bit."""
    _, folder = launched
    formats = {name: checkpoint.find(folder / name).manifest.format for name in ("alone", "alone first", "together")}
    assert formats == {"alone": checkpoint.FORMAT, "alone first": checkpoint.SHARDED, "together": checkpoint.SHARDED}
    shutil.copytree(folder / "together", folder / "consolidated")
    consolidate(folder / "consolidated")
    found, parts = checkpoint.load(folder / "consolidated"), checkpoint.load(folder / "together")
    assert found.manifest.format == checkpoint.FORMAT
    assert far(found.model_state, parts.model_state) == 0
    assert far(load(folder / "together", device="cpu").model.state_dict(), found.model_state) == 0


def handed_on(folder: Path) -> str:
    """The run that several processes began, for one to go on with."""
    return next(name for name in ("together first", "pipeline first") if (folder / name).exists())


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """By step, of those with a loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}
