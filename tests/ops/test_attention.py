"""Fused attention against its definition, and rotation against complex numbers."""

import pytest
import torch
from torch import Tensor

from ritornello.config import Yarn
from ritornello.ops import attention as ops
from ritornello.ops.attention import attention, attention_ref, rotary_tables, rotate
from tests.model.builders import close, differ

SHAPES = {
    "causal": (2, 4, 2, 5, 5, None),
    "one query": (2, 4, 4, 1, 6, None),
    "one token": (1, 2, 1, 1, 1, None),
    "chunk": (2, 4, 1, 3, 7, "chunk"),
    "documents": (3, 4, 2, 6, 6, "documents"),
}


def case(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, heads, groups, n_queries, n_keys, kind = SHAPES[name]
    q = torch.randn(batch, heads, n_queries, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(batch, groups, n_keys, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch, groups, n_keys, 5, dtype=torch.float64, requires_grad=True)
    mask = None
    if kind is not None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)[None, None]
    if kind == "documents":
        ids = torch.tensor([[0, 0, 0, 1, 1, 1], [-1, -1, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5]])
        mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    return q, k, v, mask


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_its_definition(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of a mask in one block, or in several, each over the keys that it may see."""
    monkeypatch.setattr(ops, "BLOCK", block)
    q, k, v, mask = case(name)
    results = []
    for function in (attention, attention_ref):
        y = function(q, k, v, mask=mask, scale=0.3)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))))
    for fast, defined in zip(*results, strict=True):
        close(fast, defined, 1e-12)
    if k.shape[2] > 1:
        differ(attention(q, k, v, mask=mask, scale=0.31), results[1][0])


@pytest.mark.parametrize("shape", [(1, 1, 5, 1), (2, 1, 1, 5)], ids=["one for all keys", "one for all queries"])
def test_a_mask_may_be_broadcast(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "BLOCK", 2)
    q, k, v, _ = case("causal")
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 4:] = False  # of keys, the last; nothing where one number stands for all
    close(attention(q, k, v, mask=mask, scale=0.3), attention_ref(q, k, v, mask=mask, scale=0.3), 1e-12)


def test_a_block_that_sees_nothing_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, mask = case("chunk")
    assert mask is not None
    mask[..., :2, :] = False
    whole = attention(q, k, v, mask=mask, scale=0.3)
    monkeypatch.setattr(ops, "BLOCK", 2)
    close(attention(q, k, v, mask=mask, scale=0.3)[:, :, 2:], whole[:, :, 2:], 1e-12)


def test_a_mask_is_obeyed_exactly() -> None:
    q, k, v, mask = case("documents")
    y = attention(q, k, v, mask=mask, scale=0.3)
    (grad,) = torch.autograd.grad(y[0, :, 3:].sum(), v)
    assert not grad[0, :, :3].any() and not grad[1:].any() and grad[0, :, 3:].all()


def test_a_chunk_without_its_mask_is_refused() -> None:
    q, k, v, _ = case("chunk")
    with pytest.raises(AssertionError):
        attention(q, k, v, mask=None, scale=1.0)


def test_rotation_is_a_complex_phase() -> None:
    positions = torch.tensor([[0, 1, 2, 77], [5, 4, 3, 1000]])
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    tables = rotary_tables(positions, dim=8, theta=100.0, dtype=torch.float64)
    phase = positions[..., None, None] * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(phase), phase)
    close(rotate(x, tables), torch.cat((z.real, z.imag), -1))
    close(rotate(x, tables).norm(dim=-1), x.norm(dim=-1))


def test_rotation_is_relative() -> None:
    """Scores depend on the distance of two positions alone: a shared shift of all positions changes nothing."""
    q, k = torch.randn(1, 5, 2, 8, dtype=torch.float64), torch.randn(1, 5, 2, 8, dtype=torch.float64)

    def scores(shift: int) -> Tensor:
        tables = rotary_tables(torch.arange(5)[None] + shift, dim=8, theta=1e4, dtype=torch.float64)
        return torch.einsum("bthd,bshd->bhts", rotate(q, tables), rotate(k, tables))

    close(scores(0), scores(1000))
    differ(scores(0), torch.einsum("bthd,bshd->bhts", q, k))


def test_tables_are_precise_at_far_positions() -> None:
    positions = torch.tensor([[4095]])
    small = rotary_tables(positions, dim=8, theta=1e4, dtype=torch.bfloat16)[0]
    exact = rotary_tables(positions, dim=8, theta=1e4, dtype=torch.float64)[0]
    torch.testing.assert_close(small.double(), exact, atol=4e-3, rtol=0)


@pytest.mark.parametrize("shape", [(1, 7), (1, 1, 7), (2, 1, 1, 7), (4, 1, 7), None])
def test_one_query_with_shared_heads_and_any_mask(shape: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, t, 6, generator=generator, dtype=torch.float64) for n, t in ((4, 1), (2, 7), (2, 7)))
    mask = (
        None if shape is None else (torch.rand(shape, generator=generator) < 0.6).index_fill(-1, torch.tensor(0), True)
    )
    close(attention(q, k, v, mask=mask, scale=0.4), attention_ref(q, k, v, mask=mask, scale=0.4))
    differ(attention(q.roll(1, 1), k, v, mask=mask, scale=0.4), attention_ref(q, k, v, mask=mask, scale=0.4))


def test_yarn_slows_the_slow_channels_alone() -> None:
    """One turn in 100 positions and less: by the factor; 10 and more: not at all; between: between."""
    one = torch.ones(1, 1, dtype=torch.int64)
    how = {"dim": 64, "theta": 1e4, "dtype": torch.float64}
    plain, slowed = (rotary_tables(one, **how, yarn=x)[1][0, 0, :32].asin() for x in (None, Yarn(4.0, 100, 10.0, 1.0)))
    ratio, turns = plain / slowed, 100 * 1e4 ** (-torch.arange(32.0) / 32) / (2 * torch.pi)
    assert torch.allclose(ratio[turns < 0.7], torch.tensor(4.0).double())
    assert (ratio[turns > 14] == 1).all() and ratio.diff().min() >= -1e-9 and 1.1 < ratio[8] < 3.9
