"""Products with a weight, however many rows; one low-rank delta for each loop index, however the indices come."""

import pytest
import torch

from ritornello.ops.linear import FEW, linear, low_rank, low_rank_ref

INDICES = {"one for all": 2, "by sequence": torch.tensor([[1], [3]]), "by token": torch.tensor([[0, 1, 2], [3, 3, 0]])}


@pytest.mark.parametrize("name", INDICES)
def test_is_each_tokens_own(name: str) -> None:
    torch.manual_seed(0)
    x, down, up = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 2, 5), (4, 6, 2)))
    expected = low_rank_ref(x, down, up, INDICES[name])
    torch.testing.assert_close(low_rank(x, down, up, INDICES[name]), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(low_rank(x, down, up, 0), expected)


@pytest.mark.parametrize("n_rows", [1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_no_different(n_rows: int, dtype: torch.dtype) -> None:
    """Values, gradients and how the result lies in memory: callers may view it."""
    torch.manual_seed(0)
    x, weight = (torch.randn(size, dtype=dtype, requires_grad=True) for size in ((n_rows, 1, 40), (24, 40)))
    expected = torch.nn.functional.linear(x, weight)
    found = linear(x, weight)
    assert found.dtype == dtype and found.is_contiguous() and found.shape == expected.shape
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    torch.testing.assert_close(found, expected, **tolerance)
    grads = [torch.autograd.grad(y.float().sin().sum(), (x, weight)) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert not torch.allclose(linear(x, weight.flip(0)), expected, rtol=0.1)
