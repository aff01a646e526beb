"""Every path through the experts against the loop that defines them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ritornello.ops import experts as module
from ritornello.ops.experts import (
    experts,
    experts_fused,
    experts_gathered,
    experts_grouped,
    experts_ref,
    experts_slotted,
)
from tests.model.builders import close, differ

E, D, F = 16, 16, 8
PATHS = (experts_slotted, experts_gathered, experts_fused, experts_grouped)


def case(load: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, gate_up, down, weights, indices. `uneven`, `piled`: all tokens on two experts; `crowded`: on ten; `idle`: on
    seven."""
    n, k = {"one token": 1, "crowded": 128, "piled": 128}.get(load, 32), 2
    token = torch.arange(n)
    indices = {
        "even": torch.stack((token % E, (token + 3) % E), 1),
        "uneven": torch.stack((torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)), 1),
        "piled": torch.stack((token * 0, token * 0 + 1), 1),
        "crowded": torch.stack((token % 10, (token + 3) % 10), 1),
        "idle": torch.stack((token % 5, 5 + token % 2), 1),
        "one token": torch.tensor([[6, 2]]),
    }[load]
    shapes = ((n, D), (E, 2 * F, D), (E, D, F), (n, k))
    return *(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes), indices


def run(path: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients."""
    x, gate_up, down, weights, indices = inputs
    y = path(x, gate_up, down, indices, weights)
    return [y, *torch.autograd.grad(y.sin().sum(), (x, gate_up, down, weights))]


@pytest.mark.parametrize("load", ["even", "uneven", "crowded", "idle", "one token"])
@pytest.mark.parametrize("path", [*PATHS, experts], ids=lambda f: f.__name__)
def test_paths_equal_the_definition(path: Callable, load: str) -> None:
    grouped = path is experts_grouped
    inputs = case(load, torch.float32 if grouped else torch.float64)
    tolerance = 2e-5 if grouped else 1e-10  # sums of up to 128 tokens, in an order that BLAS chooses by the CPU
    for fast, defined in zip(run(path, inputs), run(experts_ref, inputs), strict=True):
        close(fast, defined, tolerance)
    x, gate_up, down, weights, indices = inputs
    differ(path(x, gate_up, down, (indices + 1) % E, weights), run(experts_ref, inputs)[0], 1e-3)


@pytest.mark.parametrize("path", [experts_slotted, experts_gathered, experts], ids=lambda f: f.__name__)
def test_no_token_is_no_output(path: Callable) -> None:
    x, gate_up, down, weights, indices = case("even")
    none = (x[:0].detach().requires_grad_(), gate_up, down, weights[:0].detach().requires_grad_(), indices[:0])
    y, *gradients = run(path, none)
    assert y.shape == (0, D) and all(not gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert path(none[0], gate_up, down, indices[:0], none[3]).shape == (0, D)


@pytest.mark.parametrize(
    ("n", "gradients", "dtype", "wanted"),
    [
        (64, True, torch.float32, "experts_slotted"),
        (4096, False, torch.float32, "experts_slotted"),
        (1, False, torch.float32, "experts_gathered"),
        (1, True, torch.float32, "experts_slotted"),
        (1, False, torch.bfloat16, "experts_slotted"),
        (64, True, torch.float64, "experts_slotted"),
    ],
)
def test_the_rule(n: int, gradients: bool, dtype: torch.dtype, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("experts_grouped", "experts_slotted", "experts_gathered"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: taken.append(name) or real(*args))
    shapes = ((n, D), (32, 2 * F, D), (32, D, F), (n, 2))
    x, gate_up, down, weights = (torch.randn(shape, dtype=dtype) for shape in shapes)
    with torch.set_grad_enabled(gradients):
        experts(x, gate_up, down, torch.randint(32, (n, 2)), weights)
    assert taken == [wanted]


@pytest.mark.parametrize(
    ("load", "batches", "n_singles"),
    [("even", [(16, 8)], 0), ("uneven", [(16, 8)], 2), ("crowded", [(16, 20), (10, 8)], 0), ("one token", [], 2)],
)
def test_slots(load: str, batches: list[tuple[int, int]], n_singles: int) -> None:
    """Who is multiplied with whom; and every pair has one slot, that of its expert."""
    indices = case(load)[-1]
    slots = module._Slots(indices, E)
    assert [(len(experts), room) for experts, _, room in slots.batches] == batches
    assert len(slots.singles) == n_singles
    assert all(end - start == (24 if load == "uneven" else 1) for _, start, end in slots.singles)
    alike = module._Slots(indices, E, 16)
    assert all(end - start == (32 if load == "uneven" else 1) for _, start, end in alike.singles)
    assert torch.equal(alike.pair[alike.slot].flatten(), torch.arange(indices.numel()))
    owner = torch.full((len(slots.pair),), -1)
    for members, start, room in slots.batches:
        owner[start : start + len(members) * room] = members.repeat_interleave(room)
    for expert, start, end in slots.singles:
        owner[start:end] = expert
    assert torch.equal(owner[slots.slot], indices)
    assert torch.equal(slots.pair[slots.slot].flatten(), torch.arange(indices.numel()))
    assert (slots.pair < indices.numel()).sum() == indices.numel()
    weights = torch.rand(indices.shape) + 1
    assert torch.equal(slots.weights(weights)[slots.slot], weights)
    assert not slots.weights(weights)[slots.pair == indices.numel()].any()


@pytest.mark.parametrize("load", ["uneven", "idle"])
@pytest.mark.parametrize(
    "path", [experts_slotted, experts_gathered, experts_grouped, experts_ref], ids=lambda f: f.__name__
)
def test_idle_experts_get_zero_gradients(path: Callable, load: str) -> None:
    inputs = case(load, torch.float32)
    _, _, gate_up, down, _ = run(path, inputs)
    idle = [i for i in range(E) if not (inputs[-1] == i).any()]
    assert idle and not gate_up[idle].any() and not down[idle].any()
    assert gate_up[inputs[-1].unique()].flatten(1).any(1).all()


def test_order_of_choices_does_not_matter() -> None:
    x, gate_up, down, weights, indices = case("even")
    y = experts_slotted(x, gate_up, down, indices, weights)
    close(experts_slotted(x, gate_up, down, indices.flip(1), weights.flip(1)), y)
    differ(experts_slotted(x, gate_up, down, indices.flip(1), weights), y)


def test_tokens_do_not_depend_on_each_other() -> None:
    x, gate_up, down, weights, indices = case("even")
    rows = zip(x.split(1), indices.split(1), weights.split(1), strict=True)
    alone = torch.cat([experts_slotted(row, gate_up, down, index, weight) for row, index, weight in rows])
    close(experts_slotted(x, gate_up, down, indices, weights), alone)


def test_autocast_reaches_the_experts() -> None:
    x, gate_up, down, weights, indices = case("even", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, gate_up, down, indices, weights)
    assert y.dtype == torch.bfloat16
    exact = experts_ref(x, gate_up, down, indices, weights)
    assert (y.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("load", ["even", "uneven", "piled", "crowded", "idle", "one token"])
def test_gradients_under_autocast(load: str) -> None:
    """Of the slotted path, in the parameters' own precision. `piled`: a single of more than ALIKE, whose slots are
    rounded up."""
    x, gate_up, down, weights, indices = case(load, torch.float32)
    leaves, direction = (x, gate_up, down, weights), torch.randn(x.shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, gate_up, down, indices, weights)
    assert y.dtype == torch.bfloat16 and type(y.grad_fn).__name__ == "_MoveBackward"
    found = torch.autograd.grad(y, leaves, direction)
    exact, others = (
        torch.autograd.grad(experts_ref(x, gate_up, down, chosen, weights), leaves, direction.float())
        for chosen in (indices, (indices + 1) % E)
    )
    for fast, defined, other in zip(found, exact, others, strict=True):
        assert fast.dtype == torch.float32 and fast.isfinite().all()
        assert (fast - defined).norm() < 0.03 * defined.norm()
        assert (fast - other).norm() > 0.3 * other.norm()
