"""One low-rank delta for each loop index, however the indices come."""

import pytest
import torch

from ritornello.ops.linear import low_rank, low_rank_ref

INDICES = {"one for all": 2, "by sequence": torch.tensor([[1], [3]]), "by token": torch.tensor([[0, 1, 2], [3, 3, 0]])}


@pytest.mark.parametrize("name", INDICES)
def test_is_each_tokens_own(name: str) -> None:
    torch.manual_seed(0)
    x, down, up = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 2, 5), (4, 6, 2)))
    expected = low_rank_ref(x, down, up, INDICES[name])
    torch.testing.assert_close(low_rank(x, down, up, INDICES[name]), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(low_rank(x, down, up, 0), expected)
