"""Cross entropy of a linear head whose logits never exist whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ritornello.config import require_choice

CHUNK_NUMBERS = 2**25  # logits held at once: 128 MiB in float32


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Defines `linear_cross_entropy`: all logits at once, in float32 or better."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of logits = hidden · weightᵀ, computed in chunks of tokens.

    A float32 sum has its gradients made in the forward pass (torch's own linear_cross_entropy); otherwise chunks are
    computed again in the backward pass, in bfloat16 the faster way (experiments/LOG.md, entry 16).

    Args:
        hidden: (N, D); weight: (V, D); labels: (N,) int64, -100 where there is no target (its loss is 0).
        reduction: "none" (N,), "sum", or "mean" over the tokens that have a target.
    """
    require_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "mean":
        return linear_cross_entropy(hidden, weight, labels, reduction="sum") / (labels != -100).sum()
    size = max(1, CHUNK_NUMBERS // weight.shape[0])
    whole = hidden.shape[0] <= size
    low = hidden.dtype.itemsize < 4 or torch.is_autocast_enabled(hidden.device.type)
    if reduction == "sum" and not (whole or low):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size)
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)
    if whole:
        losses = linear_cross_entropy_ref(hidden, weight, labels)
    else:
        chunks = zip(hidden.split(size), labels.split(size), strict=True)
        losses = torch.cat([checkpoint(linear_cross_entropy_ref, h, weight, y, use_reentrant=False) for h, y in chunks])
    return losses if reduction == "none" else losses.sum()
