"""Bits per byte by number of loops, window by window, so that two curves can be compared on the same text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ritornello.config import ExitRule, require
from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from ritornello.ops.loss import linear_cross_entropy
from ritornello.train.data import NO_LABEL, Batch
from ritornello.train.step import to_device

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Per window (W,): `nats[n]` at n loops, and `n_bytes` of text. Ends of documents cost nats but have no bytes.

    With an exit rule: `exit_nats` (W,), and `exit_loops`, the mean loops used by a token that has a target.
    """

    n_bytes: NDArray[np.int64]
    nats: dict[int, Sums] = field(default_factory=dict)
    exit_nats: Sums | None = None
    exit_loops: float | None = None

    def bpb(self, nats: Sums) -> float:
        """Bits per byte of one of the rows above."""
        remedy = "give more text, or change data.validation_fraction"
        require(self.n_bytes.sum() > 0, "validation text", "no byte to predict", "longer than one token", remedy)
        return float(nats.sum() / self.n_bytes.sum() / math.log(2))

    def metrics(self) -> dict[str, float]:
        """`val_bpb_<n>` by loops, and with an exit rule `val_bpb_exit`, `val_loops_exit`."""
        found = {f"val_bpb_{n}": self.bpb(nats) for n, nats in self.nats.items()}
        if self.exit_nats is not None and self.exit_loops is not None:
            found |= {"val_bpb_exit": self.bpb(self.exit_nats), "val_loops_exit": self.exit_loops}
        return found


def gap(worse: Sums, better: Sums, n_bytes: NDArray[np.int64]) -> tuple[float, float]:
    """Difference of two bits per byte over the same windows, and its standard error (that of a ratio of means)."""
    difference, n = worse - better, len(n_bytes)
    require(n > 1, "windows", n, ">= 2 for a standard error")
    per_byte = difference.sum() / n_bytes.sum()
    residual = difference - per_byte * n_bytes
    error = math.sqrt(n / (n - 1) * float((residual**2).sum())) / n_bytes.sum()
    return float(per_byte / math.log(2)), float(error / math.log(2))


@torch.no_grad()
def evaluate(
    model: RecurrentDepthTransformer,
    batches: Iterable[Batch],
    *,
    loops: Sequence[int] = (1, 2, 4, 8, 16),
    exit: ExitRule | None = None,
    bf16: bool = False,
) -> Evaluation:
    """Score every window at each forced depth, in one pass to the deepest; with `exit`, once more with tokens stopping.

    A plain model has one prediction, the same in every row. Dropout is off.
    """
    depths = sorted(set(loops))
    n_bytes, rows, exit_rows, used, n_targets = [], [], [], 0.0, 0
    with evaluating(model), torch.autocast(model.norm.weight.device.type, torch.bfloat16, enabled=bf16):
        for batch in batches:
            device = model.norm.weight.device
            tokens, labels = to_device(batch.tokens, device), to_device(batch.labels, device)
            packed = (batch.documents != batch.documents[:, :1]).any()
            documents = to_device(batch.documents, device) if packed else None
            hidden = hidden_by_depth(model, tokens, documents, depths)
            rows.append(torch.stack([_nats(model, h, labels) for h in hidden]))
            n_bytes.append(batch.n_bytes)
            if exit is not None:
                deepest = Depth.uniform(depths[-1])
                out = model(tokens, n_loops=deepest, exit=exit, documents=documents, return_logits=False)
                exit_rows.append(_nats(model, out.hidden, labels))
                counted = labels != NO_LABEL
                used += float((out.loops_used * counted).sum())
                n_targets += int(counted.sum())
    require(bool(rows), "batches", 0, ">= 1")
    nats = torch.cat(rows, 1).cpu().double().numpy()
    result = Evaluation(np.concatenate(n_bytes), dict(zip(depths, nats, strict=True)))
    if not exit_rows:
        return result
    exit_nats = torch.cat(exit_rows).cpu().double().numpy()
    return Evaluation(result.n_bytes, result.nats, exit_nats, used / max(1, n_targets))


def hidden_by_depth(
    model: RecurrentDepthTransformer, tokens: Tensor, documents: Tensor | None, depths: Sequence[int]
) -> Iterator[Tensor]:
    """hidden (B, T, D) at each of the ascending `depths`; only one state is held at a time."""
    if model.config.is_plain:
        hidden = model(tokens, documents=documents, return_logits=False).hidden
        yield from [hidden] * len(depths)
        return
    if model.config.read_out == "mixture":  # its last weight depends on the budget
        for n in depths:
            yield model(tokens, n_loops=n, documents=documents, return_logits=False).hidden
        return
    x = model.embed(tokens)
    context = model.context(x, tokens=tokens, documents=documents)
    e = model.prelude(x, context, Passing())
    for n, state in enumerate(model.iterate(e, context, Run(Depth.uniform(depths[-1]))), start=1):
        if n in depths:
            yield model.coda(model.read_out(state), context, Passing())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block, then whatever mode it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _nats(model: RecurrentDepthTransformer, hidden: Tensor, labels: Tensor) -> Tensor:
    """(B,): the cross entropy of each window, summed over its targets."""
    losses = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, labels.flatten(), reduction="none")
    return losses.view(labels.shape).sum(1)
