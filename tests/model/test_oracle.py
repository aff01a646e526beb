"""The model against its slow definition (oracle.py): every combination of kinds, with every exit rule."""

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.model.cache import Cache
from tests.model.builders import build, close, differ, every_kind, lively, rules_for, tokens_for
from tests.model.oracle import oracle, skip_unknown

T = 4
BUDGETS = torch.tensor([[3, 5, 1, 4]])  # per-loop tables end at 4: deeper loops use their last entry


@every_kind
def test_budgets_per_token(row: dict) -> None:
    model = build(row)
    skip_unknown(model.config)
    tokens = tokens_for(model.config, 1, T)
    slow = oracle(model, tokens[0], n_loops=BUDGETS[0].tolist())
    out = model(tokens, n_loops=BUDGETS)
    close(out.logits[0], slow.logits)
    assert out.loops_used[0].tolist() == slow.loops_used
    differ(model(tokens, n_loops=5).logits[0], slow.logits)


@every_kind
def test_exit_rules(row: dict) -> None:
    model = build(row)
    skip_unknown(model.config)
    tokens = tokens_for(model.config, 1, T, seed=1)
    for name in rules_for(model.config):
        rule = lively(model, tokens, name, 5)
        out = model(tokens, n_loops=5, exit=rule, trajectory=True)
        slow = oracle(model, tokens[0], n_loops=[5] * T, exit=rule)
        close(out.logits[0], slow.logits)
        assert out.loops_used[0].tolist() == slow.loops_used
        assert out.loops_used.min() < 5, "a test of exits in which nobody leaves"
        weights = torch.stack([state.halt.weight[0] for state in out.trajectory], -1)
        for token, expected in enumerate(slow.weights):
            close(weights[token, : len(expected)], torch.tensor(expected, dtype=torch.float64))
            assert not weights[token, len(expected) :].any()


@every_kind
def test_cache_policies(row: dict) -> None:
    """Three chunks, decoded deeper and shallower than the prefill, with budgets by token."""
    model, policy = build(row), row["policy"]
    skip_unknown(model.config)
    tokens = tokens_for(model.config, 1, T, seed=2)
    cache = Cache(model.config, batch_size=1, max_len=T, n_loops=5, policy=policy, dtype=torch.float64)
    parts = (slice(0, 2), slice(2, 3), slice(3, 4))
    fast = torch.cat([model(tokens[:, part], n_loops=BUDGETS[:, part], cache=cache).logits[0] for part in parts])
    budgets, chunks = BUDGETS[0].tolist(), [0, 0, 1, 2]
    close(fast, oracle(model, tokens[0], n_loops=budgets, chunks=chunks, policy=policy).logits)
    if policy != "per_loop" and model.config.kv_sharing == "per_loop":
        differ(fast, model(tokens, n_loops=BUDGETS).logits[0])


def test_packed_documents() -> None:
    model = build({"initial_state": "noise"})
    tokens, documents = tokens_for(model.config, 1, T), [7, 7, 3, 3]
    slow = oracle(model, tokens[0], n_loops=[4] * T, documents=documents)
    close(model(tokens, documents=torch.tensor([documents])).logits[0], slow.logits)
    differ(model(tokens).logits[0], slow.logits)


def test_a_plain_model() -> None:
    model = build({"layers": (2, 0, 1), "initial_state": "e"})
    tokens = tokens_for(model.config, 1, T)
    out = model(tokens)
    close(out.logits[0], oracle(model, tokens[0], n_loops=[1] * T).logits)
    assert not out.loops_used.any()
    with pytest.raises(ValueError, match="exit = 'delta'"):
        model(tokens, exit=ExitRule("delta", 0.1))
