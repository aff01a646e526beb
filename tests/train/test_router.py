"""Routers kept in balance by a bias."""

import pytest
import torch

from ritornello.train.router import update_router_bias
from tests.model.builders import build
from tests.model.test_moe import layers_of


def test_the_bias_is_raised_where_load_is_low() -> None:
    model = build({})
    bias = layers_of(model)[0].router.e_score_correction_bias
    bias.zero_()
    load = torch.zeros(4, 1, 8, dtype=torch.int64)
    load[0, 0] = torch.tensor([0, 8, 4, 4, 4, 4, 4, 4])
    update_router_bias(model, load, rate=0.01)
    assert bias.tolist() == pytest.approx([0.01, -0.01] + [0.0] * 6)


def test_a_bias_per_loop_waits_for_enough_tokens() -> None:
    model = build({"router_bias_per_loop": True})
    bias = layers_of(model)[0].router.e_score_correction_bias
    bias.zero_()
    load = torch.zeros(4, 1, 8, dtype=torch.int64)
    load[0, 0, 1] = 20  # 10 tokens, two experts each
    load[1, 0, 1] = 18  # 9 tokens
    update_router_bias(model, load, rate=0.01, min_tokens=10)
    assert bias[0].tolist() == pytest.approx([0.01, -0.01] + [0.01] * 6)
    assert not bias[1:].any()


def test_updates_balance_the_load() -> None:
    """The rule at work: from all tokens on few experts to within 1.5 times the mean."""
    model = build({})
    router = layers_of(model)[0].router
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.linspace(0, 3, 8))
    x = torch.randn(1, 500, 16, dtype=torch.float64)

    def load() -> torch.Tensor:
        return router(x, 0)[0].flatten().bincount(minlength=8)

    worst = load().max()
    for _ in range(150):
        update_router_bias(model, load()[None, None], rate=0.03)
    assert worst > 400 and load().max() < 1.5 * 2 * 500 / 8
