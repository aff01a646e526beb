"""How processes are laid out: what goes with what, before anything is sent."""

from typing import Any

import numpy as np
import pytest

from ritornello.config import ParallelConfig
from ritornello.model.depth import Depth
from ritornello.train import parallel, tensor_parallel
from ritornello.train.context_parallel import Pieces
from ritornello.train.parallel import World
from tests.train.small import model_config


def test_shard_takes_what_is_left() -> None:
    assert parallel.laid_out(ParallelConfig(), 1).shard == 1
    assert parallel.laid_out(ParallelConfig(replicate=2, context=2, tensor=2), 32).shard == 4


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        ({"tensor": 2}, 3, "tensor = '1 x 1 x 1 x 1 x 2': must be as many processes"),
        ({"expert": 3}, 4, "parallel.expert = 3: must be a divisor of shard x context (4)"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(given: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parallel.laid_out(ParallelConfig(**given), size)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"n_kv_heads": 1}, "model.n_kv_heads (1)"),
        ({"attention": "mla", "n_heads": 3}, "model.n_heads (3)"),
        ({"n_kv_heads": 2, "ffn_dim": 33}, "model.ffn_dim (33)"),
        ({"n_kv_heads": 2, "expert_dim": 7}, "model.n_shared_experts x expert_dim (7)"),
    ],
)
def test_what_cannot_be_shared_alike_is_named(changes: dict[str, Any], name: str) -> None:
    tensor_parallel.check(model_config(n_kv_heads=2), 2)
    with pytest.raises(ValueError) as raised:
        tensor_parallel.check(model_config(**changes), 2)
    assert name in str(raised.value)


def test_rows_are_dealt_out_to_those_that_read_different_ones() -> None:
    parts = [World(rank, 8, n_context=2, n_tensor=2).part(slice(4, 8)) for rank in range(8)]
    assert parts == [slice(4, 6)] * 4 + [slice(6, 8)] * 4


def test_every_token_is_somewhere_once_and_all_see_equally_many() -> None:
    pieces = [Pieces(48, 3, index) for index in range(3)]
    assert sorted(np.concatenate([each.mine for each in pieces])) == list(range(48))
    assert len({int((each.mine + 1).sum()) for each in pieces}) == 1
    assert (Pieces(5).mine == np.arange(5)).all()
    with pytest.raises(ValueError, match=r"parallel\.context = 2: must be 1, or such that 8 x it divides"):
        Pieces(24, 2)


def test_a_row_joins_with_its_first_token_wherever_that_is() -> None:
    counts = np.array([[4] * 8 + [1] * 8, [2] * 16])
    whole = Depth.right_aligned(counts)
    for index, starts in enumerate([[0, 3], [0, 3]]):
        mine = Pieces(16, 2, index).depth(whole)
        assert (mine.sizes, mine.n_iterations) == (whole.sizes, whole.n_iterations)
        assert mine.starts is not None and mine.starts[0].unique().tolist() == starts
