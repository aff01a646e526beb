"""The examples run, and what they print is true of a few steps already."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FALLS = r"held-out loss ([\d.]+) -> ([\d.]+)"
# TRL 1.16 and PEFT 0.21 use names that transformers 5.23 is leaving
LEAVING = "ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning"
pytestmark = [pytest.mark.docs, pytest.mark.filterwarnings(LEAVING)]


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """What an example prints: run here, for what it imports takes longer than its steps."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["sft.py", "peft_lora.py"])
def test_the_loss_falls(said, name, tmp_path):
    before, after = re.search(FALLS, said(name, "--steps", "8")).groups()
    assert float(after) < float(before) and any(tmp_path.glob("*.safetensors"))


def test_the_margin_widens(said, tmp_path):
    before, after = re.search(
        r"held-out rewards/margins ([-\d.]+) -> ([-\d.]+)", said("dpo.py", "--steps", "8", "--loops", "2")
    ).groups()
    assert float(before) == 0 and float(after) > 0.05
    assert (tmp_path / "adapter_model.safetensors").exists()
