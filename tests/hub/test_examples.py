"""The examples run, and what they print is true of a few steps already."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from ritornello.config import ModelConfig
from ritornello.hub.export import write_model
from ritornello.hub.modeling import RitornelloForCausalLM
from ritornello.hub.native import load_exported
from ritornello.hub.tokenizer import to_transformers
from ritornello.hub.upcycle import upcycle
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.tokenizer import ByteTokenizer

PLAIN = ModelConfig(
    vocab_size=264,
    dim=64,
    n_prelude_layers=4,
    n_recurrent_layers=0,
    n_coda_layers=0,
    ffn="dense",
    lora_rank=0,
    injection="none",
    initial_state="e",
    normalize_input=False,
    loop_embedding=False,
)
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


def test_loops_learn_from_the_plain_model(said, tmp_path):
    plain, looped = made_of_loops(tmp_path)
    options = ["--steps", "8", "--length", "32", "--lr", "1e-2", "--out", str(tmp_path / "out")]
    printed = said("heal.py", str(looped), "--teacher", str(plain), *options)
    first, last = map(float, re.search(r"divergence ([\d.]+) -> ([\d.]+) nats", printed).groups())
    assert last < 0.9 * first
    assert float(re.search(r"logits differ by (\S+)", printed)[1]) < 1e-3
    assert load_exported(tmp_path / "out").model.config.n_loops == 2


def made_of_loops(folder):
    """A plain model and one with its layers as loops, as `convert` writes them."""
    plain = RecurrentDepthTransformer(PLAIN, seed=0)
    looped = upcycle(plain, n_prelude=1, n_recurrent=1, n_loops=2, rank=0)
    for name, model in (("plain", plain), ("looped", looped)):
        (folder / name).mkdir()
        write_model(RitornelloForCausalLM.of(model), folder / name, dtype=None, max_shard="5GB")
        to_transformers(ByteTokenizer(), max_length=64).save_pretrained(folder / name)
    return folder / "plain", folder / "looped"


def test_the_margin_widens(said, tmp_path):
    before, after = re.search(
        r"held-out rewards/margins ([-\d.]+) -> ([-\d.]+)", said("dpo.py", "--steps", "8", "--loops", "2")
    ).groups()
    assert float(before) == 0 and float(after) > 0.05
    assert (tmp_path / "adapter_model.safetensors").exists()
