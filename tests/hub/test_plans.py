"""transformers shares a model out by the plans that its configuration declares: nothing changes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ritornello.hub.plans import expert_plan, fsdp_plan, tensor_plan
from tests.hub.kinds import KINDS, config, model
from tests.hub.spread import CASES

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_names_something(kind):
    shape = config(kind).shape()
    found = model(kind)
    names = [*(name for name, _ in found.model.named_modules()), *(name for name, _ in found.model.named_parameters())]
    generic = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    for plan in (tensor_plan(shape), expert_plan(shape) or {}, fsdp_plan(shape)):
        assert set(plan) <= generic
    assert (expert_plan(shape) is None) == (kind != "moe" and kind != "mla")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("spread")
    for kind in {kind for kind, _ in CASES}:
        model(kind).save_pretrained(folder / kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "tests.hub.spread", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.dist
@pytest.mark.parametrize("name", [f"{kind}/{way}" for kind, way in CASES])
def test_two_processes_are_one(found, name):
    case = found[name]
    assert case["logits"] < 5e-6 and case["generated"]
    assert not case["names"] and case["gradients"] < 5e-6
    assert case["control"] > 1e-3
    assert case["share"] < 0.8
