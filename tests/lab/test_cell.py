import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.config import ExitRule
from ritornello.lab import arms, cell
from ritornello.lab.dynamics import largest_state, observe, spectral_radius
from ritornello.lab.measure import (
    Costs,
    Questions,
    accuracy,
    accuracy_rows,
    all_questions,
    correlation_rows,
    pick_rows,
    problems,
    stopping_rows,
)
from ritornello.lab.tasks import build_task
from ritornello.train.data import NO_LABEL

SIZES = {"n_nodes": 8, "n_chains": 2}
TASK = build_task("chains", SIZES)


def small(arm: str = "dense", *, seed: int = 0, masked: bool = True, **changes: Any) -> cell.Cell:
    """An arm on 8 nodes, for a few steps."""
    settings = {"steps": 6, "batch_size": 4, "warmup_steps": 1} | changes
    return arms.cell(arm, TASK, seed=seed, masked=masked, sizes=SIZES, **settings)


def weights(found: cell.Trained) -> dict[str, torch.Tensor]:
    return found.model.state_dict()


def test_training_is_a_function_of_the_cell() -> None:
    first, again, other = (weights(cell.train(x)) for x in (small(), small(), small(seed=1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("arm", ["article", "plain-depth", "bf16-carry", "act-last"])
def test_stored_cell_reads_back(tmp_path: Path, arm: str) -> None:
    made = cell.trained(small(arm), tmp_path)
    again = cell.trained(small(arm), tmp_path)
    assert (made.steps, made.flops, made.seconds) == (again.steps, again.flops, again.seconds)
    assert all(torch.equal(weights(made)[name], weights(again)[name]) for name in weights(made))
    read = cell.load(tmp_path / made.cell.name)
    assert read.cell == made.cell and type(read.model.__dict__.get("carry")) is type(made.model.__dict__.get("carry"))


def test_names_differ_with_any_setting() -> None:
    base = small()
    others = [small(lr=1e-3), small(masked=False), replace(base, hops=4), small(seed=1), small("no-injection")]
    assert len({base.name, *(other.name for other in others)}) == 6
    assert base.name == small().name


def test_mask_leaves_out_what_the_loops_cannot_reach() -> None:
    masked, free = (small(masked=masked, batch_size=64) for masked in (True, False))
    loops = cell.depth.sample(masked.train, step=0, n_sequences=64)
    asked, every = (cell.batch(x, TASK, 0).labels != NO_LABEL for x in (masked, free))
    assert (asked <= every).all() and asked.sum() < every.sum()
    deep = loops >= masked.hops
    assert (asked[deep] == every[deep]).all()
    assert asked[loops == 1].sum() < every[loops == 1].sum()


def test_arms_read_the_same_problems() -> None:
    assert (cell.batch(small(), TASK, 3).tokens == cell.batch(small("article"), TASK, 3).tokens).all()
    assert not (cell.batch(small(), TASK, 3).tokens == cell.batch(small(), TASK, 4).tokens).all()


def test_plain_models_are_told_what_loops_would_say() -> None:
    task = build_task("cyclic", {"n_nodes": 8})
    looped, plain = (
        arms.cell(arm, task, seed=0, masked=False, sizes={"n_nodes": 8}) for arm in ("dense", "plain-depth")
    )
    codes = {int(x) for step in range(4) for x in np.unique(cell.batch(plain, task, step).tokens[:, 8:, 1])}
    assert codes == {8 + k for k in range(1, 6)}
    assert {int(x) for x in np.unique(cell.batch(looped, task, 0).tokens[:, 8:, 1])} == {8}


def test_plain_models_answer_the_same_questions_where_loops_say_hops() -> None:
    task = build_task("cyclic", {"n_nodes": 8})
    looped, plain = (
        arms.cell(arm, task, seed=0, masked=False, sizes={"n_nodes": 8}) for arm in ("dense", "plain-depth")
    )
    assert all((cell.batch(looped, task, step).labels == cell.batch(plain, task, step).labels).all() for step in (0, 5))


def test_questions_are_as_many_as_asked_for_of_each_hop() -> None:
    for hops in (1, 2, 5):
        batch = problems(TASK, hops, told=False, n=9)
        assert (batch.labels != NO_LABEL).sum() == 9
        assert (batch.labels != NO_LABEL).any(axis=1)[-1]  # no problem is computed for nothing
    assert (problems(TASK, 2, told=False, n=4).labels == problems(TASK, 2, told=False, n=4).labels).all()


def test_divergence_is_a_result(tmp_path: Path) -> None:
    found = cell.train(small(masked=False, lr=1e30, steps=20))
    assert found.diverged is not None and found.steps == found.diverged < 20
    text = cell.describe(found)
    assert "NaN" not in text and json.loads(text)["trained"]["diverged"] == found.diverged


def test_bf16_carry_rounds_the_state() -> None:
    tokens = torch.from_numpy(problems(TASK, 3, told=False, n=2).tokens)
    for arm, rounded in (("bf16-carry", True), ("dense", False)):
        h = cell.build(small(arm))(tokens, n_loops=2, trajectory=True).trajectory[-1].h
        assert torch.equal(h, h.to(torch.bfloat16).float()) == rounded


def test_accuracy_counts_right_answers() -> None:
    model = cell.build(small()).eval()
    found = accuracy(model, Questions.of(model, TASK, (1, 3), n=16), (2, 5))
    batch = problems(TASK, 3, told=False, n=16)
    with torch.no_grad():
        answers = model(torch.from_numpy(batch.tokens), n_loops=5).logits.argmax(-1).numpy()
    asked = batch.labels != NO_LABEL
    assert found[5][3] == pytest.approx((answers == batch.labels)[asked].mean())
    assert 0 < asked.sum() < asked.size


def test_rows_state_what_they_cost() -> None:
    for arm, loops in (("dense", {2, 4}), ("plain-depth", {0})):
        found = cell.train(small(arm))
        rows = accuracy_rows("x", found, hops=(1, 2), loops=(2, 4))
        assert {row["loops"] for row in rows} == loops and {row["hops"] for row in rows} == {1, 2}
        names = {"experiment", "task", "role", "model", "seed", "hops", "loops", "metric", "value", "n"}
        costs = {"total", "active", "non_embedding", "training_flops", "latency_ms", "kv_bytes"}
        costs |= {"training_seconds", "peak_bytes", "steps", "diverged"}
        assert all(set(row) == names | costs for row in rows)
        assert [row["seed"] for row in pick_rows(rows, hops=1, loops=max(loops))] == [0]


def test_kv_bytes_grow_with_loops() -> None:
    costs = Costs(cell.train(small()), TASK)
    assert costs.at(4)["kv_bytes"] == 4 * costs.at(1)["kv_bytes"]
    assert costs.at(2.5)["kv_bytes"] == round(2.5 * costs.at(1)["kv_bytes"])


def test_stopping_never_stops_at_threshold_zero() -> None:
    found = cell.train(small())
    rules = {"never": ExitRule("kl", 0.0), "at once": ExitRule("kl", 1e9)}
    rows = stopping_rows("x", found, rules, hops=(1, 2), max_loops=6)
    rho = correlation_rows("x", found, rules, hops=4, max_loops=6, n=2)
    assert [row["value"] for row in rho] == [0.0, 0.0]  # neither varies
    used = {row["rule"]: row["value"] for row in rows if row["metric"] == "loops_used" and row["hops"] == 2}
    assert used == {"never": 6.0, "at once": 1.0}


def test_all_questions_of_a_problem_with_their_hops() -> None:
    batch, hops = all_questions(TASK, 4, n=3)
    found = TASK.solve(batch.tokens, np.full(3, 4))
    asked = batch.labels != NO_LABEL
    assert (batch.labels[asked] == found[asked]).all() and len(hops) == asked.sum()
    assert set(hops.tolist()) == {1, 2, 3, 4} and (hops == 4).sum() == 3


def test_training_flops_are_linear_in_loops() -> None:
    one, two, four = (cell.training_flops(small(), seq_len=16, loops=n) for n in (1.0, 2.0, 4.0))
    assert four - two == pytest.approx(2 * (two - one)) and two > one


def test_spectral_radius_of_a_known_map() -> None:
    model = cell.build(small())
    tokens = torch.from_numpy(problems(TASK, 2, told=False, n=1).tokens)
    x = model.embed(tokens).detach()
    context, e = model.context(x), model.input_norm(x).detach()
    with torch.no_grad():
        for layer in model.recurrent:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    found = spectral_radius(model, torch.randn_like(e), e, context, 0)
    assert found == pytest.approx(model.injection.decay().max().item(), rel=1e-3)
    with torch.no_grad():
        model.recurrent[0].mlp.down_proj.weight.normal_(std=1.0)
    assert spectral_radius(model, torch.randn_like(e), e, context, 0) != pytest.approx(found, rel=1e-2)


def test_gradients_by_loop_are_those_of_a_perturbation() -> None:
    model = cell.build(small()).double()
    batch = problems(TASK, 2, told=False, n=2)
    found = observe(model, batch, n_loops=3)
    assert len(found.gradient) == 3 and all(x > 0 for x in found.gradient)
    assert found.state > 0 and 0 < found.rho < 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_largest_state_is_the_forward_pass() -> None:
    model = cell.build(small()).eval()
    batch = problems(TASK, 2, told=False, n=2)
    found = largest_state(model, batch, depths=(2, 5))
    with torch.no_grad():
        h = model(torch.from_numpy(batch.tokens), n_loops=5, trajectory=True).trajectory[-1].h
    assert found[5] == pytest.approx(h.norm(dim=-1).max().item())
    assert found[2] != found[5]
    assert found[5] <= model.state_bound(5)
