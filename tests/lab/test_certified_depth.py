"""Certificates of orbits: on maps whose answer is known, on a model, and what an experiment makes of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.lab import arms, cell, orbits
from ritornello.lab.experiments import certified_depth
from ritornello.lab.experiments.certified_depth import Asked, CertifiedDepth, Watched
from ritornello.lab.measure import Row, pick_rows
from ritornello.lab.tasks import build_task
from ritornello.model.rdt import RecurrentDepthTransformer

SIZES = {"n_nodes": 8, "n_chains": 2}
TASK = build_task("chains", SIZES)
ASKED = Asked.of(TASK, (1, 2, 3), 1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(orbits, "START", 48)
    monkeypatch.setattr(orbits, "LENGTHS", (12,))
    monkeypatch.setattr(orbits, "SIZES", (1e-6,))
    monkeypatch.setattr(certified_depth, "SETTLED", 20)
    yield


def model(*, copies: bool = True, decay: float = 0.5) -> RecurrentDepthTransformer:
    """An untrained model, in float64; with `copies` its loop is h -> decay · h + e."""
    found = cell.build(arms.cell("dense", TASK, seed=0, masked=True, sizes=SIZES, steps=1)).eval().double()
    with torch.no_grad():
        if copies:
            for layer in found.recurrent:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        found.injection.decay = lambda: torch.full((), decay).to(found.norm.weight)
        found.injection.input_matrix = lambda: torch.ones((), dtype=found.norm.weight.dtype)
    return found


def test_a_contraction_is_certified_with_its_own_factor() -> None:
    found = orbits.certify(model(), ASKED.tokens)
    assert found.certified.all() and (found.period == 1).all() and (found.length == 12).all()
    # the Frobenius norm of 0.5^12 · I, times SAFETY, up to the scatter of a few probes
    expected = orbits.SAFETY * 0.5**12 * np.sqrt(64 * np.arange(1, found.factor.shape[1] + 1))
    assert found.factor == pytest.approx(np.tile(expected, (len(found.factor), 1)), rel=0.5)
    h = 2 * orbits.Loops(model(), ASKED.tokens).e  # h = h / 2 + e
    assert torch.allclose(found.centre, h, atol=1e-9)


def test_what_does_not_contract_is_not_certified() -> None:
    assert not orbits.certify(model(decay=1.0), ASKED.tokens).certified.any()
    assert not orbits.certify(model(decay=0.99), ASKED.tokens).certified.any()  # 12 loops are too few to tell
    assert orbits.certify(model(decay=-0.5), ASKED.tokens).certified.all()


def test_a_cycle_is_found_with_its_period() -> None:
    """Each number's size goes to 1 while its sign turns at every loop."""
    found = model()
    found.injection.forward = lambda h, e: -0.5 * (h + h.sign())
    two = orbits.certify(found, ASKED.tokens)
    assert two.certified.all() and (two.period == 2).all()
    assert (two.answers[0] == two.answers[2]).all() and (two.answers[0] != two.answers[1]).any()


def test_growth_is_the_norm_of_the_jacobian() -> None:
    found = model(copies=False)
    tokens = ASKED.tokens[:1]
    centre = orbits.Loops(found, tokens).first().detach()
    growth, _ = orbits._growth(found, tokens, centre.double(), 1e-4, 1, None)
    loops = orbits.Loops(found, tokens)
    jacobian = torch.autograd.functional.jacobian(lambda h: loops(h), centre).flatten(3).flatten(0, 2)
    for t in (0, 5, centre.shape[1] - 1):
        some = (t + 1) * centre.shape[2]
        assert growth[1, 0, t] / orbits.SAFETY == pytest.approx(float(jacobian[:some, :some].norm()), rel=0.2)


def test_room_is_room() -> None:
    """No step shorter than the bound changes an answer; one a few times as long does."""
    found = model()
    loops = orbits.Loops(found, ASKED.tokens)
    h = loops.first()
    room, before = orbits._room(loops, h), loops.read(h).argmax(-1)
    step = torch.randn(200, *h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step /= step.norm(dim=-1, keepdim=True)
    changed = lambda size: loops.read(h + size * room[..., None] * step).argmax(-1) != before  # noqa: E731
    assert not changed(0.999).any() and changed(30).any()


def test_a_certificate_is_what_the_run_does() -> None:
    found = Watched.of(model(), ASKED, 100)
    asked = ASKED.asked
    assert (found.right | found.wrong)[asked].all() and not found.broken.any()
    assert (found.entered[asked] > 0).all() and (found.entered[asked] < 60).all()
    assert not (found.right & ~found.kept).any()


def test_a_wrong_answer_is_never_certified_to_be_right() -> None:
    taken = Watched.of(model(), ASKED, 70)
    says = torch.from_numpy(taken.found.answers[0].astype(np.int64))
    agreeing = Asked(ASKED.tokens, ASKED.asked, ASKED.hops, says.numpy()[None])
    assert Watched.of(model(), agreeing, 70).right[ASKED.asked].all()  # positive control: the oracle says the same
    other = Asked(ASKED.tokens, ASKED.asked, ASKED.hops, (says.numpy()[None] + 1) % 8)
    wrong = Watched.of(model(), other, 70)
    assert not wrong.right.any() and wrong.wrong[ASKED.asked].all() and not wrong.kept[ASKED.asked].any()


def test_a_run_that_leaves_breaks_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = orbits.run

    def leaves(*args: Any) -> orbits.Run:
        found = whole(*args)
        found.answers[-1] += 1
        return found

    monkeypatch.setattr(orbits, "run", leaves)
    assert Watched.of(model(), ASKED, 70).broken[ASKED.asked].all()


def test_wanted_answers_of_a_cycle_go_round() -> None:
    task = build_task("cyclic", {"n_nodes": 8})
    asked = Asked.of(task, None, 2)
    assert asked.wanted.shape[0] == 8 and (asked.wanted[0][:, 8:] == np.arange(8)).all()
    assert (asked.wanted[5] == task.solve(asked.tokens.numpy(), np.array([5, 5]))).all()


def test_rows_and_pages_of_a_tiny_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certified_depth, "PROBLEMS", {(1, 2): 2, (6,): 2})
    monkeypatch.setattr(certified_depth, "HOPS", (1, 2, 6))
    monkeypatch.setattr(certified_depth, "TRAINING", (1, 2))
    monkeypatch.setattr(certified_depth, "DEEP", (6,))
    monkeypatch.setattr(certified_depth, "LONG", 130)
    monkeypatch.setattr(certified_depth, "N_CYCLES", 2)
    experiment, quick = CertifiedDepth(), {"steps": 2, "batch_size": 2, "warmup_steps": 0, "model": {"halting": "none"}}
    cycle = build_task("cyclic", {"n_nodes": 8})
    cells = [
        arms.cell("dense", TASK, seed=0, masked=True, sizes=SIZES, **quick),
        arms.cell("dense", cycle, seed=0, masked=True, sizes={"n_nodes": 8}, **quick),
    ]
    rows = [row for made in cells for row in experiment.measure(cell.train(made))]
    assert {row["hops"] for row in rows} == {1, 2, 6, None}
    assert {row["loops"] for row in pick_rows(rows, metric="accuracy")} == {8, 20, 130}
    assert all(0 <= row["value"] <= 1 for row in rows if row["metric"] in ("certified", "certified_wrong", "kept"))
    assert {verdict.outcome for verdict in experiment.judge(rows)} == {"inconclusive"}
    tables, pictures = experiment.show(rows)
    assert len(tables) == 3 and len(pictures) == 1
    chains = pick_rows(rows, task="chains")
    assert len(experiment.show(chains)[0]) == 3 and experiment.show(pick_rows(rows, task="cyclic"))[1] == []


def made_up(
    share: dict[str, float],
    *,
    cycle: float | None = None,
    broken: float = 0.0,
    kept: float = 1.0,
    untrained: float = 0.3,
) -> list[Row]:
    """Rows of three seeds, `share` of each arm certified to be right."""
    rows: list[Row] = []
    for seed in range(3):
        for arm, value in share.items():
            for hops in certified_depth.HOPS:
                base = {
                    "task": "chains",
                    "model": arm,
                    "seed": seed,
                    "hops": hops,
                    "loops": 10_000,
                    "total": 1,
                    "n": 10,
                }
                now = {"certified": value - 0.001 * seed, "certified_wrong": 0.01, "broken": broken, "kept": kept}
                now |= {"untrained_certified": 0.1, "untrained_certified_wrong": untrained}
                rows += [base | {"metric": name, "value": x} for name, x in now.items()]
                rows += [
                    base | {"metric": "accuracy", "value": 1.0, "loops": n}
                    for n in (8, certified_depth.SETTLED, 10_000)
                ]
        if cycle is not None:
            base = {
                "task": "cyclic",
                "model": "dense",
                "seed": seed,
                "hops": None,
                "loops": 10_000,
                "total": 1,
                "n": 10,
            }
            now = {"certified": cycle, "certified_wrong": 0.0, "broken": 0.0, "kept": 1.0, "lowest": 1.0}
            rows += [base | {"metric": name, "value": x} for name, x in now.items()]
    return rows


def outcomes(rows: list[Row]) -> dict[str, str]:
    rules = {rule: name for name, rule in CertifiedDepth.rules.items()}
    return {rules[verdict.rule]: verdict.outcome for verdict in CertifiedDepth().judge(rows)}


def test_judges_by_its_rules() -> None:
    arms_share = {"dense": 0.99, "short-training": 0.5}
    good = outcomes(made_up(arms_share, cycle=0.99))
    assert good == dict.fromkeys(("certified", "lasting", "trained", "matters", "round", "kept"), "holds")
    assert outcomes(made_up({"dense": 0.3}))["certified"] == "does not hold"
    assert outcomes(made_up(arms_share, kept=0.9))["lasting"] == "does not hold"
    assert outcomes(made_up({"dense": 0.4}))["trained"] == "does not hold"
    assert outcomes(made_up({"dense": 0.9}, untrained=0.8))["trained"] == "does not hold"  # as certain, but wrong
    assert outcomes(made_up({"dense": 0.99, "short-training": 0.98}))["matters"] == "does not hold"
    assert outcomes(made_up(arms_share, cycle=0.2))["round"] == "does not hold"
    assert outcomes(made_up(arms_share, broken=0.1))["kept"] == "does not hold"


def test_too_little_decides_nothing() -> None:
    rows = made_up({"dense": 0.99}, cycle=0.99)
    two = outcomes([row for row in rows if row["seed"] < 2])
    assert set(two.values()) == {"inconclusive"}
    for row in rows:
        if row["metric"] in ("accuracy", "lowest"):
            row["value"] = 0.5
    found = outcomes(rows)
    assert found["certified"] == found["lasting"] == found["round"] == "inconclusive"
