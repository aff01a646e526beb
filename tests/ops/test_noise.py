"""Counter-based numbers: standard normal, independent across every part of their address, functions of it alone."""

import math

import pytest
import torch
from torch import Tensor

from ritornello.config import ModelConfig
from ritornello.model.carry import initial_state
from ritornello.model.context import Context
from ritornello.ops.noise import Key, dropout, fold, normal, uniform
from tests.model.builders import differ

MASK = 2**64 - 1


def context(positions: Tensor, key: Key | None = None) -> Context:
    return Context(positions=positions, documents=None, mask=None, rope=None, key=key)


def splitmix(state: int) -> int:
    """SplitMix64's next output, in unbounded integers, after Steele, Lea and Flood (2014)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mixer_is_splitmix64() -> None:
    states = [0, 1, 1234567, 2**63 - 1]
    mixed = fold(torch.tensor(states), 0).tolist()
    assert [x & MASK for x in mixed] == [splitmix(state) for state in states]
    assert mixed[2] & MASK == 6457827717110365317, "published first output for seed 1234567"
    counter = (5 * 0xBF58476D1CE4E5B9) & MASK
    assert int(fold(torch.tensor(77), 5)) & MASK == splitmix(77 ^ counter)


def grid(*sizes: int) -> Tensor:
    key = torch.full((1,) * len(sizes), 9, dtype=torch.int64)
    for dim, size in enumerate(sizes):
        key = fold(key, torch.arange(size).view([-1 if d == dim else 1 for d in range(len(sizes))]))
    return key


def test_moments() -> None:
    """Mean, variance, skewness and kurtosis of 2^20 numbers within 5 standard errors."""
    x = normal(grid(1024, 1024)).double()
    n = x.numel()
    for moment, value, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**moment).mean()) - value) < 5 * math.sqrt(variance / n)
    u = uniform(grid(1024, 1024)).double()
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * n)
    counts = (u * 64).long().flatten().bincount(minlength=64).double()
    assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < 63 + 5 * math.sqrt(126), "χ² of 64 bins"


def test_neighbours_are_independent() -> None:
    """Along each axis of the address, at several distances; squares too."""
    x = normal(grid(512, 512)).double()
    for y in (x, x.square() - 1):
        y = y / y.std()
        for dim in (0, 1):
            for distance in (1, 2, 3, 64):
                correlation = float((y * y.roll(distance, dim)).mean())
                assert abs(correlation) < 5 / 512
    assert abs(float((x * x.T).mean())) < 5 / 512, "(a, b) and (b, a)"


def test_control_a_weak_mixer_fails() -> None:
    x = torch.arange(512)[:, None] * 1664525 + torch.arange(512) * 1013904223
    y = ((x % 2**32).double() / 2**32 - 0.5) * math.sqrt(12)
    assert abs(float((y * y.roll(1, 0)).mean())) > 5 / 512


def test_neither_end_occurs() -> None:
    keys = torch.tensor([0, -1, 2**40 - 1, 2**62])
    u = uniform(keys)
    assert (u > 0).all() and (u < 1).all()
    assert normal(keys).isfinite().all()


def test_initial_state_is_truncated_noise_of_small_variance() -> None:
    e = torch.zeros(4, 200, 64)
    ids = torch.arange(4) * 1000
    h = initial_state("noise", e, context(torch.arange(200).expand(4, -1), Key(3, 1, ids)))
    assert h.dtype == torch.float32
    assert float(h.mean()) == pytest.approx(0, abs=0.01)
    assert float(h.square().mean()) == pytest.approx(0.4, rel=0.02)
    assert float(h.abs().max()) <= 3 * math.sqrt(0.4) + 1e-6
    rows = h.flatten(1)
    correlations = torch.corrcoef(rows) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / math.sqrt(rows.shape[1])


def test_a_prefix_sees_what_the_whole_sees() -> None:
    positions = torch.arange(9).expand(2, -1)
    key = Key(3, 1, torch.tensor([8, 2]))
    whole = initial_state("noise", torch.zeros(2, 9, 5), context(positions, key))
    prefix = initial_state("noise", torch.zeros(2, 4, 5), context(positions[:, :4], key))
    chunk = initial_state("noise", torch.zeros(2, 5, 5), context(positions[:, 4:], key))
    assert torch.equal(torch.cat((prefix, chunk), 1), whole)
    assert not torch.equal(whole[0], whole[1])
    unkeyed = initial_state("noise", torch.zeros(2, 9, 5), context(positions))
    assert torch.equal(unkeyed[0], unkeyed[1]), "at inference all sequences draw the same"


def test_dropout_keeps_the_right_share_and_scale() -> None:
    x = torch.ones(4, 100, 64)
    keys = Key(0, 0, torch.arange(4)).fold(torch.arange(100).expand(4, -1), 0, 2, 1)
    for p in (0.1, 0.5):
        y = dropout(x, p, keys)
        kept = y != 0
        assert float(kept.float().mean()) == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
        assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))


def test_every_part_of_the_address_makes_another_mask() -> None:
    x = torch.ones(2, 50, 64)
    positions = torch.arange(50).expand(2, -1)
    masks = [
        dropout(x, 0.5, key.fold(positions, *address))
        for key in (Key(0, 0), Key(1, 0), Key(0, 1), Key(0, 0, torch.tensor([5, 6])))
        for address in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    flat = torch.stack(masks).flatten(1)
    off = torch.corrcoef(flat) - torch.eye(len(masks))
    assert float(off.abs().max()) < 6 / math.sqrt(flat.shape[1] / 2)
    assert torch.equal(masks[0], dropout(x, 0.5, Key(0, 0).fold(positions, 0, 0, 0)))
    differ(masks[0], masks[1])


def test_a_loop_index_by_token_draws_as_the_int_does() -> None:
    x = torch.ones(1, 3, 16)
    at = torch.arange(3)[None]
    mixed = dropout(x, 0.5, Key(4).fold(at, 0, torch.tensor([[2, 0, 5]]), 1))
    for t, loop in enumerate((2, 0, 5)):
        assert torch.equal(mixed[:, t], dropout(x, 0.5, Key(4).fold(at, 0, loop, 1))[:, t])
    assert ModelConfig().dropout == 0
