"""One process is a world in which nothing is sent; what several do is in tests/distributed."""

import copy
from types import SimpleNamespace

import pytest
import torch

from ritornello import recipes
from ritornello.config import ParallelConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import parallel, pipeline, tensor_parallel
from ritornello.train.parallel import ALONE, World, clip_gradients, world
from tests.train.small import model_config

CPU = torch.device("cpu")


def test_rows_are_shared_out_in_order() -> None:
    parts = [World(rank, 4).part(slice(8, 16)) for rank in range(4)]
    assert parts == [slice(8, 10), slice(10, 12), slice(12, 14), slice(14, 16)]
    assert ALONE.part(slice(8, 16)) == slice(8, 16)


def test_one_process_is_a_world() -> None:
    with world(ParallelConfig(), CPU) as found:
        assert (found.rank, found.size, found.meshes, found.device) == (0, 1, None, CPU)
        model = RecurrentDepthTransformer(model_config())
        before = {name: id(p) for name, p in model.named_parameters()}
        found.shard(model, ParallelConfig())
        with found.first() as first:
            assert first
        with pytest.raises(OSError, match="disk"), found.first():
            raise OSError("disk")
        found.same("steps", 3)
        with found.gathered(model):
            assert {name: id(p) for name, p in model.named_parameters()} == before
        x = torch.ones(3)
        assert found.total(x) is x and found.any(True) and not found.any(False)


@pytest.mark.parametrize(("replicate", "shard", "there"), [(2, 0, 1), (1, 2, 1), (2, 2, 2), (3, 0, 4)])
def test_a_layout_of_another_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, replicate: int, shard: int, there: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(there))
    with (
        pytest.raises(
            ValueError,
            match=r"parallel\.pipeline x replicate x shard x context x tensor = "
            rf".*as many processes as there are \({there}\)",
        ),
        world(ParallelConfig(replicate=replicate, shard=shard), CPU),
    ):
        pass


def test_clipping_is_torchs() -> None:
    model = RecurrentDepthTransformer(model_config())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    norms = clip_gradients(model, 0.5), torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    assert norms[0] == norms[1] and norms[0] > 1
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_each_process_holds_whole() -> None:
    model = RecurrentDepthTransformer(model_config(halting="gate"))
    names = set(parallel.replicated(model))
    assert "loop_embedding_scale" in names and "embed_tokens.0.weight" not in names
    assert all(name == "loop_embedding_scale" or name.startswith("halting.") for name in names) and len(names) > 1


def test_the_layout_is_a_table_of_the_recipe() -> None:
    recipe = recipes.from_mapping({"name": "x", "parallel": {"replicate": 2, "gather": "loop"}})
    assert recipe.parallel == ParallelConfig(replicate=2, gather="loop")
    assert recipes.from_json(recipes.to_json(recipe)) == recipe
    with pytest.raises(ValueError, match=r"parallel.replicate = 0"):
        recipes.from_mapping({"parallel": {"replicate": 0}})


def test_tables_that_layers_read_are_not_cut() -> None:
    """Nor do ids travel through a pipeline."""
    model = RecurrentDepthTransformer(model_config(halting="none", value_embeddings=(0,)))
    tensor_parallel.check(model.config, 1)
    with pytest.raises(ValueError, match=r"parallel\.tensor = 2: must be 1 with model\.value_embeddings"):
        tensor_parallel.check(model.config, 2)
    with pytest.raises(ValueError, match=r"parallel\.pipeline = 2: must be 1 with model\.value_embeddings"):
        pipeline.divide(model, SimpleNamespace(n=2))
