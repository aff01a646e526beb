"""Every path through the experts against the loop that defines them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ritornello.ops import experts as module
from ritornello.ops.experts import experts, experts_grouped, experts_padded, experts_ref
from tests.model.builders import close, differ

E, D, F = 16, 16, 8


def case(load: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, gate_up, down, weights, indices. `uneven`: all tokens on two experts; `idle`: most experts unused."""
    n, k = (1, 2) if load == "one token" else (32, 2)
    token = torch.arange(n)
    indices = {
        "even": torch.stack((token % E, (token + 3) % E), 1),
        "uneven": torch.stack((torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)), 1),
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


@pytest.mark.parametrize("load", ["even", "uneven", "idle", "one token"])
@pytest.mark.parametrize("path", [experts_padded, experts_grouped, experts], ids=lambda f: f.__name__)
def test_paths_equal_the_definition(path: Callable, load: str) -> None:
    grouped = path is experts_grouped
    inputs = case(load, torch.float32 if grouped else torch.float64)
    tolerance = 2e-5 if grouped else 1e-11
    for fast, defined in zip(run(path, inputs), run(experts_ref, inputs), strict=True):
        close(fast, defined, tolerance)
    x, gate_up, down, weights, indices = inputs
    differ(path(x, gate_up, down, (indices + 1) % E, weights), run(experts_ref, inputs)[0], 1e-3)


def test_uneven_loads_take_the_path_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module._per_expert
    monkeypatch.setattr(module, "_per_expert", lambda *args: calls.append(1) or real(*args))
    run(experts_padded, case("even"))
    assert not calls
    run(experts_padded, case("uneven"))
    assert calls


@pytest.mark.parametrize("load", ["uneven", "idle"])
@pytest.mark.parametrize("path", [experts_padded, experts_grouped, experts_ref], ids=lambda f: f.__name__)
def test_idle_experts_get_zero_gradients(path: Callable, load: str) -> None:
    inputs = case(load, torch.float32)
    _, _, gate_up, down, _ = run(path, inputs)
    idle = [i for i in range(E) if not (inputs[-1] == i).any()]
    assert idle and not gate_up[idle].any() and not down[idle].any()
    assert gate_up[inputs[-1].unique()].flatten(1).any(1).all()


def test_order_of_choices_does_not_matter() -> None:
    x, gate_up, down, weights, indices = case("even")
    y = experts_padded(x, gate_up, down, indices, weights)
    close(experts_padded(x, gate_up, down, indices.flip(1), weights.flip(1)), y)
    differ(experts_padded(x, gate_up, down, indices.flip(1), weights), y)


def test_tokens_do_not_depend_on_each_other() -> None:
    x, gate_up, down, weights, indices = case("even")
    rows = zip(x.split(1), indices.split(1), weights.split(1), strict=True)
    alone = torch.cat([experts_padded(row, gate_up, down, index, weight) for row, index, weight in rows])
    close(experts_padded(x, gate_up, down, indices, weights), alone)


def test_autocast_reaches_the_experts() -> None:
    x, gate_up, down, weights, indices = case("even", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, gate_up, down, indices, weights)
    assert y.dtype == torch.bfloat16
    exact = experts_ref(x, gate_up, down, indices, weights)
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
