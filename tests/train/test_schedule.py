import itertools

import pytest

from ritornello.config import TrainConfig
from ritornello.train.schedule import learning_rate_scale, router_bias_rate


def scales(**changes: object) -> list[float]:
    train = TrainConfig(**{"steps": 100, "warmup_steps": 10, "final_lr_fraction": 0.1, **changes})
    return [learning_rate_scale(train, step) for step in range(train.steps)]


def test_constant():
    rates = scales(schedule="constant")
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10:] == [1.0] * 90


def test_trapezoid():
    rates = scales(schedule="trapezoid", cooldown_fraction=0.4)
    assert rates[10:61] == [1.0] * 51
    steps = {round(a - b, 9) for a, b in itertools.pairwise(rates[60:])}
    assert steps == {round(0.9 / 40, 9)}
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 40)


def test_cosine():
    rates = scales(schedule="cosine")
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("schedule", ("constant", "cosine", "trapezoid"))
@pytest.mark.parametrize("shape", ({"steps": 1}, {"steps": 5, "warmup_steps": 50}, {"warmup_steps": 0}))
@pytest.mark.parametrize("cooldown", (0.0, 1.0))
def test_rates_lie_in_the_unit_interval(schedule, shape, cooldown):
    rates = scales(schedule=schedule, cooldown_fraction=cooldown, final_lr_fraction=0.0, **shape)
    assert all(0 < rate <= 1 for rate in rates)


def test_router_bias_rests_at_the_end():
    train = TrainConfig(steps=100, router_bias_rate=1e-3, router_bias_cooldown=0.1)
    assert [router_bias_rate(train, s) for s in (0, 89, 90, 99)] == [1e-3, 1e-3, 0.0, 0.0]
