"""bfloat16 where it is cheap, float32 where it matters: the carry, the injection, the router and the norms."""

import pytest
import torch

from ritornello.model import attention, moe
from ritornello.model.cache import Cache, Passing
from ritornello.model.context import Capture
from ritornello.model.depth import Depth
from ritornello.model.injection import LTI
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from tests.model.builders import build, every_kind, lively, rules_for, tiny, tokens_for


@every_kind
def test_the_carry_stays_float32(row: dict) -> None:
    """Under autocast, and with every weight in bfloat16; forward and decode, both near the float32 model."""
    model = build(row, dtype=torch.float32)
    tokens = tokens_for(model.config, 2, 4)
    with torch.no_grad():
        exact = model(tokens, n_loops=3)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(tokens, n_loops=3, trajectory=True)
        model.to(torch.bfloat16)
        cache = Cache(model.config, batch_size=2, max_len=4, n_loops=3, dtype=torch.bfloat16)
        small = model(tokens, n_loops=3, trajectory=True)
        parts = [model(tokens[:, :3], n_loops=3, cache=cache), model(tokens[:, 3:], n_loops=3, cache=cache)]
        rule = lively(model, tokens, rules_for(model.config)[0], 4)
        assert model(tokens, n_loops=4, exit=rule).logits.isfinite().all()
    for out in (cast, small):
        assert all(state.h.dtype == torch.float32 for state in out.trajectory)
        assert out.logits.isfinite().all()
    decoded = torch.cat([part.logits for part in parts], 1).float()
    assert decoded.isfinite().all()
    for logits in (cast.logits.float(), small.logits.float(), decoded):  # experts may flip: most tokens, not all
        error = (logits - exact.logits).norm(dim=-1) / exact.logits.norm(dim=-1)
        assert error.median() < 0.2


@every_kind
def test_gradients_under_autocast(row: dict) -> None:
    model = build(row, dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens_for(model.config, 2, 4), n_loops=3, checkpoint=True)
        loss = out.logits.float().square().mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads.values())
    assert any(g.any() for g in grads.values())


def gradients(row: dict, *, bf16: bool) -> torch.Tensor:
    model = build(row, dtype=torch.float32).train()
    tokens = tokens_for(model.config, 4, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(tokens, n_loops=3).logits.float().logsumexp(-1).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("row", [{"ffn": "dense"}, {"ffn": "dense", "attention": "mla"}], ids=str)
def test_one_conversion_for_several_products_costs_no_precision(row: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients then meet in bfloat16: as far from float32's as when each product converts for itself."""
    exact, once = gradients(row, bf16=False), gradients(row, bf16=True)
    for module in (attention, moe):
        monkeypatch.setattr(module, "lowered", lambda x: x)
    each = gradients(row, bf16=True)
    assert not torch.equal(once, each), "nothing was replaced"
    error, before = ((found - exact).norm() / exact.norm() for found in (once, each))
    assert error < 1.15 * before < 0.1


def slow_decay(row: dict) -> RecurrentDepthTransformer:
    """A = 0.999 and B·e tiny: each loop changes the state by a thousandth, less than bfloat16 resolves."""
    model = RecurrentDepthTransformer(tiny(rho_max=0.9995, output_init="zero", initial_state="e", **row)).eval()
    with torch.no_grad():
        model.injection.A_log.fill_(torch.log(torch.log(torch.tensor(0.9995 / 0.999))))
        model.injection.B.zero_()
    return model


@pytest.mark.parametrize("row", [{}, {"carry_streams": 3}], ids=str)
@torch.no_grad()
def test_a_slow_decay_moves_the_state(row: dict) -> None:
    model = slow_decay(row)
    x = model.embed(tokens_for(model.config, 2, 4))
    context = model.context(x)
    e = model.prelude(x, context, Passing())
    with torch.autocast("cpu", torch.bfloat16):
        *_, last = model.iterate(e, context, Run(Depth.uniform(200)))
    torch.testing.assert_close(model.carry.mean(last.h), 0.999**200 * e, rtol=1e-3, atol=1e-4)
    control = e.to(torch.bfloat16)
    for _ in range(200):
        control = model.injection.decay().to(torch.bfloat16) * control
    assert torch.equal(control, e.to(torch.bfloat16)), "in bfloat16, 0.999 is 1"


def test_injection_and_router_compute_in_float32_under_autocast() -> None:
    model = build({}, dtype=torch.float32)
    h = torch.randn(1, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        u = model.injection(h, h.to(torch.bfloat16))
        _, weights, scores = model.recurrent[0].mlp.router(h, 0)
        attention = model.recurrent[0].self_attn.q_proj(h, 0)
    assert u.dtype == weights.dtype == scores.dtype == torch.float32
    assert attention.dtype == torch.bfloat16, "the control: the rest does use it"
    exact = model.injection(h, h.to(torch.bfloat16))
    assert torch.equal(u, exact)


def test_decay_of_bfloat16_parameters() -> None:
    injection = LTI(tiny()).to(torch.bfloat16)
    injection.reset(torch.Generator())
    assert injection.decay().dtype == torch.float32
    assert injection.decay().max().item() == pytest.approx(0.5, rel=0.02)


@every_kind
def test_capture_changes_nothing(row: dict) -> None:
    model = build(row)
    c = model.config
    recurrent = range(c.n_prelude_layers, c.n_prelude_layers + c.n_recurrent_layers)
    names = {"e", "h"} | {f"{i}.{branch}" for i in range(c.n_layers) for branch in ("attention", "ffn")}
    names |= {f"{i}.experts" for i in recurrent} if c.ffn == "moe" else set()
    capture = Capture(frozenset(names))
    tokens = tokens_for(c, 2, 3)
    assert torch.equal(model(tokens, n_loops=2, capture=capture).logits, model(tokens, n_loops=2).logits)
    assert set(capture.tensors) == names
    assert len(capture.tensors["h"]) == 2 and len(capture.tensors["e"]) == 1
    assert len(capture.tensors[f"{recurrent[0]}.attention"]) == 2
