"""Tokens that have halted leave the block's batch, and nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ritornello.config import ExitRule
from ritornello.model.cache import Cache
from ritornello.model.context import Capture
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import Output
from ritornello.ops.noise import Key
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
    signal,
    tokens_for,
)

T, DEEP = 6, 5
COUNTS = [2, 6, 3, 3]  # by sequence; right-aligned, row 1 is alone for three loops, then rows 2 and 3 join, then row 0
BUDGETS = torch.tensor([[3, 5, 1, 4, 1, 2], [1, 1, 2, 1, 3, 1], [2, 1, 1, 1, 1, 1]])


def block_tokens(model: RecurrentDepthTransformer) -> list[int]:
    """A list that gets, for each pass through the first recurrent layer, how many tokens it had."""
    seen: list[int] = []
    model.recurrent[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0] * args[0].shape[1]))
    return seen


@torch.no_grad()
def halving(model: RecurrentDepthTransformer, tokens: Tensor, name: str, **options: Any) -> ExitRule:
    """The rule by which half of the deepest row's tokens leave after their second loop: while it is alone, so that
    they are left out whoever joins later."""
    first, second = model(tokens, n_loops=3, trajectory=True, weigh=True, **options).trajectory[:2]
    values = signal(model, name, first, second)[COUNTS.index(max(COUNTS))].sort().values
    return ExitRule(name, float(values[T // 2 - 1 : T // 2 + 1].mean()), min_loops=2)


Found = tuple[Output, dict[str, Tensor], list[int]]


def found(model: RecurrentDepthTransformer, tokens: Tensor, **options: Any) -> Found:
    """A pass; the gradients of its logits and of every loss beside them; and the tokens of each pass of the block."""
    seen = block_tokens(model)
    out = model(tokens, **options)
    n_tokens = list(seen)  # before recomputation adds to it
    return out, gradients(model, out.logits.square().mean() + sum(out.aux.values())), n_tokens


def alike(small: Found, plain: Found) -> None:
    """Nothing differs but that the block had fewer tokens."""
    (fast, fast_grads, some), (slow, slow_grads, every) = small, plain
    close(fast.logits, slow.logits)
    close_gradients(fast_grads, slow_grads)
    assert torch.equal(fast.loops_used, slow.loops_used)
    assert fast.aux.keys() == slow.aux.keys()
    for name, value in slow.aux.items():
        close(fast.aux[name], value)
    if slow.routing is not None:
        assert torch.equal(fast.routing.load, slow.routing.load)
    assert len(some) == len(every) and sum(some) < sum(every)


def unlike(actual: Found, expected: Found) -> None:
    """The positive control of `alike`, in outputs, gradients and every loss."""
    differ(actual[0].logits, expected[0].logits)
    with pytest.raises(AssertionError):
        close_gradients(actual[1], expected[1], 1e-7)
    for name, value in expected[0].aux.items():
        differ(actual[0].aux[name], value)


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
    differ(outs[1].logits, model(tokens, n_loops=DEEP, compact=True).logits)


@every_kind
@pytest.mark.parametrize("plan", [torch.tensor(COUNTS), Depth.right_aligned(COUNTS)], ids=["budgets", "right-aligned"])
def test_sequences_of_their_own_depths_whose_tokens_leave_early(plan: Tensor | Depth, row: dict) -> None:
    """Right-aligned, rows join a batch that some tokens have left already."""
    model = build(row).train()
    tokens = tokens_for(model.config, 4, T, seed=1)
    rule = halving(model, tokens, rules_for(model.config)[0])
    plain, small = (found(model, tokens, n_loops=plan, exit=rule, compact=way) for way in (False, True))
    alike(small, plain)
    assert ("balance" in plain[0].aux) == (row["ffn"] == "moe")
    unlike(found(model, tokens, n_loops=plan, compact=True), plain)


@every_kind
def test_budgets_by_sequence(row: dict) -> None:
    model = build(row).train()
    tokens = tokens_for(model.config, 4, T)
    plain, small = (found(model, tokens, n_loops=torch.tensor(COUNTS), compact=way) for way in (False, True))
    alike(small, plain)
    assert small[2] == [T * sum(loop < count for count in COUNTS) for loop in range(max(COUNTS))]
    unlike(found(model, tokens, n_loops=torch.tensor([1, 6, 3, 3]), compact=True), plain)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ["hazard", "cumulative"])
@pytest.mark.parametrize("read_out", ["last", "mixture"])
def test_right_aligned_halting_with_dropout(read_out: str, name: str, checkpoint: bool) -> None:
    """Masks are drawn for the address of a token, wherever it lies; recomputed, they are the same."""
    model = build({"halting": "act", "read_out": read_out, "dropout": 0.2, "initial_state": "noise"}).train()
    tokens, sequences = tokens_for(model.config, 4, T, seed=1), torch.tensor([5, 3, 8, 1])
    key, depth = Key(2, 7, sequences), Depth.right_aligned(COUNTS)
    rule = halving(model, tokens, name, key=key)
    plain = found(model, tokens, n_loops=depth, exit=rule, key=key, compact=False)
    small = found(model, tokens, n_loops=depth, exit=rule, key=key, compact=True, checkpoint=checkpoint)
    alike(small, plain)
    assert small[0].aux.keys() == {"balance", "ponder"}
    for other in (Key(2, 8, sequences), Key(2, 7, sequences.roll(1))):
        unlike(found(model, tokens, n_loops=depth, exit=rule, key=other, compact=True, checkpoint=checkpoint), plain)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_right_aligned_cut_off(checkpoint: bool) -> None:
    """Gradients of the last loops only: those of tokens that have left before come through their keys alone."""
    model = build({"halting": "delta"}).train()
    tokens, depth = tokens_for(model.config, 4, T, seed=1), Depth.right_aligned(COUNTS)
    how = {"n_loops": depth, "exit": halving(model, tokens, "delta")}
    plain = found(model, tokens, **how, backprop_loops=2, compact=False)
    alike(found(model, tokens, **how, backprop_loops=2, compact=True, checkpoint=checkpoint), plain)
    whole = found(model, tokens, **how, compact=True, checkpoint=checkpoint)
    close(whole[0].logits, plain[0].logits)
    with pytest.raises(AssertionError):
        close_gradients(whole[1], plain[1], 1e-7)


def test_right_aligned_rows_with_padding() -> None:
    """Padding has halted before it starts: rows of different lengths join, and every loop leaves some out."""
    model = build({"halting": "act"}).train()
    tokens, depth = tokens_for(model.config, 4, T, seed=1), Depth.right_aligned(COUNTS)
    documents = torch.tensor([[0] * n + [-1] * (T - n) for n in (5, 4, 2, 5)])
    rule = lively(model, tokens, "cumulative", max(COUNTS), documents=documents)
    plain, small = (
        found(model, tokens, n_loops=depth, exit=rule, documents=documents, compact=way) for way in (False, True)
    )
    alike(small, plain)
    assert all(some < every for some, every in zip(small[2], plain[2], strict=True))
    assert not small[0].loops_used[documents < 0].any()
    unlike(found(model, tokens, n_loops=depth, exit=rule, compact=True), plain)


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
