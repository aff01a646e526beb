"""Halted tokens are frozen, weights sum to one, and what an exit rule computes is what budgets would."""

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.model.depth import Depth
from ritornello.model.halting import HALTING_HEADS
from tests.model.builders import build, close, differ, every_kind, gradients, lively, rules_for, tokens_for

T = 5


@every_kind
def test_an_exit_is_a_budget(row: dict) -> None:
    """Leaving after n loops gives what a budget of n gives: the token is frozen either way. Without gradients the
    recurrence ends with the last token, with gradients it runs on: both give the same."""
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    for name in rules_for(model.config)[:2]:
        rule = lively(model, tokens, name, 6)
        with torch.no_grad():
            ended = model(tokens, n_loops=6, exit=rule, trajectory=True)
            budget = model(tokens, n_loops=ended.loops_used)
        close(ended.logits, budget.logits)
        differ(ended.logits, model(tokens, n_loops=6).logits)
        assert torch.equal(ended.loops_used, budget.loops_used)
        assert len(ended.trajectory) == int(ended.loops_used.max())
        run_on = model(tokens, n_loops=6, exit=rule, trajectory=True)
        assert len(run_on.trajectory) == 6
        close(run_on.logits, ended.logits)


@every_kind
def test_forced_depth_ignores_the_rule(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    out = model(tokens, n_loops=6)
    assert (out.loops_used == 6).all()
    rule = lively(model, tokens, rules_for(model.config)[0], 6)
    differ(model(tokens, n_loops=6, exit=rule).logits, out.logits)


def heads() -> list[dict]:
    kinds = [{"halting": name} for name in HALTING_HEADS]
    return [*kinds, {"halting": "act", "read_out": "mixture"}, {"halting": "act", "carry_streams": 3}]


@pytest.mark.parametrize("row", heads(), ids=str)
def test_weights_sum_to_one(row: dict) -> None:
    """Whether a token stops by itself, or at the end of a budget that is uniform, by token, or right-aligned."""
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    budgets = torch.tensor([[1, 2, 3, 6, 5], [6, 6, 1, 1, 4]])
    for n_loops, rule in (
        (1, None),
        (6, None),
        (budgets, None),
        (Depth.right_aligned([2, 5]), None),
        (6, lively(model, tokens, "hazard", 6)),
        (budgets, lively(model, tokens, "cumulative", 6)),
    ):
        states = model(tokens, n_loops=n_loops, exit=rule, trajectory=True, weigh=True).trajectory
        total = torch.zeros(2, T, dtype=torch.float64)
        for state in states:
            assert (state.halt.weight >= 0).all()
            total.index_add_(0, state.rows, state.halt.weight)
        close(total, torch.ones_like(total), 1e-14)
    short = states[0].halt.weight
    differ(short, torch.ones_like(short))


def test_weights_sum_to_one_when_probabilities_exceed_it() -> None:
    model = build({"halting": "act", "read_out": "mixture"})
    with torch.no_grad():
        model.halting.head.linear.bias.fill_(5.0)
    states = model(tokens_for(model.config, 2, T), n_loops=4, trajectory=True).trajectory
    weights = torch.stack([state.halt.weight for state in states])
    close(weights.sum(0), torch.ones(2, T, dtype=torch.float64), 1e-14)
    assert not weights[2:].any() and (weights >= 0).all()


def test_mixture_is_the_weighted_sum_of_states() -> None:
    model = build({"halting": "act", "read_out": "mixture"})
    tokens = tokens_for(model.config, 2, T)
    for rule in (None, lively(model, tokens, "cumulative", 6)):
        states = model(tokens, n_loops=6, exit=rule, trajectory=True).trajectory
        total = sum(state.halt.weight[..., None] * state.h for state in states)
        close(model.read_out(states[-1]), total)
        differ(states[-1].h, total)


def test_last_reads_the_state_where_each_token_left() -> None:
    model = build({"halting": "act"})
    tokens = tokens_for(model.config, 2, T)
    rule = lively(model, tokens, "cumulative", 6)
    out = model(tokens, n_loops=6, exit=rule, trajectory=True)
    h = torch.stack([state.h for state in out.trajectory])
    left = h.gather(0, (out.loops_used - 1)[None, ..., None].expand(1, -1, -1, 16))[0]
    assert torch.equal(model.read_out(out.trajectory[-1]), left), "frozen bit for bit"
    assert len(out.loops_used.unique()) > 1


def test_ponder_is_loops_plus_remainder_over_real_tokens() -> None:
    model = build({"halting": "act", "read_out": "mixture"}).train()
    tokens = tokens_for(model.config, 2, T)
    documents = torch.tensor([[0] * T, [0, 0, 0, -1, -1]])
    rule = lively(model, tokens, "cumulative", 6, documents=documents)
    out = model(tokens, n_loops=6, exit=rule, documents=documents, trajectory=True)
    weights = torch.stack([state.halt.weight for state in out.trajectory])
    remainder = weights.gather(0, (out.loops_used - 1).clamp(min=0)[None])[0]  # padding runs no loop
    real = documents >= 0
    close(out.aux["ponder"], (out.loops_used + remainder)[real].mean())
    differ(out.aux["ponder"], (out.loops_used + remainder).mean())
    grads = gradients(model, out.aux["ponder"])
    assert grads["halting.head.linear.bias"] < 0, "a larger probability of stopping must lower the cost"


def test_min_loops() -> None:
    model = build({})
    tokens = tokens_for(model.config, 2, T)
    assert (model(tokens, n_loops=6, exit=ExitRule("delta", 100.0)).loops_used == 1).all()
    assert (model(tokens, n_loops=6, exit=ExitRule("delta", 100.0, min_loops=3)).loops_used == 3).all()
    assert (model(tokens, n_loops=2, exit=ExitRule("delta", 100.0, min_loops=3)).loops_used == 2).all()


@pytest.mark.parametrize(
    ("row", "rule"), [({"halting": h}, r) for h in ("none", "act", "delta") for r in ("kl", "entropy")]
)
def test_rules_that_read_a_probe_need_one(row: dict, rule: str) -> None:
    model = build(row)
    with pytest.raises(ValueError, match=f"exit = '{rule}': must be .*; train with halting"):
        model(tokens_for(model.config, 1, 2), exit=ExitRule(rule, 0.1))


@pytest.mark.parametrize("rule", ["hazard", "cumulative"])
def test_learned_rules_need_a_head(rule: str) -> None:
    model = build({"halting": "kl"})
    with pytest.raises(ValueError, match=f"exit = '{rule}': must be training-free"):
        model(tokens_for(model.config, 1, 2), exit=ExitRule(rule, 0.5))


def test_a_mixture_needs_a_learned_rule() -> None:
    model = build({"halting": "act", "read_out": "mixture"})
    with pytest.raises(ValueError, match="exit = 'delta': must be learned"):
        model(tokens_for(model.config, 1, 2), exit=ExitRule("delta", 0.5))


def test_probe_reads_the_state_alone() -> None:
    """The gate's features carry no gradient, so that a frozen trunk can be fitted."""
    model = build({"halting": "gate"}).train()
    states = model(tokens_for(model.config, 1, T), n_loops=3, trajectory=True, weigh=True).trajectory
    grads = gradients(model, states[-1].halt.survival.sum() + states[1].halt.weight.sum())
    moved = {name for name, grad in grads.items() if grad.any()}
    assert moved and all(name.startswith("halting.") for name in moved)


def test_padding_runs_no_loop_under_an_exit_rule_and_keeps_none_alive() -> None:
    model = build({"halting": "kl", "read_out": "last"})
    tokens = tokens_for(model.config, 1, T)
    documents = torch.tensor([[-1, -1, 0, 0, 0]])
    rule = ExitRule("kl", 1e9)  # whoever runs leaves after one loop
    with torch.no_grad():
        out = model(tokens, n_loops=6, exit=rule, documents=documents, trajectory=True)
        assert out.loops_used.tolist() == [[0, 0, 1, 1, 1]] and len(out.trajectory) == 1
        close(out.logits[:, 2:], model(tokens[:, 2:], n_loops=6, exit=rule).logits)
