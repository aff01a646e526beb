"""What happens inside the loop: size of the state, gradient by loop, how strongly one loop amplifies a small change."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ritornello.model.cache import Passing
from ritornello.model.context import Context
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.train.data import NO_LABEL, Batch

POWER_STEPS = 30  # of the power iteration; the growth of its second half is what counts


@dataclass(frozen=True)
class Dynamics:
    """rho: the largest entry of A (`lti`), or a bound on the linear part's norm. state: RMS(h) / RMS(e) after the last
    loop. radius: spectral radius of the last loop's Jacobian ∂h'/∂h. gradient: ‖∂loss/∂h‖ after each loop."""

    rho: float
    state: float
    radius: float
    gradient: tuple[float, ...]


def observe(model: RecurrentDepthTransformer, batch: Batch, *, n_loops: int) -> Dynamics:
    """On the first two problems of a batch. The model is left as it was, its gradients included."""
    tokens, labels = torch.from_numpy(batch.tokens[:2]), torch.from_numpy(batch.labels[:2])
    with torch.enable_grad():
        x = model.embed(tokens).detach()
        context = model.context(x, tokens=tokens)
        e = model.prelude(x, context, Passing()).detach()
        states = [state.h for state in model.iterate(e.requires_grad_(), context, Run(Depth.uniform(n_loops)))]
        hidden = model.coda(model.carry.mean(states[-1]), context, Passing())
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)
        gradients = torch.autograd.grad(loss, states)
        radius = spectral_radius(model, states[-1].detach(), e.detach(), context, n_loops - 1)
    return Dynamics(
        rho=model.injection.rho(),
        state=(states[-1].norm() / e.norm()).item(),
        radius=radius,
        gradient=tuple(gradient.norm().item() for gradient in gradients),
    )


def spectral_radius(
    model: RecurrentDepthTransformer, h: Tensor, e: Tensor, context: Context, loop: int, *, seed: int = 0
) -> float:
    """Of J = ∂loop_once(h)/∂h, all tokens at once: power iteration with Jᵀ, which has the same eigenvalues.

    The growth factor of a random vector; with a complex leading pair it oscillates, so it is averaged in the logarithm.
    """
    h = h.requires_grad_()
    after, _ = model.loop_once(h, e, loop, context, Passing())
    v = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed), dtype=h.dtype)
    growth = []
    for _ in range(POWER_STEPS):
        v = v / v.norm().clamp(min=1e-30)
        (v,) = torch.autograd.grad(after, h, v, retain_graph=True)
        growth.append(v.norm().clamp(min=1e-30).log())
    return torch.stack(growth[POWER_STEPS // 2 :]).mean().exp().item()


@torch.no_grad()
def largest_state(model: RecurrentDepthTransformer, batch: Batch, *, depths: tuple[int, ...]) -> dict[int, float]:
    """{number of loops: the largest ‖h‖ of any token after so many}, on the first two problems."""
    tokens = torch.from_numpy(batch.tokens[:2])
    x = model.embed(tokens)
    context = model.context(x, tokens=tokens)
    e = model.prelude(x, context, Passing())
    states = model.iterate(e, context, Run(Depth.uniform(max(depths))))
    return {n: state.h.norm(dim=-1).max().item() for n, state in enumerate(states, start=1) if n in depths}
