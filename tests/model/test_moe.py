"""Experts are interchangeable, every token gets its k, nobody is dropped, and the bias pushes towards balance."""

from dataclasses import replace

import pytest
import torch

from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.builders import build, close, close_gradients, differ, gradients, tiny, tokens_for

T = 6
MOE = [
    {},
    {"router_score": "softmax", "n_active_groups": 1},
    {"router_bias_per_loop": True, "normalize_expert_weights": False, "layers": (0, 2, 1)},
]
every_router = pytest.mark.parametrize("row", MOE, ids=str)


def layers_of(model: RecurrentDepthTransformer) -> list:
    return [layer.mlp for layer in model.recurrent]


@every_router
def test_experts_can_be_renumbered(row: dict) -> None:
    """Within their groups, the output is the same and loads and gradients are renumbered alike."""
    model, other = build(row), build(row)
    order = torch.tensor([2, 0, 3, 1, 7, 5, 6, 4])
    with torch.no_grad():
        for mlp in layers_of(other):
            for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj"):
                tensor = mlp.get_parameter(name)
                tensor.copy_(tensor[order])
            mlp.router.e_score_correction_bias.copy_(mlp.router.e_score_correction_bias[..., order])
    tokens = tokens_for(model.config, 2, T)
    a, b = model(tokens), other(tokens)
    close(b.logits, a.logits)
    assert torch.equal(b.routing.load, a.routing.load[..., order])
    name = "recurrent.0.mlp.experts.down_proj"
    ga, gb = (gradients(m, out.logits.square().sum())[name] for m, out in ((model, a), (other, b)))
    close(gb, ga[order])
    with torch.no_grad():
        layers_of(other)[0].experts.down_proj.copy_(layers_of(other)[0].experts.down_proj.flip(0))
    differ(other(tokens).logits, a.logits)


@every_router
def test_every_token_gets_k_distinct_experts(row: dict) -> None:
    model = build(row)
    router = layers_of(model)[0].router
    x = torch.randn(3, 50, model.config.dim, dtype=torch.float64)
    indices, weights, scores = router(x, 2)
    k = model.config.n_active_experts
    assert indices.shape == weights.shape == (3, 50, k)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    if model.config.normalize_expert_weights:
        close(weights.sum(-1), torch.full((3, 50), model.config.router_scale, dtype=torch.float64))
    else:
        close(weights, scores.gather(-1, indices))
    if model.config.n_active_groups == 1:
        assert (indices // 4 == indices[..., :1] // 4).all(), "within one group of four"


@every_router
def test_bias_takes_part_in_the_choice_alone(row: dict) -> None:
    model = build(row | {"normalize_expert_weights": False})
    router = layers_of(model)[0].router
    x = torch.randn(3, 50, model.config.dim, dtype=torch.float64)
    before, weights, _ = router(x, 1)
    with torch.no_grad():
        router.e_score_correction_bias[..., 5] += 100.0
    after, weights, scores = router(x, 1)
    assert (after == 5).any(-1).all() and not (before == 5).any(-1).all()
    close(weights, scores.gather(-1, after))
    assert not router.e_score_correction_bias.requires_grad


@every_router
def test_an_idle_expert_gets_a_zero_gradient(row: dict) -> None:
    """Not None, which an optimizer would skip: weight decay and momentum go on."""
    model = build(row).train()
    with torch.no_grad():
        for mlp in layers_of(model):
            mlp.router.e_score_correction_bias[..., 3] = -100.0
    out = model(tokens_for(model.config, 2, T))
    out.logits.square().sum().backward()
    assert not out.routing.load[..., 3].any()
    for mlp in layers_of(model):
        for parameter in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
            assert parameter.grad is not None
            assert not parameter.grad[3].any()
            assert parameter.grad.flatten(1).any(1).sum() >= 2


@every_router
def test_load_counts_every_choice_once(row: dict) -> None:
    """Tokens × k for each loop and layer; loops beyond the table in its last row; neither halted tokens nor padding."""
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    k, n_layers = model.config.n_active_experts, model.config.n_recurrent_layers
    load = model(tokens, n_loops=6).routing.load
    assert load.dtype == torch.int64 and load.shape == (4, n_layers, 8)
    assert load.sum(-1).tolist() == [[2 * T * k] * n_layers] * 3 + [[3 * 2 * T * k] * n_layers]
    budgets = torch.tensor([[1, 2, 3, 4, 4, 2], [1, 1, 1, 1, 2, 3]])
    documents = torch.tensor([[0] * T, [0] * 4 + [-1] * 2])
    counted = budgets[documents >= 0]
    expected = [[int((counted > loop).sum()) * k] * n_layers for loop in range(4)]
    assert model(tokens, n_loops=budgets, documents=documents).routing.load.sum(-1).tolist() == expected
    right = model(tokens, n_loops=Depth.right_aligned([1, 4])).routing.load.sum(-1)
    assert right[:, 0].tolist() == [2 * T * k, T * k, T * k, T * k]
    assert model(tokens, n_loops=4, backprop_loops=1).routing.load.sum() == 4 * 2 * T * k * n_layers


def test_load_is_where_the_tokens_went() -> None:
    model = build({})
    from ritornello.model.context import Capture

    capture = Capture(frozenset({"1.experts"}))
    load = model(tokens_for(model.config, 2, T), n_loops=3, capture=capture).routing.load
    for loop, indices in capture.tensors["1.experts"]:
        assert torch.equal(load[loop, 0], indices.flatten().bincount(minlength=8))
    assert [loop for loop, _ in capture.tensors["1.experts"]] == [0, 1, 2]


def test_balance_loss() -> None:
    """1 when choices and scores are even, larger when not; padding does not count; absent without gradients."""
    model = build({"lora_targets": ()}).train()
    moe = layers_of(model)[0]
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    with torch.no_grad():
        moe.router.e_score_correction_bias.zero_()
        moe.router.weight.zero_()
    _, routed = moe(x, 0, [])
    close(routed.balance, torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        moe.router.weight[:2] = 1.0
    x = x.abs()
    _, uneven = moe(x, 0, [])
    assert uneven.balance > 1.1
    real = torch.tensor([[True] * 30 + [False] * 10] * 2)
    (_, masked), (_, short) = moe(x, 0, [real]), moe(x[:, :30], 0, [])
    close(masked.balance, short.balance)
    differ(masked.balance, uneven.balance)
    out = model(tokens_for(model.config, 2, T))
    assert gradients(model, out.aux["balance"])["recurrent.0.mlp.router.weight"].any()
    assert "balance" not in model.eval()(tokens_for(model.config, 2, T)).aux
    with torch.no_grad():
        assert "balance" not in model.train()(tokens_for(model.config, 2, T)).aux


def test_one_expert_is_a_dense_network() -> None:
    moe = build({"normalize_expert_weights": True, "n_shared_experts": 0, "lora_targets": ()})
    config = replace(tiny(), n_experts=1, n_active_experts=1, n_expert_groups=1, n_active_groups=1, n_shared_experts=0)
    single = build(replace(config, lora_targets=()))
    dense = build({"ffn": "dense", "ffn_dim": 8, "lora_targets": ()})
    state = {k: v for k, v in single.state_dict().items() if ".mlp." not in k or not k.startswith("recurrent")}
    experts = single.recurrent[0].mlp.experts
    gate, up = experts.gate_up_proj[0].chunk(2)
    state |= {
        f"recurrent.0.mlp.{n}_proj.weight": w for n, w in (("gate", gate), ("up", up), ("down", experts.down_proj[0]))
    }
    for layer in ("prelude_layers", "coda_layers"):
        assert getattr(single, layer)[0].mlp.up_proj.weight.shape[0] == 24
        getattr(dense, layer)[0].mlp = getattr(single, layer)[0].mlp
    dense.load_state_dict(state)
    tokens = tokens_for(config, 2, T)
    close(dense(tokens).logits, single(tokens).logits)
    differ(moe(tokens).logits, single(tokens).logits)


def test_loop_gradients_reach_router_and_experts() -> None:
    model = build({}).train()
    found = gradients(model, model(tokens_for(model.config, 2, T)).logits.square().sum())
    assert found["recurrent.0.mlp.router.weight"].any()
    close_gradients(found, found)
