"""Tokens that have halted leave the block's batch, and nothing else changes."""

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.model.cache import Cache
from ritornello.model.context import Capture
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.subset import Subset
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

T, DEEP = 6, 5
BUDGETS = torch.tensor([[3, 5, 1, 4, 1, 2], [1, 1, 2, 1, 3, 1], [2, 1, 1, 1, 1, 1]])


def block_tokens(model: RecurrentDepthTransformer) -> list[int]:
    """A list that gets, for each pass through the first recurrent layer, how many tokens it had."""
    seen: list[int] = []
    model.recurrent[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0] * args[0].shape[1]))
    return seen


@every_kind
def test_budgets_and_their_gradients(row: dict) -> None:
    model = build(row).train()
    tokens = tokens_for(model.config, 3, T)
    found = []
    for compact in (False, True):
        out = model(tokens, n_loops=BUDGETS, compact=compact)
        balance = out.aux.get("balance", torch.zeros(()))
        found.append((out, gradients(model, out.logits.square().mean() + balance)))
    (plain, plain_grads), (small, small_grads) = found
    close(small.logits, plain.logits)
    close_gradients(small_grads, plain_grads)
    assert torch.equal(small.loops_used, plain.loops_used)
    if plain.routing is not None:
        assert torch.equal(small.routing.load, plain.routing.load)
    for name, value in plain.aux.items():
        close(small.aux[name], value)
    differ(small.logits, model(tokens, n_loops=DEEP).logits)


@every_kind
def test_exit_rules_with_and_without_a_cache(row: dict) -> None:
    model = build(row)
    tokens = tokens_for(model.config, 3, T, seed=1)
    rule = lively(model, tokens, rules_for(model.config)[0], DEEP)
    seen, by_way = block_tokens(model), []
    for compact in (False, True):
        seen.clear()
        with torch.no_grad():
            whole = model(tokens, n_loops=DEEP, exit=rule, compact=compact)
            counts = list(seen)
            cache = Cache(
                model.config, batch_size=3, max_len=T, n_loops=DEEP, policy=row["policy"], dtype=torch.float64
            )
            options = {"n_loops": DEEP, "exit": rule, "compact": compact, "cache": cache}
            parts = [model(tokens[:, part], **options).logits for part in (slice(0, 4), slice(4, 5), slice(5, 6))]
        by_way.append((whole, torch.cat(parts, 1), counts))
    (plain, plain_parts, every), (small, small_parts, some) = by_way
    close(small.logits, plain.logits)
    close(small_parts, plain_parts)
    assert torch.equal(small.loops_used, plain.loops_used)
    subsets = [Subset.of(plain.loops_used > loop, T) for loop in range(len(every))]
    assert set(every) == {3 * T}
    assert some == [3 * T if subset is None else subset.tokens.numel() for subset in subsets]


def test_packed_documents_that_start_late() -> None:
    model = build({"initial_state": "noise"}).train()
    tokens = tokens_for(model.config, 2, T)
    documents = torch.tensor([[0] * 4 + [1] * 2, [3] * 6])
    depth = Depth.right_aligned([[2] * 4 + [5] * 2, [3] * 6])
    outs = [model(tokens, documents=documents, n_loops=depth, compact=compact) for compact in (False, True)]
    close(outs[1].logits, outs[0].logits)
    close_gradients(*(gradients(model, out.logits.square().mean()) for out in reversed(outs)))
    cut = [model(tokens, documents=documents, n_loops=depth, backprop_loops=2, compact=way) for way in (False, True)]
    close_gradients(*(gradients(model, out.logits.square().mean()) for out in cut))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_recomputation(checkpoint: bool) -> None:
    model = build({"halting": "act", "read_out": "mixture"}).train()
    tokens = tokens_for(model.config, 3, T)
    rule = lively(model, tokens, "cumulative", DEEP)
    outs = [model(tokens, n_loops=DEEP, exit=rule, checkpoint=checkpoint and way, compact=way) for way in (False, True)]
    close(outs[1].aux["ponder"], outs[0].aux["ponder"])
    close_gradients(*(gradients(model, out.logits.square().mean() + out.aux["ponder"]) for out in outs))


def test_captured_passes_stay_whole() -> None:
    model = build({})
    tokens, capture = tokens_for(model.config, 3, T), Capture(frozenset({"1.ffn"}))
    model(tokens, n_loops=BUDGETS, capture=capture)
    assert {tuple(x.shape[:2]) for _, x in capture.tensors["1.ffn"]} == {(3, T)}


def test_a_batch_that_has_halted_altogether_still_loops() -> None:
    """With gradients the number of iterations must not depend on the data: every rank runs as many."""
    model = build({"halting": "gate"}).train()
    tokens = tokens_for(model.config, 2, T)
    seen = block_tokens(model)
    out = model(tokens, n_loops=DEEP, exit=ExitRule("delta", 1e9))
    assert seen == [2 * T] + [1] * (DEEP - 1)
    close(out.logits, model(tokens, n_loops=1).logits)
    assert all(grad.isfinite().all() for grad in gradients(model, out.logits.square().mean()).values())
