"""Cross entropy of a linear head whose logits never exist whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ritornello.config import require_choice

CHUNK_NUMBERS = 2**24  # logits held at once: 64 MiB in float32


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Defines `linear_cross_entropy`: all logits at once, in float32 or better."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of logits = hidden · weightᵀ, computed and recomputed in chunks of tokens.

    Args:
        hidden: (N, D); weight: (V, D); labels: (N,) int64, -100 where there is no target (its loss is 0).
        reduction: "none" (N,), "sum", or "mean" over the tokens that have a target.
    """
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    size = max(1, CHUNK_NUMBERS // weight.shape[0])
    if hidden.shape[0] <= size:
        losses = linear_cross_entropy_ref(hidden, weight, labels)
    else:
        chunks = zip(hidden.split(size), labels.split(size), strict=True)
        losses = torch.cat([checkpoint(linear_cross_entropy_ref, h, weight, y, use_reentrant=False) for h, y in chunks])
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (labels != -100).sum()
