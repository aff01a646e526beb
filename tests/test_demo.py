"""The demo end to end at a size for seconds, and what it says of figures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello import demo, recipes
from ritornello.accounting import count_parameters
from ritornello.config import ModelConfig
from ritornello.train.data import NO_LABEL, Rows, prepare
from ritornello.train.ngram import baseline, window_bits

RECIPE = """
name = "demo"
[model]
vocab_size = 300
dim = 32
n_loops = 4
max_seq_len = 128
n_heads = 2
n_kv_heads = 1
head_dim = 16
ffn_dim = 48
n_experts = 8
n_active_experts = 2
expert_dim = 16
halting = "gate"
[data]
source = "SOURCE"
tokenizer = "bpe"
bpe_vocab_size = 300
seq_len = 32
[train]
steps = 3
batch_size = 4
mean_loops = 2.0
max_loops = 4
eval_every = 3
eval_batches = 1
eval_loops = [1, 2]
save_every = 3
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe on a small text, cached in a home of its own."""
    words = "the loop returns and the input comes back every time ".split()
    random = np.random.default_rng(0)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(" ".join(random.choice(words, 400)))
    (tmp_path / "demo.toml").write_text(RECIPE.replace("SOURCE", str(text)))
    monkeypatch.setattr(recipes, "find", lambda name: tmp_path / f"{name}.toml")
    monkeypatch.setattr(demo, "N_WINDOWS", 32)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_end_to_end_and_again(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    n_threads = torch.get_num_threads()
    try:
        first = demo.run(out=small / "out", quiet=True)
        said = capsys.readouterr().out
        again = demo.run(out=small / "out", quiet=True)
    finally:
        torch.set_num_threads(n_threads)
    assert list(first["looped"]["bpb"]) == [1, 2, 4, 8, 16, 32]
    assert all(np.isfinite(list(first["looped"]["bpb"].values())))
    words = ("wins", "one standard error", "The byte trigram model is", "halting (mean", "byte trigram", "32 loops")
    for word in (*words, "results.json"):
        assert word in said
    assert (small / "out/depth.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((small / "out/results.json").read_text())["trigram"] == first["trigram"]
    assert {**first, "minutes": 0} == {**again, "minutes": 0}, "a finished demo is read, not trained again"


@pytest.mark.parametrize("which", [demo.TOTAL, demo.ACTIVE])
def test_opponents_have_as_many_parameters(which: str) -> None:
    looped = recipes.from_mapping(recipes.read_toml(recipes.find("demo")))
    counted = count_parameters(looped.model)
    target = counted["total" if which == demo.TOTAL else "active"]
    plain = demo.opponent(looped, which)
    assert plain.model.is_plain and plain.data == looped.data
    assert replace(plain.train, lr=looped.train.lr) == looped.train
    assert abs(count_parameters(plain.model)["total"] / target - 1) < 0.005
    assert counted["total"] > 1.2 * counted["active"]


def test_a_match_is_near_llamas_proportions() -> None:
    for n_parameters in (200_000, 2_000_000):
        plain = demo.matched_plain(ModelConfig(dim=128, vocab_size=512), n_parameters)
        assert 1.5 < plain.ffn_dim / plain.dim < 4.5


def test_trigram_is_scored_on_the_bytes_of_the_windows(small: Path) -> None:
    """All windows together are the whole text: they cost what the baseline does, less the first token of documents."""
    recipe = recipes.from_mapping(recipes.read_toml(recipes.find("demo")))
    dataset = prepare(recipe.data, small / "cache")
    rows = Rows(dataset.validation, seq_len=32)
    batches = list(rows.evaluation(4))
    bits = window_bits(dataset, batches)
    assert len(bits) == len(rows)
    whole, n_targets = baseline(dataset), sum(int((batch.labels != NO_LABEL).sum()) for batch in batches)
    assert n_targets == dataset.validation.n_tokens - dataset.validation.n_documents
    assert bits.sum() < whole.bits.sum() < bits.sum() + 24 * 8 * dataset.validation.n_documents
    shifted = [replace(batch, indices=batch.indices + 1) for batch in batches[:-1]]
    assert abs(window_bits(dataset, shifted)[0] - bits[0]) > 1e-6


def results(plain: float) -> dict[str, Any]:
    size = {"parameters": 10, "active_parameters": 5}
    return {
        "looped": {"bpb": {1: 2.0, 2: 1.9, 4: 1.8, 32: 1.81}, **size},
        "halting": {"bpb": 1.82, "mean_loops": 2.5},
        "gains": {"1->2": (0.1, 0.01), "2->4": (0.1, 0.02)},
        "plain": {demo.TOTAL: {"bpb": plain, **size}, demo.ACTIVE: {"bpb": 3.0, **size}},
        "trigram": {"bpb": 2.5},
        "validation_bytes": 1000,
    }


def test_a_plain_win_is_said_first() -> None:
    assert demo.report(results(1.7)).startswith("The plain transformer, equal total parameters wins: 1.700")
    assert demo.report(results(1.9)).startswith("The looped model wins: 1.800 bits per byte at 4 loops against 1.900")
