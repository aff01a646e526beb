"""The examples run, and what they print is true of a few steps already."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FALLS = r"held-out loss ([\d.]+) -> ([\d.]+)"


def run(name, folder, *options):
    command = [sys.executable, str(EXAMPLES / name), "--out", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.docs
@pytest.mark.parametrize(("name", "steps"), [("sft.py", "8"), ("peft_lora.py", "8")])
def test_the_loss_falls(name, steps, tmp_path):
    before, after = re.search(FALLS, run(name, tmp_path, "--steps", steps)).groups()
    assert float(after) < float(before) and any(tmp_path.glob("*.safetensors"))


@pytest.mark.docs
def test_the_margin_widens(tmp_path):
    said = run("dpo.py", tmp_path, "--steps", "8", "--loops", "2")
    before, after = re.search(r"held-out rewards/margins ([-\d.]+) -> ([-\d.]+)", said).groups()
    assert float(before) == 0 and float(after) > 0.05
    assert (tmp_path / "adapter_model.safetensors").exists()
