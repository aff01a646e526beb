"""What a training step minimises: named terms, each with its weight in the recipe.

A term is this micro-batch's share of a mean over the global batch, so that micro-batches add up to one big batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ritornello.accounting import PROBE_STRIDE
from ritornello.config import ModelConfig, TrainConfig, require
from ritornello.model.cache import Passing
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import LoopState, Output
from ritornello.ops.loss import CHUNK_NUMBERS, linear_cross_entropy
from ritornello.ops.noise import Key
from ritornello.train.data import NO_LABEL


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What this micro-batch is of the global batch, from numbers that the host knows."""

    n_targets: int  # of the global batch
    tokens: float  # share of the tokens that aren't padding
    loops: float  # share of the loops over sequences that have a gradient
    probe: int = 0  # which state the probe is fitted on this step, counted from the last one
    probe_scale: float = 1.0  # 1 / (probability that a state is drawn), relative to the mean number of states


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One micro-batch's forward pass: `out` of the model; labels, documents, tokens (B, T)."""

    model: RecurrentDepthTransformer
    train: TrainConfig
    labels: Tensor
    documents: Tensor | None
    key: Key
    out: Output
    shares: Shares
    tokens: Tensor | None = None  # where layers read them

    @property
    def trajectory(self) -> list[LoopState]:
        assert self.out.trajectory is not None
        return self.out.trajectory


def next_token(x: Inputs) -> Tensor:
    """Cross entropy in nats of the read-out state."""
    hidden, labels = x.out.hidden.flatten(0, 1), x.labels.flatten()
    return linear_cross_entropy(hidden, x.model.head_weight, labels, reduction="sum") / x.shares.n_targets


def balance(x: Inputs) -> Tensor:
    """The sequence-level load balance of the experts, 1 at best (2412.19437, eq. 17-20)."""
    return x.out.aux["balance"] * x.shares.loops


def ponder(x: Inputs) -> Tensor:
    """Loops used plus remainder, by token (Graves 1603.08983, eq. 13)."""
    return x.out.aux["ponder"] * x.shares.tokens


def expected(x: Inputs) -> Tensor:
    """Σ_t p_t · CE_t over the loops t of each token (PonderNet 2107.05407, eq. 5; Ouro, stage 1)."""
    context = x.model.context(x.out.hidden, tokens=x.tokens, documents=x.documents, key=x.key)
    total = x.labels.new_zeros((), dtype=torch.float32)
    for state in x.trajectory:
        hidden = x.model.coda(x.model.carry.mean(state.h), context.select(state.rows), Passing())
        labels = x.labels[state.rows].flatten()
        losses = linear_cross_entropy(hidden.flatten(0, 1), x.model.head_weight, labels, reduction="none")
        total = total + (_weight(state).flatten() * losses).sum()
    return total / x.shares.n_targets


def prior(x: Inputs) -> Tensor:
    """The exit distribution's negative entropy (Ouro), or KL(p ‖ geometric) (PonderNet 2107.05407, eq. 5).

    The geometric distribution is cut at each token's number of loops n and normalised there.
    """
    total = x.labels.new_zeros((), dtype=torch.float32)
    for state in x.trajectory:
        p = _weight(state)
        surprise = p.clamp(min=1e-12).log()
        if x.train.halting_prior == "geometric":
            n_loops = x.out.loops_used[state.rows]
            surprise = surprise - _log_geometric(state.loop, n_loops, x.train.halting_prior_rate)
        total = total + (p * surprise * (x.labels[state.rows] != NO_LABEL)).sum()
    return total / x.shares.n_targets


def probe(x: Inputs) -> Tensor:
    """KL(final prediction ‖ the exit probe's) of one state of each sequence, all else detached (2303.08112, eq. 6).

    A step reads every PROBE_STRIDE-th position, the next step those beside them: two more heads would not be cheap.
    Every state of every token has equal weight in expectation over steps.
    """
    place = len(x.trajectory) - 1 - x.shares.probe
    if place < 0 or x.model.probe is None:
        return x.labels.new_zeros((), dtype=torch.float32)
    state = x.trajectory[place]
    counted = x.labels[state.rows] != NO_LABEL
    if state.running is not None:
        counted = counted & state.running
    stride = min(PROBE_STRIDE, counted.shape[1])
    some = slice(x.key.step % stride, None, stride)
    hidden = x.model.probe(x.model.carry.mean(state.h)[:, some].detach())
    final = x.out.hidden[state.rows][:, some].detach()
    divergence = linear_kl(final.flatten(0, 1), hidden.flatten(0, 1), x.model.head_weight.detach())
    return (divergence * counted[:, some].flatten()).sum() * (stride * x.shares.probe_scale / x.shares.n_targets)


LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "next_token": next_token,
    "expected": expected,
    "prior": prior,
    "balance": balance,
    "ponder": ponder,
    "probe": probe,
}


def weights(model: ModelConfig, train: TrainConfig) -> dict[str, float]:
    """The terms of a run by name. `next_token` is always measured, with weight 0 where another term takes its place."""
    joint = train.halting_loss == "expected" or (model.halting == "act" and model.read_out == "last")
    require(
        not joint or model.read_out == "last",
        "train.halting_loss",
        train.halting_loss,
        "'frozen' with the read-out 'mixture'",
        "a mixture is trained through its one prediction, the expected loss through one prediction a loop",
    )
    require(
        joint or model.halting != "state_gate",
        "train.halting_loss",
        train.halting_loss,
        "'expected' with halting 'state_gate'",
        "only 'gate' is fitted when the rest is trained",
    )
    table = {"next_token": 0.0 if joint else 1.0}
    if joint:
        table["expected"] = 1.0
    if joint and model.halting in ("gate", "state_gate"):
        table["prior"] = train.halting_prior_weight
    if model.halting == "act":
        table["ponder"] = train.ponder_weight
    if model.needs_probe:
        table["probe"] = train.probe_weight
    if model.ffn == "moe" and not model.is_plain:
        table["balance"] = train.balance_weight
    return {name: weight for name, weight in table.items() if weight or name == "next_token"}


def needs_weights(table: dict[str, float]) -> bool:
    """Whether a term reads what the halting head makes of each loop."""
    return bool({"expected", "prior"} & set(table))


def needs_trajectory(table: dict[str, float]) -> bool:
    return needs_weights(table) or "probe" in table


def total_loss(x: Inputs, table: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum to differentiate, and each unweighted term, detached."""
    total, terms = x.labels.new_zeros((), dtype=torch.float32), {}
    for name, weight in table.items():
        with torch.set_grad_enabled(weight != 0):
            term = LOSSES[name](x)
        terms[name] = term.detach()
        total = total + weight * term if weight else total
    return total, terms


def linear_kl(target: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """KL(softmax(target · weightᵀ) ‖ softmax(hidden · weightᵀ)) in nats, (N,), for (N, D), (N, D), (V, D).

    In chunks of tokens, so that a large vocabulary's logits never exist whole.
    """
    size = max(1, CHUNK_NUMBERS // weight.shape[0])
    if len(target) <= size:
        return _linear_kl(target, hidden, weight)
    chunks = zip(target.split(size), hidden.split(size), strict=True)
    return torch.cat([checkpoint(_linear_kl, t, h, weight, use_reentrant=False) for t, h in chunks])


def _linear_kl(target: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    p, q = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        for logits in (F.linear(target.to(weight.dtype), weight), F.linear(hidden.to(weight.dtype), weight))
    )
    return (p.exp() * (p - q)).sum(-1)


def _weight(state: LoopState) -> Tensor:
    """(m, T): the probability that a token stops at this loop."""
    assert state.halt is not None
    return state.halt.weight


def _log_geometric(loop: int | Tensor, n_loops: Tensor, rate: float) -> Tensor:
    """log of rate · (1 − rate)^loop / (1 − (1 − rate)^n_loops)."""
    keep = torch.tensor(1 - rate, dtype=torch.float32, device=n_loops.device)
    return loop * keep.log() + torch.log(1 - keep) - torch.log1p(-(keep**n_loops))
