"""Which experts tokens take: what is counted, by hand; the dense loops beside them; the verdicts of the experiment."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ritornello.lab import arms, measure, routes
from ritornello.lab.cell import Cell, Trained, build, sizes
from ritornello.lab.experiments import routing
from ritornello.lab.experiments.routing import EVERY, MODEL, ROUTED, Routing
from ritornello.lab.experiments.routing_shown import follows
from ritornello.lab.measure import Row
from ritornello.lab.routes import Routes, forced, observe
from ritornello.lab.tasks import TASKS

TASK = TASKS["chains"]


def as_if_trained(cell: Cell) -> Trained:
    """Nothing here hangs on what was learnt."""
    facts: dict[str, Any] = {"steps": 0, "seconds": 0.0, "flops": 1.0, "peak_bytes": 1, "loss": None}
    return Trained(cell=cell, model=build(cell).eval(), **facts)


def tiny(arm: str) -> Cell:
    return arms.cell(arm, TASK, seed=0, masked=True)


def with_signals(arm: str) -> Any:
    """An untrained model whose loop embedding and LoRA, which start at zero, say something."""
    model = build(tiny(arm))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("loop_B", "loop_embedding_scale")):
                weight.fill_(1.0)
    return model


def one_hot(taken: Any, n_experts: int = 4) -> Any:
    return np.eye(n_experts, dtype=bool)[np.array(taken)]


def of_questions(taken: Any, hops: Any) -> Routes:
    """Of questions alone, and as many edges that always take expert 3."""
    taken, hops = np.array(taken), np.array(hops)
    edges = np.full_like(taken, 3)
    asked = np.arange(2 * len(hops)) >= len(hops)
    nodes = np.zeros((3, len(hops)), np.int64)
    return Routes(one_hot(np.concatenate([edges, taken], axis=1)), 1.0, asked, np.append(0 * hops, hops), nodes)


def test_overlaps_by_hand() -> None:
    a, b = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool)
    assert routes.overlap(a, b).tolist() == [1 / 3, 1.0]
    # two questions: one takes 0 then 0 then 1, the other 1 then 0 then 1; two edges that never change
    found = of_questions([[0, 1], [0, 0], [1, 1]], hops=[2, 1])
    assert found.consecutive() == [0.75, 0.5] and found.from_first() == [0.75, 0.75]
    assert found.of_two_loops() == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert found.of_two_tokens() == pytest.approx((0.5 + 0 + 1 + 1) / 4)  # edges overlap always
    assert found.on_their_way() == (0.0, 0.0)
    assert found.load()[0].tolist() == [1.0, 1.0, 0.0, 2.0] and found.entropy()[1] == 1.0


def test_moving_questions_are_told_from_those_that_have_arrived() -> None:
    taken = [[0, 0], [1, 0], [2, 0], [0, 0]]  # the first question has 3 hops and changes, the second 1 and does not
    assert of_questions(taken, hops=[3, 1]).on_their_way() == (0.0, 1.0)
    assert of_questions(taken, hops=[1, 3]).on_their_way() == (1.0, 0.0)


def test_information_by_hand() -> None:
    labels = np.array([0, 0, 1, 1])
    assert routes.information(labels, one_hot([0, 0, 1, 1])) == pytest.approx(1.0)
    assert routes.information(labels, one_hot([0, 1, 0, 1])) == pytest.approx(0.0)
    rng = np.random.default_rng(0)
    many, sets = rng.integers(32, size=400), one_hot(rng.integers(4, size=400))
    by_chance = routes.information(many, sets)
    assert by_chance > 0.05 > abs(routes.beyond_chance(many, sets, lambda rng: rng.permutation(many)))


def test_what_goes_with_loops_roles_and_nodes() -> None:
    by_loop = of_questions([[0] * 64, [1] * 64], hops=[1] * 64)  # edges always take 3
    assert by_loop.about_loops() > 0.4 and by_loop.about_roles() > 0.9
    same = of_questions([[3] * 64, [3] * 64], hops=[1] * 64)
    assert same.about_loops() == same.about_roles() == pytest.approx(0.0)
    hops = np.tile([1, 2], 64)
    assert of_questions([hops, hops], hops).about_hops_left() > 0.9
    nodes = np.stack([np.random.default_rng(0).permutation(hops), hops])
    follow = replace(of_questions([hops, hops], hops), nodes=nodes)
    bits = follow.about_nodes()
    assert (bits[:, 1] > 0.9).all() and (bits[:, 0] < 0.1).all()


def test_held_experts_are_the_first_loops() -> None:
    model = build(tiny(MODEL))
    look = lambda: observe(model, TASK, 3, n_loops=4, n_problems=2)  # noqa: E731
    own = look()
    assert own.consecutive()[0] < 1
    with forced(model, "held"):
        held = look()
    assert held.consecutive() == [1.0] * 3 and (held.sets[0] == own.sets[0]).all()
    with forced(model, "swapped"):
        swapped = look().sets[0].reshape(2, -1, 16)
    first = own.sets[0].reshape(2, -1, 16)
    assert (swapped[:, 1:] == first[:, :-1]).all() and not (swapped == first).all()
    assert (look().sets == own.sets).all()  # and afterwards the router chooses again


def test_forced_weights_add_up_as_the_routers_do() -> None:
    model = build(tiny(MODEL))
    router = model.recurrent[0].mlp.router  # pyrefly: ignore
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    plain = router(x, 1)
    with forced(model, "swapped"):
        other = router(x, 1)
    torch.testing.assert_close(other[1].sum(-1), plain[1].sum(-1))
    scores = other[2].gather(-1, other[0])
    torch.testing.assert_close(other[1], scores / scores.sum(-1, keepdim=True))
    assert not torch.equal(other[1], plain[1])


@pytest.mark.parametrize(("arm", "told"), [("article-no-signals", False), ("article-no-lora", True), (MODEL, True)])
def test_only_signals_make_a_state_take_other_experts(arm: str, told: bool) -> None:
    found = observe(with_signals(arm), TASK, 3, n_loops=2, n_problems=2)
    assert (found.elsewhere < 1) == told


def test_one_expert_is_a_dense_loop_of_equal_size() -> None:
    article, active, total = (sizes(tiny(arm)) for arm in (MODEL, *routing.OPPONENTS))
    assert active["active"] == article["active"] and total["total"] == article["total"]
    assert active["total"] < article["total"] and total["active"] > article["active"]
    mlp: Any = build(tiny(routing.OPPONENTS[0])).recurrent[0].mlp  # pyrefly: ignore
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    gate, up = (x @ mlp.experts.gate_up_proj[0].T).chunk(2, -1)
    dense = (torch.nn.functional.silu(gate) * up) @ mlp.experts.down_proj[0].T
    torch.testing.assert_close(mlp(x, 0, [None])[0], dense)
    assert not torch.allclose(mlp(x, 0, [None])[0], 2 * dense)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Routing:
    monkeypatch.setattr(measure, "N_QUESTIONS", 2)
    monkeypatch.setattr(routing, "N_PROBLEMS", 1)
    monkeypatch.setattr(routes, "N_SHUFFLES", 1)
    monkeypatch.setattr(routing, "HOPS", (1, 5, 8, 10, 15, 20))
    return Routing()


def test_rows_are_measured_judged_and_shown(few: Routing) -> None:
    rows = [row for arm in (MODEL, "article-dense-active") for row in few.measure(as_if_trained(tiny(arm)))]
    assert [len(found) for found in few.show(rows)] == [6, 3]
    assert all(verdict.outcome == "inconclusive" for verdict in few.judge(rows))
    dense = [row for row in rows if row["model"] != MODEL]
    assert {row["metric"] for row in dense} == {"accuracy"}  # it has no routes
    assert few.judge(dense) == []
    assert {row["of"] for row in rows if "of" in row} == {"trained", "untrained"}


def made_up(beyond: float = 0.0, **changed: dict[str, float]) -> list[Row]:
    """Three seeds in which everything that the experiment claims is so; `changed` by metric, then arm or `of`. beyond:
    what dense loops lose more of accuracy where there are more hops than in training."""
    usual = {
        "overlap_two_loops": {"trained": 0.4, "untrained": 0.9, "article-no-signals": 0.6},
        "overlap_two_tokens": {"trained": 0.1, "untrained": 0.1},
        "overlap_elsewhere": {"trained": 0.5, "untrained": 1.0},
        "overlap_moving": {"trained": 0.2, "untrained": 0.9},
        "overlap_arrived": {"trained": 0.9, "untrained": 0.9},
        "load_least": {"trained": 0.8, "untrained": 0.1},
        "load_most": {"trained": 1.2, "untrained": 4.0},
        "accuracy": {"trained": 1.0, "article-dense-active": 0.8, "article-dense-total": 0.8},
        "accuracy_held": {"trained": 0.5},
        "accuracy_swapped": {"trained": 0.2},
        "node": {"trained": 2.0, "untrained": 0.0},
    }
    values = {metric: by | changed.get(metric, {}) for metric, by in usual.items()}
    rows: list[Row] = []
    for seed in range(3):
        for arm in EVERY:
            base = {"task": "chains", "model": arm, "seed": seed, "total": 1}
            for metric in ("accuracy", "accuracy_held", "accuracy_swapped"):
                value = values[metric].get(arm, values[metric]["trained"]) - 0.001 * seed
                for hops in routing.HOPS:
                    lost = beyond if hops > 5 and arm in routing.OPPONENTS else 0.0
                    here = base | {"metric": metric, "hops": hops, "value": value - lost}
                    rows += [here | {"loops": loops} for loops in routing.LOOPS]
            for of in ("trained", "untrained") if arm in ROUTED else ():
                for hops in (routing.SHALLOW, routing.DEEP):
                    here = base | {"of": of, "hops": hops}
                    for metric in [metric for metric in values if metric.startswith(("overlap", "load"))]:
                        value = values[metric].get(arm, values[metric][of]) if of == "trained" else values[metric][of]
                        rows.append(here | {"metric": metric, "value": value + 0.001 * seed})
                    rows += [here | {"metric": metric, "value": 0.0} for metric in ("bits_loop", "dead")]
                    for loop in range(1, 9):
                        for k in range(12):
                            value = values["node"][of] * (k == loop + 1) + 0.01 * seed
                            rows.append(here | {"metric": "bits_node", "loops": loop, "ahead": k, "value": value})
    return rows


def outcomes(claim: str, rows: list[Row]) -> list[str]:
    found = [verdict.outcome for verdict in Routing().judge(rows) if claim in verdict.claim]
    assert found
    return found


def test_what_is_made_up_to_hold_holds() -> None:
    verdicts = Routing().judge(made_up())
    left = [verdict.claim for verdict in verdicts if verdict.outcome != "holds"]
    assert len(left) == 2 and all("on the hops beyond" in claim for claim in left)  # training's were not learnt
    assert {verdict.rule for verdict in verdicts} == set(Routing.rules.values())
    level = {"article-dense-active": 0.95, "article-dense-total": 0.95}
    rows = made_up(0.5, accuracy=level)
    assert outcomes("dense loop of equal total parameters on the hops beyond", rows) == ["holds"]


@pytest.mark.parametrize(
    ("claim", "metric", "value"),
    [
        ("differ between loops, more than before", "overlap_two_loops", {"trained": 0.88, "article-no-signals": 0.88}),
        ("while a question has hops left", "overlap_moving", {"trained": 0.88}),
        ("experts follow the node", "node", {"trained": 0.05}),
        ("told another loop index", "overlap_elsewhere", {"trained": 0.95}),
        ("more with LoRA and loop embedding", "overlap_two_loops", {"article-no-signals": 0.4}),
        ("holding the first", "accuracy_held", {"trained": 0.99}),
        ("are better than", "accuracy", {"article-dense-active": 0.99, "article-dense-total": 0.99}),
        ("share the load", "load_least", {"trained": 0.1}),
        ("share the load", "load_most", {"trained": 3.0}),
    ],
)
def test_each_claim_can_fail(claim: str, metric: str, value: dict[str, float]) -> None:
    assert set(outcomes(claim, made_up(**{metric: value}))) == {"does not hold"}


def test_what_was_not_learnt_decides_nothing_beyond() -> None:
    rows = made_up(accuracy={"trained": 0.7})
    assert set(outcomes("holding the first", rows)) == {"inconclusive"}
    assert outcomes("dense loop of equal active parameters on the hops beyond", rows) == ["inconclusive"]


def test_where_the_walk_is_ahead_is_found() -> None:
    bits = np.zeros((1, 3, 8))
    bits[0, [0, 1, 2], [3, 4, 5]] = 1.0
    assert follows(bits) == (2, [1.0])
    assert follows(bits, ahead=1)[1] == [-1.0]
