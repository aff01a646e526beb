"""Cross entropy in chunks is cross entropy."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ritornello.ops import loss
from ritornello.ops.loss import linear_cross_entropy, linear_cross_entropy_ref
from tests.model.builders import close, differ

N, D, V = 23, 6, 11


def case() -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    return hidden, weight, labels


def by_hand(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    losses = []
    for h, label in zip(hidden, labels.tolist(), strict=True):
        scores = weight @ h
        losses.append(scores.exp().sum().log() - scores[label] if label != -100 else scores.sum() * 0)
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 22, 23, 1000])
def test_equals_its_definition(chunk_tokens: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk_tokens * V)
    hidden, weight, labels = case()
    reduce = {"none": lambda x: x, "sum": torch.sum, "mean": lambda x: x.sum() / (labels != -100).sum()}[reduction]
    for reference in (linear_cross_entropy_ref, by_hand):
        fast = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        slow = reduce(reference(hidden, weight, labels))
        close(fast, slow, 1e-12)
        grads = [torch.autograd.grad(x.sin().sum(), (hidden, weight)) for x in (fast, slow)]
        close(grads[0][0], grads[1][0], 1e-12)
        close(grads[0][1], grads[1][1], 1e-12)
    differ(fast, reduce(linear_cross_entropy_ref(hidden, weight, labels.roll(1))))


def test_no_target_no_loss_no_gradient() -> None:
    hidden, weight, labels = case()
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert not losses[labels == -100].any() and losses[labels != -100].all()
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    assert not grad[labels == -100].any()


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of more than CHUNK_NUMBERS numbers is made, forward or backward."""
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 4 * V)
    sizes = []
    real = torch.nn.functional.linear

    def spy(*args: Tensor) -> Tensor:
        y = real(*args)
        sizes.append(y.numel())
        return y

    monkeypatch.setattr(loss.F, "linear", spy)
    hidden, weight, labels = case()
    linear_cross_entropy(hidden, weight, labels, reduction="none").sum().backward()
    assert max(sizes) <= 4 * V and len(sizes) == 2 * math.ceil(N / 4)


def largest_bytes(work: Callable[[], object]) -> int:
    """The most that is asked of the allocator at once, inside torch's own operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    return max(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_holds_no_whole_logits(dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward, in torch's own operator: nothing is larger than an input or a chunk."""
    n, dim, vocab = 64, 4, 50
    hidden, weight = (torch.randn(rows, dim, dtype=dtype, requires_grad=True) for rows in (n, vocab))
    labels, logits = torch.randint(vocab, (n,)), n * vocab * dtype.itemsize
    work = lambda: linear_cross_entropy(hidden, weight, labels, reduction=reduction).backward()  # noqa: E731
    assert largest_bytes(work) >= logits
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 4 * vocab)
    assert largest_bytes(work) <= max(n * dim, 4 * vocab) * dtype.itemsize < logits / 10


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_sums_in_chunks(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n, dim, vocab, calls = 64, 16, 50, []
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight = (torch.randn(rows, dim).to(dtype).requires_grad_() for rows in (n, vocab))
    labels = torch.randint(vocab, (n,))
    labels[::5] = -100
    real = torch.nn.functional.linear
    monkeypatch.setattr(loss.F, "linear", lambda *args: calls.append(args) or real(*args))

    def found(labels: Tensor) -> tuple[Tensor, ...]:
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = linear_cross_entropy(hidden, weight, labels, reduction="sum")
        return value, *torch.autograd.grad(value, (hidden, weight))

    whole = found(labels)
    assert len(calls) == 1
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 4 * vocab)
    chunked = found(labels)
    assert len(calls) == n // 4
    without_the_last = found(torch.cat((labels[:-4], labels.new_full((4,), -100))))
    assert whole[0].dtype == torch.float32 and whole[1].dtype == whole[2].dtype == dtype
    for fast, slow, other, tolerance in zip(chunked, whole, without_the_last, (1e-3, 0.03, 0.03), strict=True):
        assert fast.dtype == slow.dtype
        assert (fast - slow).float().norm() < tolerance * slow.float().norm()
        assert (other - slow).float().norm() > 2 * tolerance * slow.float().norm()


def test_uniform_logits_cost_log_vocabulary() -> None:
    _, weight, _ = case()
    value = linear_cross_entropy(torch.zeros(3, D, dtype=torch.float64), weight, torch.tensor([0, 4, 9]))
    assert value.item() == pytest.approx(math.log(V))


def test_low_precision_logits_are_summed_in_float32() -> None:
    hidden, weight, labels = (x.detach() for x in case())
    small = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert small.dtype == torch.float32
    assert small.item() == pytest.approx(linear_cross_entropy(hidden, weight, labels).item(), rel=0.05)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction = 'avg': must be one of"):
        linear_cross_entropy(*case(), reduction="avg")


@pytest.mark.parametrize("label", [-1, -99, V])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    hidden, weight, labels = case()
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tokens_no_loss(reduction: str) -> None:
    hidden, weight, labels = case()
    losses = linear_cross_entropy(hidden[:0], weight, labels[:0], reduction=reduction)
    grads = torch.autograd.grad(losses.sum(), (hidden, weight))
    assert losses.sum() == 0 and not any(grad.any() for grad in grads)


def test_a_sum_is_differentiated_once() -> None:
    hidden, weight, labels = case()
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    torch.autograd.grad(total, hidden, retain_graph=True)
    with pytest.raises(AssertionError, match="can be had once"):
        torch.autograd.grad(total, hidden)


def test_one_side_may_be_frozen() -> None:
    hidden, weight, labels = case()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    for free, frozen, expected in ((hidden, weight, both[0]), (weight, hidden, both[1])):
        frozen.requires_grad_(False)
        (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), free)
        assert torch.equal(found, expected)
        frozen.requires_grad_(True)
