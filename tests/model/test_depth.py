"""Budgets, gradients through loops, and that a looped model is nothing but its unrolled self."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ritornello.config import ExitRule
from ritornello.model.cache import Passing
from ritornello.model.context import build_context
from ritornello.model.depth import Depth
from ritornello.model.halting import LEARNED_RULES
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.ops.loss import linear_cross_entropy
from ritornello.ops.noise import Key
from tests.model.builders import (
    build,
    close,
    close_gradients,
    differ,
    every_kind,
    gradients,
    lively,
    rules_for,
    tokens_for,
)

T = 4


def loss_of(model: RecurrentDepthTransformer, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def labels_for(model: RecurrentDepthTransformer, batch: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, T), generator=torch.Generator().manual_seed(5))


@every_kind
def test_right_aligned_equals_budgets(row: dict) -> None:
    """In values and gradients, for counts by sequence; rows come back in the batch's order."""
    model = build(row).train()
    tokens, labels = tokens_for(model.config, 3, T), labels_for(model, 3)
    key = Key(0, 0, torch.tensor([5, 3, 8]))
    right = model(tokens, n_loops=Depth.right_aligned([2, 5, 1]), key=key)
    left = model(tokens, n_loops=torch.tensor([2, 5, 1]), key=key)
    close(right.logits, left.logits)
    assert right.loops_used.tolist() == left.loops_used.tolist() == [[2] * T, [5] * T, [1] * T]
    if right.routing is not None:
        assert torch.equal(right.routing.load, left.routing.load)
    close_gradients(
        gradients(model, loss_of(model, right.logits, labels)), gradients(model, loss_of(model, left.logits, labels))
    )
    differ(right.logits, model(tokens, n_loops=Depth.right_aligned([2, 5, 2]), key=key).logits)


@every_kind
def test_iterations_without_a_row_change_nothing(row: dict) -> None:
    """Where the rows of another process are deeper; in values and gradients."""
    model = build(row).train()
    tokens, labels = tokens_for(model.config, 3, T), labels_for(model, 3)
    key = Key(0, 0, torch.tensor([5, 3, 8]))
    plans = (Depth.right_aligned([2, 3, 1]), Depth.right_aligned([2, 3, 1], 6), Depth.right_aligned([2, 3, 2], 6))
    found = [model(tokens, n_loops=plan, key=key, trajectory=True) for plan in plans]
    assert [len(state.rows) for state in found[1].trajectory] == [0, 0, 0, 1, 2, 3]
    close(found[0].logits, found[1].logits)
    first, second = (gradients(model, loss_of(model, out.logits, labels) + sum(out.aux.values())) for out in found[:2])
    close_gradients(first, second)
    if found[0].routing is not None:
        assert torch.equal(found[0].routing.load, found[1].routing.load)
    differ(found[0].logits, found[2].logits)
    if not model.config.is_plain and model.config.halting != "act" and model.config.injection != "none":
        cut = [model(tokens, n_loops=plan, key=key, backprop_loops=2) for plan in plans[:2]]
        close_gradients(*(gradients(model, loss_of(model, out.logits, labels)) for out in cut))


@every_kind
def test_each_sequence_as_alone(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 3, T)
    batch = model(tokens, n_loops=Depth.right_aligned([2, 5, 1])).logits
    for r, n_loops in enumerate((2, 5, 1)):
        close(batch[r : r + 1], model(tokens[r : r + 1], n_loops=n_loops).logits)
    differ(batch[:1], model(tokens[:1], n_loops=5).logits)


@every_kind
def test_checkpointing_changes_nothing(row: dict) -> None:
    model = build(row | {"dropout": 0.2}).train()
    tokens, labels = tokens_for(model.config, 2, T), labels_for(model, 2)
    results = []
    for checkpoint in (False, True):
        out = model(tokens, n_loops=Depth.right_aligned([2, 4]), checkpoint=checkpoint, key=Key(3))
        results.append((out.logits, gradients(model, loss_of(model, out.logits, labels) + sum(out.aux.values()))))
    assert torch.equal(results[0][0], results[1][0])
    close_gradients(results[1][1], results[0][1], 1e-12)
    differ(model(tokens, n_loops=Depth.right_aligned([2, 4]), checkpoint=True, key=Key(4)).logits, results[0][0])


@every_kind
def test_looped_is_unrolled_tied_copies(row: dict) -> None:
    """In values and gradients; cut off after two loops, the gradient is that of a manual detach. Only h is cut: e keeps
    its gradient from every loop that has one."""
    model = build(row).train()
    tokens, labels = tokens_for(model.config, 2, T), labels_for(model, 2)
    learns_halting = model.config.halting == "act"  # whose probabilities need the gradient of every loop
    found = {}
    for backprop in (0,) if learns_halting else (0, 2):
        out = model(tokens, n_loops=5, backprop_loops=backprop).logits
        copies = unrolled(model, tokens, 5, cut=backprop)
        close(out, copies)
        found[backprop] = gradients(model, loss_of(model, out, labels))
        close_gradients(found[backprop], gradients(model, loss_of(model, copies, labels)))
    differ(out, unrolled(model, tokens, 4))
    with pytest.raises(ValueError if learns_halting else AssertionError):
        model(tokens, n_loops=5, backprop_loops=2)
        close_gradients(found[2], found[0], 1e-7)


def test_truncation_is_refused_where_no_cut_is_right() -> None:
    tokens = tokens_for(build({}).config, 2, T)
    for row, options in (({}, {"n_loops": torch.tensor([2, 5])}), ({"halting": "gate"}, {"n_loops": 5, "weigh": True})):
        with pytest.raises(ValueError, match="backprop_loops = 2: must be 0 where halting is learned"):
            build(row)(tokens, backprop_loops=2, **options)


def unrolled(model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int, cut: int = 0) -> Tensor:
    """Logits of a stack of n_loops · R tied layers, written out."""
    c = model.config
    x = model.embed(tokens)
    context = build_context(c, x, tokens=tokens)
    e = model.prelude(x, context, Passing())
    h = model.start(e, context, torch.arange(len(x)), Run(Depth.uniform(n_loops))).h
    first, total, left = None, torch.zeros_like(e), torch.ones_like(e[..., :1])
    for loop in range(n_loops):
        kv = Passing(first, share_first=c.kv_sharing == "first")
        h, _ = model.loop_once(h, e, loop, context, kv)
        first = kv.entries if first is None else first
        state = read = model.carry.mean(h)
        if c.read_out == "mixture":
            head = model.halting.head.linear
            p = torch.minimum((state @ head.weight.T + head.bias).sigmoid(), left) if loop < n_loops - 1 else left
            total, left = total + p * state, left - p
            read = total
        if cut and loop == n_loops - cut - 1:
            h = h.detach()
            first = {layer: entries.detach() for layer, entries in first.items()}
    return model.logits(model.coda(read, context, Passing()))


def test_one_loop_without_injection_is_a_deeper_plain_model() -> None:
    """The same class without recurrence: its layers are those of the looped one, run once."""
    looped = build(
        {"injection": "none", "initial_state": "e", "ffn": "dense", "lora_targets": (), "loop_embedding": False}
    )
    plain = build({"layers": (2, 0, 1)})
    plain.prelude_layers[0].load_state_dict(looped.prelude_layers[0].state_dict())
    plain.prelude_layers[1].load_state_dict(looped.recurrent[0].state_dict())
    plain.coda_layers[0].load_state_dict(looped.coda_layers[0].state_dict())
    for name in ("norm", "embed_tokens"):
        getattr(plain, name).load_state_dict(getattr(looped, name).state_dict())
    tokens = tokens_for(looped.config, 2, T)
    looped.input_norm = torch.nn.Identity()
    close(looped(tokens, n_loops=1).logits, plain(tokens).logits)
    differ(looped(tokens, n_loops=2).logits, plain(tokens).logits)


def test_a_plain_model_has_no_recurrence() -> None:
    model = build({"layers": (2, 0, 1), "halting": "none"})
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"embed_tokens", "prelude_layers", "coda_layers", "norm"}
    assert not hasattr(model, "injection") and not hasattr(model, "input_norm")
    tokens = tokens_for(model.config, 2, T)
    assert torch.equal(model(tokens, n_loops=1).logits, model(tokens, n_loops=9).logits)


@every_kind
def test_accumulation_changes_nothing(row: dict) -> None:
    model = build(row | {"dropout": 0.2}).train()
    tokens, labels = tokens_for(model.config, 4, T), labels_for(model, 4)
    counts, ids = [3, 1, 2, 4], torch.arange(4)

    def grads(part: slice) -> dict[str, Tensor]:
        out = model(tokens[part], n_loops=Depth.right_aligned(counts[part]), key=Key(0, 1, ids[part]))
        loss = linear_cross_entropy(
            out.hidden.flatten(0, 1), model.head_weight, labels[part].flatten(), reduction="sum"
        )
        return gradients(model, loss)

    whole, first, second = grads(slice(0, 4)), grads(slice(0, 2)), grads(slice(2, 4))
    close_gradients({name: first[name] + second[name] for name in whole}, whole)
    with pytest.raises(AssertionError):
        close_gradients(first, whole, 1e-7)


@every_kind
def test_right_aligned_with_an_exit_rule(row: dict) -> None:
    """A sequence may stop before the shortest has begun."""
    model = build(row)
    tokens = tokens_for(model.config, 2, T)
    name = rules_for(model.config)[0]
    at_once = ExitRule(name, 0.0 if name in LEARNED_RULES else 1e9)
    for rule in (at_once, lively(model, tokens, name, 5)):
        with torch.no_grad():
            left = model(tokens, n_loops=torch.tensor([5, 1]), exit=rule)
            right = model(tokens, n_loops=Depth.right_aligned([5, 1]), exit=rule)
        close(right.logits, left.logits)
        assert torch.equal(right.loops_used, left.loops_used)


def test_right_aligned_runs_no_row_before_its_turn() -> None:
    depth = Depth.right_aligned([2, 5, 1, 5])
    assert depth.n_iterations == 5 and depth.sizes == (2, 2, 2, 3, 4)
    assert depth.order.tolist() == [1, 3, 0, 2]
    assert depth.turn(3, 3).loop.flatten().tolist() == [3, 3, 0]
    model = build({})
    states = model(tokens_for(model.config, 4, T), n_loops=depth, trajectory=True).trajectory
    assert [len(state.h) for state in states] == [2, 2, 2, 3, 4]
    assert states[-1].rows.tolist() == [1, 3, 0, 2]


def test_equal_counts_cost_nothing() -> None:
    assert Depth.right_aligned([3, 3]) == Depth.uniform(3) == Depth.of(torch.tensor([3, 3]), (2, 4))
    assert Depth.right_aligned(np.full((2, 4), 3)) == Depth.uniform(3)


def test_trajectory_holds_what_each_depth_would_give() -> None:
    model = build({"carry_streams": 3})
    tokens = tokens_for(model.config, 2, T)
    states = model(tokens, n_loops=4, trajectory=True).trajectory
    for n, state in enumerate(states, 1):
        context = build_context(model.config, model.embed(tokens))
        hidden = model.coda(model.read_out(state), context, Passing())
        close(model.logits(hidden), model(tokens, n_loops=n).logits)
