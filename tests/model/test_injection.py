"""A stays below 1 and finite for every number a parameter can hold."""

import math

import pytest
import torch
from torch import Tensor, nn

from ritornello.model.injection import A_LOG_MAX, INJECTIONS, LTI
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.builders import build, close, differ, gradients, tiny, tokens_for


def every_bfloat16() -> Tensor:
    """All 65,280 finite patterns."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def lti(A_log: Tensor, dt: Tensor, **changes: object) -> LTI:
    module = LTI(tiny(**changes))
    module.A_log = nn.Parameter(A_log)
    module.dt = nn.Parameter(dt)
    module.B = nn.Parameter(torch.ones_like(dt))
    return module


def parcae(A_log: Tensor, dt: Tensor) -> Tensor:
    """The control: the same without the caps."""
    return torch.exp(-nn.functional.softplus(dt.float()) * torch.exp(A_log.float()))


def holds(A: Tensor, rho_max: float = 1 - 2**-8) -> bool:
    return bool(A.isfinite().all() and (A >= 0).all() and (rho_max >= A).all() and (A < 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alone", ["A_log", "dt"])
def test_every_pattern_of_each_parameter_alone(alone: str, dtype: torch.dtype) -> None:
    values = every_bfloat16()
    assert len(values) == 65_280
    for other in (0.0, 0.5413, -3.0, 3.0):
        fixed = torch.full_like(values, other)
        pair = (values, fixed) if alone == "A_log" else (fixed, values)
        module = lti(*(x.to(dtype) for x in pair))
        A = module.decay()
        assert holds(A)
        A.sum().backward()
        assert module.A_log.grad.isfinite().all() and module.dt.grad.isfinite().all()


def test_a_grid_of_pairs() -> None:
    """4,080 × 4,080 = 16.6 million pairs of bfloat16 patterns: every 16th; A, and A in bfloat16."""
    values = every_bfloat16()[::16]
    bad = 0
    for chunk in values.split(256):
        A_log, dt = torch.meshgrid(chunk, values, indexing="ij")
        with torch.no_grad():
            A = lti(A_log.flatten(), dt.flatten()).decay()
        assert holds(A)
        assert (A.to(torch.bfloat16) < 1).all()
        bad += int((~(parcae(A_log[:, ::64], dt[:, ::64]) < 1)).sum())
    assert bad > 0, "the control rounds to 1, or is not a number"


def test_gradients_of_a_grid_of_pairs() -> None:
    values = every_bfloat16()[::64]
    A_log, dt = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    module = lti(A_log, dt)
    module.decay().sum().backward()
    assert module.A_log.grad.isfinite().all() and module.dt.grad.isfinite().all()
    free_A_log, free_dt = A_log.float().requires_grad_(), dt.float().requires_grad_()
    parcae(free_A_log, free_dt).sum().backward()
    assert not (free_A_log.grad.isfinite().all() and free_dt.grad.isfinite().all()), "the control has NaN gradients"


def test_controls_fail() -> None:
    low, one = torch.tensor([-17.5]), torch.tensor([math.log(math.e - 1)])
    assert parcae(low, one) == 1.0 and lti(low, one).decay() < 1
    assert parcae(torch.tensor([-6.5]), one).to(torch.bfloat16) == 1.0
    assert parcae(torch.tensor([89.0]), torch.tensor([-110.0])).isnan()
    assert lti(torch.tensor([89.0]), torch.tensor([-110.0])).decay() == 1 - 2**-8


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adversarial_steps(optimizer: str, dtype: torch.dtype) -> None:
    """An optimizer whose rate breaks everything, climbing towards A = 1 and away from it by turns."""
    model = build({"injection": "lti"}, dtype=torch.float32)
    model.injection.to(dtype)
    parameters = [model.injection.A_log, model.injection.dt]
    step = getattr(torch.optim, optimizer)(parameters, lr=1e4, maximize=True)
    for i in range(60):
        loss = model.injection.decay().sum() * (1 if i % 20 < 15 else -1) * 10.0 ** (i % 30)
        step.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in parameters)
        step.step()
        assert holds(model.injection.decay())
    assert model.injection.decay().max() > 0.99 or model.injection.decay().min() < 0.01


def test_rho_max_of_converted_models() -> None:
    """Converters of models with A < 1 by luck alone set rho_max = 1; nothing is clipped then."""
    A = lti(torch.tensor([-17.5, 0.0]), torch.tensor([0.5, 0.5]), rho_max=1.0).decay()
    assert A[0] == 1.0 and A[1] < 1


@pytest.mark.parametrize("kind", list(INJECTIONS))
def test_norms_bound_what_is_injected(kind: str) -> None:
    """‖u‖ ≤ rho ‖h‖ + gain ‖e‖, tight for some input where the map is diagonal."""
    changes = {"initial_state": "e"} if kind == "none" else {}
    injection = build({"injection": kind, **changes}).injection
    h, e = (torch.randn(500, 16, dtype=torch.float64) for _ in range(2))
    bound = injection.rho() * h.norm(dim=-1) + injection.gain() * e.norm(dim=-1)
    u = injection(h, e)
    assert (u.norm(dim=-1) <= bound * (1 + 1e-9)).all()
    assert u.norm(dim=-1).max() > 0.2 * bound.max()


def test_starts_where_the_configuration_says() -> None:
    for matrix in (False, True):
        config = tiny(injection_matrix=matrix, decay_init=0.447, input_init=0.6)
        injection = RecurrentDepthTransformer(config).injection
        h, e = torch.randn(2, 16), torch.randn(2, 16)
        torch.testing.assert_close(injection(h, e), 0.447 * h + 0.6 * e)


def test_a_full_matrix_acts_from_the_left() -> None:
    injection = build({"injection_matrix": True}).injection
    h, e = torch.zeros(1, 16, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)
    step = nn.functional.softplus(injection.dt)
    close(injection(h, e)[0], step * (injection.B @ e[0]))
    differ(injection(h, e)[0], step * (injection.B.T @ e[0]))


def test_e_gets_its_gradient_from_every_loop() -> None:
    model = build({}).train()
    out = model(tokens_for(model.config, 1, 3), n_loops=5)
    found = gradients(model, out.logits.sum())
    assert all(found[f"injection.{name}"].all() for name in ("A_log", "dt", "B"))


def test_factors_of_every_pair() -> None:
    """Finite and not negative, each of a pair of bfloat16 parameters: no product of two is NaN, so A lies in
    [0, rho_max] for all 65,280² pairs."""
    x = every_bfloat16().float()
    for factor in (nn.functional.softplus(x), x.clamp(max=A_LOG_MAX).exp()):
        assert factor.isfinite().all() and (factor >= 0).all()
    assert not x.exp().isfinite().all(), "control: without the bound"
