"""Cross entropy of a linear head whose logits never exist whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ritornello.accounting import CACHED_NUMBERS, CHUNK_NUMBERS
from ritornello.config import require_choice
from ritornello.ops.linear import lowered


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Defines `linear_cross_entropy`: all logits at once, in float32 or better."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of logits = hidden · weightᵀ, computed in chunks of tokens.

    A sum or mean has its gradients made in the forward pass: one backward pass through it, no second derivatives.
    Single losses are computed again in the backward pass, where there is more than one chunk.

    Args:
        hidden: (N, D); weight: (V, D); labels: (N,) int64, -100 where there is no target (its loss is 0).
        reduction: "none" (N,), "sum", or "mean" over the tokens that have a target.
    """
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "mean":
        return linear_cross_entropy(hidden, weight, labels, reduction="sum") / (labels != -100).sum()
    if reduction == "sum" and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _Sum.apply(hidden, weight, labels)
    size = max(1, CHUNK_NUMBERS // weight.shape[0])
    if hidden.shape[0] <= size:
        losses = linear_cross_entropy_ref(hidden, weight, labels)
    else:
        chunks = zip(hidden.split(size), labels.split(size), strict=True)
        losses = torch.cat([checkpoint(linear_cross_entropy_ref, h, weight, y, use_reentrant=False) for h, y in chunks])
    return losses if reduction == "none" else losses.sum()


class _Sum(torch.autograd.Function):
    """The sum of the losses and its gradients in one pass: the gradient of the logits takes their place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        x, w = lowered(hidden), lowered(weight)
        precise = torch.promote_types(x.dtype, torch.float32)
        total, d_weight, d_hidden = x.new_zeros((), dtype=precise), None, torch.empty_like(x)
        size = max(1, CHUNK_NUMBERS // w.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), size):
                rows = slice(i, i + size)
                scores = F.linear(x[rows], w)
                total += _to_gradient(scores, labels[rows])
                torch.mm(scores, w, out=d_hidden[rows])
                if ctx.needs_input_grad[1]:
                    part = scores.t() @ x[rows]
                    d_weight = part if d_weight is None else d_weight.to(precise).add_(part)
                    del part
                del scores  # or the next chunk's would be made beside them
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(w)  # of no tokens
        ctx.gradients = d_hidden.to(hidden.dtype), None if d_weight is None else d_weight.to(weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:  # pyrefly: ignore
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, (None, None)
        assert d_hidden is not None, "the gradients of a sum of losses can be had once"
        return d_hidden.mul_(grads[0]), None if d_weight is None else d_weight.mul_(grads[0]), None


def _to_gradient(scores: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of scores (n, V), which become their gradient. In parts that stay in a CPU's cache."""
    precise = torch.promote_types(scores.dtype, torch.float32)
    n = max(1, CACHED_NUMBERS // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    total = scores.new_zeros((), dtype=precise)
    for part, target in zip(scores.split(n), labels.split(n), strict=True):
        real = (target != -100)[:, None]
        place = target[:, None].where(real, 0)  # any other negative label is an error, as in cross_entropy
        p = part.to(precise).log_softmax(-1)
        total -= p.gather(1, place).mul_(real).sum()
        part.copy_(p.exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=precise)).mul_(real))
    return total
