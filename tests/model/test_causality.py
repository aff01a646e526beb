"""What a token predicts depends on itself and the tokens before it, and nothing else."""

import pytest
import torch

from tests.model.builders import build, close, differ, every_kind, lively, rules_for, tiny, tokens_for

T = 6


@every_kind
def test_logits_do_not_see_the_future(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    whole = model(tokens, n_loops=5).logits
    for t in (1, 4):
        changed = torch.cat((tokens[:, :t], tokens_for(model.config, 2, T, seed=9)[:, t:]), 1)
        out = model(changed, n_loops=5).logits
        close(out[:, :t], whole[:, :t])
        differ(out[:, t:], whole[:, t:])


@every_kind
def test_gradients_to_the_future_are_exactly_zero(row: dict) -> None:
    model = build(row).train()
    tokens = tokens_for(model.config, 1, T)
    x = model.embed(tokens).detach().requires_grad_()
    model.embed = lambda _: x  # some layers read ids too
    logits = model(tokens, n_loops=3).logits
    (before,) = torch.autograd.grad(logits[:, 2].square().sum(), x, retain_graph=True)
    assert not before[:, 3:].any()
    assert before[:, :3].any(-1).all(), "the past must matter"


@every_kind
def test_exits_do_not_see_the_future(row: dict) -> None:
    """Otherwise a prefix would stop elsewhere than the whole."""
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    name = rules_for(model.config)[-1]
    rule = lively(model, tokens, name, 5)
    with torch.no_grad():
        whole = model(tokens, n_loops=5, exit=rule)
        prefix = model(tokens[:, :3], n_loops=5, exit=rule)
    close(prefix.logits, whole.logits[:, :3])
    assert torch.equal(prefix.loops_used, whole.loops_used[:, :3])


def test_positive_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose attention looks ahead fails the tests above."""
    monkeypatch.setattr(
        "ritornello.model.attention.attention",
        lambda q, k, v, *, mask, scale: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool), scale=scale, enable_gqa=True
        ),
    )
    row = {"attention": "gqa"}
    with pytest.raises(AssertionError):
        test_logits_do_not_see_the_future(row)
    with pytest.raises(AssertionError):
        test_gradients_to_the_future_are_exactly_zero(row)
    with pytest.raises(AssertionError):
        test_exits_do_not_see_the_future(row | {"halting": "kl"})
    assert tiny().attention == "gqa"
