"""The formulas against what a training step of a small model holds, within 10%; all kinds: `benchmarks plan`."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.held import as_on_a_gpu, measured
from benchmarks.plan import of_kind, planned, small
from ritornello.config import Recipe
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops import loss
from ritornello.planning import memory
from ritornello.planning.layout import Layout
from ritornello.planning.memory import Load, Moments, Sizes, training
from ritornello.train.optim import groups

MANY: dict[str, Any] = {"ffn": "moe", "n_experts": 8, "expert_dim": 256, "n_recurrent_layers": 2, "lora_rank": 0}
CASES = {
    "dense gqa": of_kind("dense", "gqa", 4, 0, False, "fp32"),
    "dense mla, bf16, cut": of_kind("dense", "mla", 4, 2, False, "bf16"),
    "experts gqa, bf16, again": of_kind("moe", "gqa", 4, 0, True, "bf16"),
    "experts mla": of_kind("moe", "mla", 2, 0, False, "fp32"),
    "experts gqa, cut, again": of_kind("moe", "gqa", 8, 2, True, "fp32"),
    "gradients of experts": small(model=MANY),
    "gradients of experts, bf16": small(model=MANY, precision="bf16"),
    "two micro-batches": small(model=MANY, microbatch_size=2),
    "muon, plain": small(model={"n_recurrent_layers": 0, "ffn": "dense"}, optimizer="muon", batch_size=1),
    "a vocabulary, tied": small(model={"ffn": "dense", "vocab_size": 4096}, batch_size=1, seq_len=16),
    "norms after branches": small(model={"ffn": "dense", "norm": "sandwich"}, precision="bf16"),
    "muon, biases": small(model={"ffn": "dense", "qk_bias": True, "normalize_input": False}, optimizer="muon"),
    "a probe": small(model={"ffn": "dense", "vocab_size": 2048, "halting": "gate"}),
    "low rank": small(model={"ffn": "dense", "lora_rank": 16, "lora_targets": ("q", "o", "ffn")}),
}


@pytest.mark.parametrize("recipe", CASES.values(), ids=CASES)
def test_what_is_planned_is_what_is_held(recipe: Recipe) -> None:
    formula, real = planned(recipe), measured(recipe)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(formula, part) == pytest.approx(getattr(real, part), rel=0.002), part
    assert formula.peak == pytest.approx(real.peak, rel=0.1)


@pytest.mark.parametrize("name", ["dense gqa", "dense mla, bf16, cut", "experts gqa, bf16, again", "experts mla"])
def test_what_is_kept_on_either_device(name: str) -> None:
    formula, on_gpu = planned(CASES[name]), planned(CASES[name], fused=True)
    assert formula.forward == pytest.approx(measured(CASES[name]).forward, rel=0.1)
    with as_on_a_gpu():
        real = measured(CASES[name])
    assert on_gpu.forward == pytest.approx(real.forward, rel=0.1)
    assert formula.forward != pytest.approx(real.forward, rel=0.1)  # the two are told apart


@pytest.mark.parametrize(
    "change",
    [{"backprop_loops": 2}, {"checkpoint_activations": True}, {"precision": "bf16"}, {"batch_size": 5}],
    ids=str,
)
def test_control_another_run_holds_something_else(change: dict[str, Any]) -> None:
    recipe = CASES["dense gqa"]
    other = replace(recipe, train=replace(recipe.train, **change))
    assert planned(other).peak != pytest.approx(measured(recipe).peak, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_in_chunks(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    recipe = small(model={"ffn": "dense", "vocab_size": 4096, "lora_rank": 0}, precision=precision, batch_size=1)
    whole = measured(recipe).peak
    for module in (loss, memory):
        monkeypatch.setattr(module, "CHUNK_NUMBERS", 2**17)  # 32 tokens
    formula, real = planned(recipe), measured(recipe)
    assert formula.peak == pytest.approx(real.peak, rel=0.1)
    assert formula.peak != pytest.approx(whole, rel=0.1)


def test_muon_moves_what_the_formula_says() -> None:
    recipe = small(model={"ffn": "moe", "attention": "mla", "lora_rank": 4, "halting": "gate"}, optimizer="muon")
    table = groups(RecurrentDepthTransformer(recipe.model), recipe.train)
    muon, adamw = (
        sum(p.numel() for n in names for p in table[n].values()) for names in (["muon"], ["decay", "no_decay"])
    )
    held = training(recipe, fused=False)[1].optimizer
    assert held == 4 * muon + 8 * adamw
    assert held != 8 * (muon + adamw)


def test_a_layout_divides_what_it_says() -> None:
    recipe = small(model=MANY, precision="bf16")
    alone, spread = (
        Moments.of(recipe, layout, fused=True) for layout in (Layout(), Layout(shard=4, expert=2, tensor=2))
    )
    sizes = Sizes.of(recipe.model)
    assert spread.held.experts == sizes.experts / 8 and spread.held.root == sizes.root / 4
    assert spread.whole.experts == sizes.experts / 4 and spread.whole.block == sizes.block / 2
    looped = spread.whole.experts + spread.whole.block
    assert alone.gathered == 0 and 2 * looped < spread.gathered < 4 * looped
    assert alone.copies(left=2) > 0 == spread.copies(left=2)
    by_loop = replace(spread, layout=replace(spread.layout, gather="loop"))
    assert by_loop.gathered == spread.gathered  # two layers: both are under way
    more = small(model=MANY | {"n_recurrent_layers": 4})
    step, loop = (Moments.of(more, Layout(shard=2, gather=gather), fused=True).gathered for gather in ("step", "loop"))
    assert loop < 0.6 * step


def test_experts_are_copied_by_each_loop_unless_computed_again() -> None:
    sizes = Sizes.of(small(model=MANY).model)
    few, many = (small(model=MANY, max_loops=n, precision="bf16") for n in (2, 4))
    copies = [Moments.of(recipe, Layout(), fused=True).at_loss().copies for recipe in (few, many)]
    assert copies[1] - copies[0] == 2 * 2 * sizes.experts
    again = replace(many, train=replace(many.train, checkpoint_activations=True))
    assert Moments.of(again, Layout(), fused=True).at_loss().copies == copies[0] - 2 * 2 * sizes.experts
    assert Moments.of(small(model=MANY), Layout(), fused=True).at_loss().copies == 0


def test_drawn_depth_counts_the_deepest_where_a_row_is_alone() -> None:
    recipe = small(model={"ffn": "dense", "n_loops": 16}, depth="poisson", mean_loops=4.0, max_loops=16)
    alone = replace(recipe, train=replace(recipe.train, microbatch_size=1))
    assert Load.of(alone, Layout()).loops == 16
    assert Load.of(recipe, Layout()).loops == 4
    cut = replace(alone, train=replace(alone.train, backprop_loops=3))
    assert (Load.of(cut, Layout()).loops, Load.of(cut, Layout()).idle) == (3, 13)


@pytest.mark.parametrize(
    ("model", "train", "said"),
    [
        ({"carry_streams": 2}, {}, "model.carry_streams = 2: must be 1 for a plan"),
        ({"anchored": True}, {}, "model.anchored = True"),
        ({"state_norm": "loop"}, {}, "model.state_norm = 'loop'"),
        ({"activation": "relu2", "ffn": "dense"}, {}, "model.activation = 'relu2'"),
        ({"value_embeddings": (0,)}, {}, r"model.value_embeddings = \(0,\): must be \(\) for a plan"),
        ({"qk_norm": True}, {}, "model.qk_norm = True"),
        ({"read_matrix": True}, {}, "model.read_matrix = True"),
        ({"halting": "act"}, {}, "model.read_out = 'last'"),
        ({"halting": "gate"}, {"halting_loss": "expected"}, "train.halting_loss = 'expected'"),
    ],
)
def test_what_has_no_formula_is_refused(model: dict[str, Any], train: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        training(small(model=model, **train))
