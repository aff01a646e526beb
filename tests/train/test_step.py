from collections.abc import Callable

import numpy as np
import pytest
import torch

from ritornello.config import ModelConfig, TrainConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.guard import NonFiniteError
from ritornello.train.optim import build_optimizers
from ritornello.train.step import Plan, accumulate, router_metrics, train_step
from tests.train.small import batch, model_config, train_config

KINDS = {
    "moe": {},
    "dense": {"ffn": "dense"},
    "act mixture": {"halting": "act", "read_out": "mixture"},
    "act last": {"halting": "act"},
    "gate": {"halting": "gate"},
    "kl": {"halting": "kl"},
    "noise": {"initial_state": "noise", "dropout": 0.1},
    "plain": {"n_recurrent_layers": 0},
}


def gradients(model: RecurrentDepthTransformer, train: TrainConfig, *, packed: bool = False) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    terms, load = accumulate(model, Plan.of(batch(packed=packed), train, 3), train)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | terms | ({} if load is None else {"load": load})


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_one_big_batch(kind, packed):
    model = perturbed(model_config(**KINDS[kind]))
    expected = {"halting_loss": "expected", "halting_prior": "geometric"} if kind == "gate" else {}
    train = train_config(**expected)
    whole = gradients(model, train, packed=packed)
    for size in (1, 2):
        assert worst(whole, gradients(model, train_config(microbatch_size=size, **expected), packed=packed)) < 1e-10
    other = gradients(model, train_config(microbatch_size=2, seed=1, **expected), packed=packed)
    assert worst(whole, other) > 1e-6 or kind == "plain"


@pytest.mark.parametrize("backprop_loops", (0, 2))
def test_balance_loss_adds_up(backprop_loops):
    model = perturbed(model_config())
    train = {"balance_weight": 1.0, "depth": "fixed", "mean_loops": 3.0, "backprop_loops": backprop_loops}
    whole = gradients(model, train_config(**train))
    assert worst(whole, gradients(model, train_config(microbatch_size=1, **train))) < 1e-10
    assert whole["balance"] > 0.5


def perturbed(config: ModelConfig) -> RecurrentDepthTransformer:
    """A float64 model whose zero-initialised parts are not zero."""
    model = RecurrentDepthTransformer(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def bits(model: RecurrentDepthTransformer, optimizers: list[torch.optim.Optimizer]) -> list[bytes]:
    states = [x for o in optimizers for state in o.state.values() for x in state.values()]
    tensors = [*model.state_dict().values(), *(x for x in states if isinstance(x, torch.Tensor))]
    return [x.detach().clone().numpy().tobytes() for x in tensors]


def poison_loss(model: RecurrentDepthTransformer) -> None:
    """NaN in the forward pass of the second micro-batch."""
    calls = iter(range(100))
    model.norm.register_forward_hook(lambda module, inputs, out: out * (float("nan") if next(calls) == 1 else 1.0))


def poison_gradient(model: RecurrentDepthTransformer) -> None:
    """An infinite gradient from a finite loss."""
    model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("poison", (poison_loss, poison_gradient))
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_non_finite_stops_before_anything_changes(optimizer: str, poison: Callable[..., None]):
    train = train_config(optimizer=optimizer, microbatch_size=2)
    model = RecurrentDepthTransformer(model_config())
    optimizers = build_optimizers(model, train)
    train_step(model, optimizers, batch(), train=train, step=0)
    before = bits(model, optimizers)
    poison(model)
    with pytest.raises(NonFiniteError, match=r"step 1: .*sequences 0, 1, 2, 3") as caught:
        train_step(model, optimizers, batch(seed=1), train=train, step=1)
    assert (caught.value.step, caught.value.sequences) == (1, [0, 1, 2, 3])
    assert bits(model, optimizers) == before
    for hooks in (model.norm._forward_hooks, model.norm.weight._backward_hooks or {}):
        hooks.clear()
    train_step(model, optimizers, batch(seed=1), train=train, step=1)
    assert sum(a != b for a, b in zip(bits(model, optimizers), before, strict=True)) > len(before) / 2


def test_checkpointing_changes_nothing():
    model = perturbed(model_config(dropout=0.1))
    plain = gradients(model, train_config())
    assert worst(plain, gradients(model, train_config(checkpoint_activations=True))) < 1e-12
    assert worst(plain, gradients(model, train_config(checkpoint_activations=True, seed=1))) > 1e-6


def test_router_bias_follows_the_load_and_rests_at_the_end():
    train = train_config(router_bias_rate=0.5, router_bias_cooldown=0.25)
    model = RecurrentDepthTransformer(model_config())
    bias = model.recurrent[0].mlp.router.e_score_correction_bias
    metrics = train_step(model, build_optimizers(model, train), batch(), train=train, step=29)
    assert set(bias.abs().tolist()) <= {0.0, 0.5} and bias.abs().sum() > 0
    assert 0 <= metrics["router_violation"] <= 1 and 0 <= metrics["router_entropy"] <= 1
    frozen = bias.clone()
    train_step(model, build_optimizers(model, train), batch(), train=train, step=30)
    assert torch.equal(bias, frozen)


def test_router_metrics():
    even, one = torch.full((3, 2, 4), 5), torch.zeros(3, 2, 4, dtype=torch.int64)
    one[..., 0] = 5
    one[:, 1] = 5
    found = [router_metrics(load) for load in (even, one)]
    assert [float(m["router_violation"]) for m in found] == [0.0, 3.0]
    assert [float(m["router_entropy"]) for m in found] == pytest.approx([1.0, 0.0], abs=1e-6)


def test_bf16_trains_with_a_float32_state():
    train = train_config(precision="bf16")
    model = RecurrentDepthTransformer(model_config())
    optimizers = build_optimizers(model, train)
    first, *_, last = [train_step(model, optimizers, batch(), train=train, step=s)["loss"] for s in range(20)]
    assert last < first - 0.5
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_depth_is_counted_by_document():
    plan = Plan.of(batch(packed=True), train_config(depth="uniform"), 0)
    assert plan.counts.shape == (4, 12) and plan.documents is not None
    assert np.array_equal(plan.loops, plan.counts.max(1))
    assert Plan.of(batch(), train_config(), 0).documents is None
