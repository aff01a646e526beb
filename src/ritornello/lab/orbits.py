"""Where the loop ends up, and whether it must stay there: attracting orbits, found and bounded numerically.

Let F be one loop of a model on one problem, B the ball of radius r around a state c. If F^m moves c by d, is Lipschitz
on B with a factor L < 1, and d + L·r <= r, then F^m maps B into itself and contracts (Banach): there is one orbit of a
period that divides m, and whoever enters B runs towards it for ever. If moreover no phase of that orbit can leave its
answer within the distances to which F^j, j < m, takes B, then all answers of all further loops are known.

Causality makes this a statement about each token apart: the state of the tokens up to and with it is a system of its
own. Distances are Euclidean, over these tokens.

What is a bound here and what an estimate: d, the read-out's bound and the sums are computed as they stand, in float64.
L is estimated, at sampled points of B: the largest ‖DF^j·v‖ over PROBES Gaussian v, whose mean square is the Frobenius
norm's, times SAFETY. Were the norm the same all over B, one above SAFETY times the largest of 8 would have at most 1
chance in 2,000 (rank one, the worst case); but each probe is taken at another point, and there are many tokens and
phases. Rounding: twice the largest difference of a loop in float32 and in float64 that was met on the orbit, carried on
by the factors from the first phase, which on a cycle is approximate. So a certificate is a numerical one, no proof.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ritornello.config import require
from ritornello.model.cache import Passing
from ritornello.model.carry import initial_state
from ritornello.model.rdt import RecurrentDepthTransformer

START = 1152  # loops before an orbit is looked for: a multiple of all LENGTHS
LENGTHS = (24, 48, 96)  # m
SIZES = (1e-4, 3e-4, 1e-3)  # of balls: the radius over the square root of the state's numbers
PROBES = 8
SAFETY = 2.0
FACTOR = 0.9  # L at most
PHASES_ROUNDED = 24  # at which rounding is measured


class Loops:
    """F on problems `tokens` (B, T) or (B, T, C): states (B, T, D) -> the next ones, in the model's precision.

    Where a model has tables by loop, F is what it does from its last one on.

    Raises:
        ValueError: a model with a coda or with several streams, whose read-out is not each token's own.
    """

    def __init__(self, model: RecurrentDepthTransformer, tokens: Tensor) -> None:
        c = model.config
        simple = not c.is_plain and c.n_coda_layers == 0 and c.carry_streams == 1
        require(simple, "model", c.n_coda_layers, "a looped one without a coda, of one stream")
        self.model, x = model, model.embed(tokens)
        self.context = model.context(x, tokens=tokens)
        self.e = model.prelude(x, self.context, Passing())

    def first(self) -> Tensor:
        c = self.model.config
        return initial_state(c.initial_state, self.e, self.context, c.noise_std)

    def __call__(self, h: Tensor, loop: int | None = None) -> Tensor:
        """`loop`: its index; None: any beyond training's."""
        last = self.model.config.n_loops - 1
        return self.model.loop_once(h, self.e, last if loop is None else min(loop, last), self.context, Passing())[0]

    def read(self, h: Tensor) -> Tensor:
        """Logits (B, T, V)"""
        return self.model.logits(self.model.norm(h))


@dataclass(frozen=True)
class Run:
    """answers (n + 1, B, T): after each number of loops. apart (n + 1, B, T): distance to the centre."""

    answers: NDArray[np.int16]
    apart: NDArray[np.float32]


@dataclass(frozen=True)
class Certificates:
    """Of the tokens up to and with each one, (B, T).

    length: m, 0 where nothing is certified. period: of the orbit, 0 where none was found. radius: of the largest ball,
    per number as in SIZES, 0 where nothing is certified. factor: L, NaN likewise.
    centre (B, T, D): the state after START loops, in float64. answers (LENGTHS[-1], B, T): at each phase after START.
    """

    length: NDArray[np.int64]
    period: NDArray[np.int64]
    radius: NDArray[np.float64]
    factor: NDArray[np.float64]
    centre: Tensor
    answers: NDArray[np.int16]

    @property
    def certified(self) -> NDArray[np.bool_]:
        return self.length > 0

    def entered(self, run: Run) -> NDArray[np.int64]:
        """The number of loops from which on `run` is known for ever; -1: it never came into the ball, or there is none.

        Seen at multiples of the period alone, at which the orbit is at its centre.
        """
        n, width = run.apart.shape[0] - 1, self.centre.shape[-1]
        loops = np.arange(min(n, START) + 1)[:, None, None]
        inside = run.apart[: len(loops)] <= reach(self.radius, width)
        inside &= (loops % np.maximum(self.period, 1) == 0) & self.certified & (self.period > 0)
        return np.where(inside.any(axis=0), inside.argmax(axis=0), -1)


def reach(size: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The radius of a ball (B, T) over all numbers of the tokens up to and with each."""
    return size * np.sqrt(width * np.arange(1, size.shape[-1] + 1))


def prefix_norm(x: Tensor) -> Tensor:
    """(..., T, D) -> (..., T): the norm of the tokens up to and with each one."""
    return x.double().pow(2).sum(-1).cumsum(-1).sqrt()


@torch.no_grad()
def run(model: RecurrentDepthTransformer, tokens: Tensor, n_loops: int, centre: Tensor) -> Run:
    """`n_loops` loops as the model runs them."""
    loops = Loops(model, tokens)
    h, answers, apart = loops.first(), [], []
    for i in range(n_loops + 1):
        h = loops(h, i - 1) if i else h
        answers.append(loops.read(h).argmax(-1).to(torch.int16).numpy())
        apart.append(prefix_norm(h.double() - centre).float().numpy())
    return Run(np.stack(answers), np.stack(apart))


@torch.no_grad()
def certify(model: RecurrentDepthTransformer, tokens: Tensor) -> Certificates:
    """The largest ball, and the shortest m, with which all holds that is asked of it. The model is left as it was."""
    exact = Loops(deepcopy(model).double(), tokens)
    h = exact.first()
    for i in range(START):
        h = exact(h, i)
    orbit = [h]
    for _ in range(LENGTHS[-1]):
        orbit.append(exact(orbit[-1]))
    room = torch.stack([_room(exact, x) for x in orbit[:-1]])
    moved = torch.stack([prefix_norm(x - h) for x in orbit])
    rounding = _rounding(Loops(model, tokens), orbit)
    answers = torch.stack([exact.read(x).argmax(-1) for x in orbit[:-1]]).to(torch.int16).numpy()

    shape, width = moved.shape[1:], h.shape[-1]
    length, period = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    radius, factor = torch.zeros(shape, dtype=torch.float64), torch.full(shape, torch.nan, dtype=torch.float64)
    along: Tensor | None = None
    for size in SIZES:
        growth, along = _growth(model, tokens, h, size, LENGTHS[-1], along)
        r = torch.from_numpy(reach(np.full(shape, size), width))
        error = torch.cat((torch.zeros(1, *shape), growth[:-1].cumsum(0))) * rounding
        strays = growth * r + error  # (m + 1, B, T): how far from the orbit at each phase
        for m in reversed(LENGTHS):  # the shortest that does comes last
            answered = (strays[:m] < room[:m]).all(0)
            ok = answered & (moved[m] + strays[m] <= r) & (growth[m] <= FACTOR)
            length[ok], radius[ok], factor[ok] = m, size, growth[m][ok]
            near = moved[m] / (1 - growth[m]).clamp(min=1e-9)  # from the centre to the orbit itself
            for k in (k for k in range(m, 0, -1) if m % k == 0):
                period[ok & (moved[k] + growth[k] * near <= r)] = k
    found = (x.numpy() for x in (length, period, radius, factor))
    return Certificates(*found, centre=h, answers=answers)


def _room(loops: Loops, h: Tensor) -> Tensor:
    """(B, T): how far a token's state may stray while its answer must stay.

    A logit's lead over another is (w − w')·norm(x), and norm's derivative is at most weight / RMS(x): the lead lasts
    while lead > ‖(w − w')·weight‖ · d / (RMS(x) − d / √D).
    """
    weight = loops.model.head_weight.double() * loops.model.norm.weight.double()
    slope = torch.cdist(weight, weight)  # (V, V)
    logits = loops.read(h)
    best = logits.argmax(-1, keepdim=True)
    lead = logits.gather(-1, best) - logits
    rms = h.pow(2).mean(-1, keepdim=True).sqrt()
    room = lead * rms / (slope[best[..., 0]] + lead / h.shape[-1] ** 0.5)
    return room.scatter(-1, best, torch.inf).amin(-1)


def _rounding(rounded: Loops, orbit: Sequence[Tensor]) -> Tensor:
    """(B, T): twice the largest difference of one loop in the model's precision and in float64."""
    dtype = rounded.e.dtype
    some = range(0, len(orbit) - 1, max(1, (len(orbit) - 1) // PHASES_ROUNDED))
    # a state that is itself rounded is the same in both
    met = [prefix_norm(rounded(orbit[i].to(dtype)).double() - orbit[i + 1]) for i in some]
    return 2 * torch.stack(met).amax(0)


@torch.no_grad()
def _growth(
    model: RecurrentDepthTransformer, tokens: Tensor, centre: Tensor, size: float, n: int, along: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(n + 1, B, T): estimates of ‖DF^j‖ on the ball of `size`, j = 0 … n; and (PROBES, B, T, D), the last tangents.

    Every probe has a point of its own: on the ball's sphere in a random direction, or, for half of them, in that of
    `along`, the tangents that a smaller ball has grown.
    """
    B, T, D = centre.shape
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(PROBES, B, T, D, generator=generator)  # noqa: E731
    away, v = draw(), draw()
    if along is not None:
        unit = along / along.pow(2).mean((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)
        away[::2] = unit[::2]
    loops = Loops(model, tokens.repeat(PROBES, *[1] * (tokens.ndim - 1)))
    h, v = ((x.flatten(0, 1).to(loops.e.dtype)) for x in (centre + size * away, v))
    found = [torch.ones(B, T, dtype=torch.float64)]
    # The fused kernels have no forward derivative; torch warns of its own when it is first asked for one.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(n):
            h, v = jvp(loops.__call__, (h,), (v,))[:2]
            found.append(SAFETY * prefix_norm(v).unflatten(0, (PROBES, B)).amax(0))
    return torch.stack(found), v.unflatten(0, (PROBES, B))


@torch.no_grad()
def kicked(model: RecurrentDepthTransformer, tokens: Tensor, found: Certificates, size: float) -> NDArray[np.bool_]:
    """(B, T): whether an answer is the old one LENGTHS[-1] loops after noise of RMS `size` was added to all tokens'
    states at the centre."""
    loops = Loops(model, tokens)
    noise = torch.randn(found.centre.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = (found.centre + size * noise).to(loops.e.dtype)
    for _ in range(len(found.answers)):
        h = loops(h)
    return loops.read(h).argmax(-1).numpy() == found.answers[0]
