"""Some tokens of a batch as a smaller batch, and back."""

import pytest
import torch

from ritornello.ops.subset import Subset

RUNNING = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_takes_those_who_run_in_order() -> None:
    some = Subset.of(RUNNING, 5)
    assert some is not None and some.running is not None
    assert some.rows.tolist() == [0, 2]
    assert some.tokens.tolist() == [[1, 3], [0, 1]]  # the last one fills up
    assert some.running.tolist() == [[True, True], [True, False]]
    x = torch.arange(15).view(3, 5)
    assert some.take(x).tolist() == [[1, 3], [10, 11]]
    assert some.take(x[:, :1]).tolist() == [[0], [10]]
    assert some.take(None) is None and some.put(None, None) is None


def test_puts_back_where_it_took() -> None:
    some = Subset.of(RUNNING, 5)
    assert some is not None
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    new = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(some.put(x, some.take(x)), x)
    assert not torch.equal(some.put(x, new), x)
    assert torch.equal(some.take(some.put(x, new)), new)
    assert torch.equal(some.spread(new), some.put(torch.zeros_like(x), new))
    assert torch.autograd.gradcheck(lambda a, b: some.put(a, b * some.take(a)), (x, new))


def test_rows_that_run_as_a_whole() -> None:
    some = Subset.of(torch.tensor([[True], [False], [True]]), 4)
    assert some is not None and some.running is None
    assert some.rows.tolist() == [0, 2] and some.tokens.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("idle", [0, 1])
def test_not_worth_it(idle: int) -> None:
    running = torch.ones(2, 10, dtype=torch.bool)
    running[:, :idle] = False
    assert (Subset.of(running, 10) is None) == (idle == 0)
    running[0] = True  # one row that is whole makes all of them as long
    assert Subset.of(running, 10) is None


def test_never_empty() -> None:
    some = Subset.of(torch.zeros(3, 4, dtype=torch.bool), 4)
    assert some is not None and some.running is not None
    assert some.tokens.shape == (1, 1) and not some.running.any()
