"""From logits to the next token. Randomness is addressed by (seed, index of the token), so company changes nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ritornello.config import require_float, require_int
from ritornello.ops.noise import fold, uniform

NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest token. Of the tempered distribution `top_k` keeps the k likeliest and what ties
    with the last, `top_p` the fewest of these that sum to p of them (nucleus, 1904.09751), `min_p` those of at least
    that share of the likeliest's probability (2407.01082). None: no limit."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_float("temperature", self.temperature, 0)
        require_int("seed", self.seed, 0, 2**63 - 1)
        if self.top_k is not None:
            require_int("top_k", self.top_k, 1)
        if self.top_p is not None:
            require_float("top_p", self.top_p, 0, 1, open_low=True)
        if self.min_p is not None:
            require_float("min_p", self.min_p, 0, 1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) -> (B, V), the distribution that is sampled. temperature > 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)  # less would divide by 0
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:  # 1 keeps all, though rounded shares may sum to it early
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    if sampling.min_p is not None:
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)


def sample(logits: Tensor, sampling: Sampling, *, index: int) -> Tensor:
    """The token ids (B,) drawn from logits (B, V) as the `index`-th of each text; row i draws with seed + i.
    NO_TOKEN where logits are not numbers."""
    lost = logits.isnan().any(-1)
    return _drawn(logits, sampling, index).masked_fill(lost, NO_TOKEN)


def _drawn(logits: Tensor, sampling: Sampling, index: int) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    seeds = sampling.seed + torch.arange(len(logits), device=logits.device)
    threshold = uniform(fold(fold(seeds, 0), index))[:, None]
    shares = probabilities(logits, sampling)
    cumulative = shares.cumsum(-1).where(shares > 0, 0)  # no rounding may let a token in that was left out
    reached = cumulative >= threshold.to(shares.dtype) * cumulative.amax(-1, keepdim=True)
    return reached.to(torch.uint8).argmax(-1)  # the first that is reached
