"""From logits to the next token. Randomness is addressed by (seed, index of the token), so company changes nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ritornello.config import require_int
from ritornello.limits import check
from ritornello.ops.noise import fold, uniform

NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest token. Of the tempered distribution `top_k` keeps the k likeliest and what ties
    with the last, `top_p` the fewest of these that sum to p of them (nucleus, 1904.09751), `min_p` those of at least
    that share of the likeliest's probability (2407.01082). None: no limit.

    Before all that logits are changed: those of tokens in prompt or text so far by `repetition_penalty`, which divides
    what is positive and multiplies what is negative (CTRL, 1909.05858); of tokens in the text by `frequency_penalty`
    for each time and `presence_penalty` once; and by `logit_bias`, pairs of a token and what is added."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def reads_text(self) -> bool:
        """Whether logits are changed first, see `adjusted`."""
        s = self
        return bool(s.repetition_penalty != 1 or s.frequency_penalty or s.presence_penalty or s.logit_bias)

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", tuple((token, bias) for token, bias in self.logit_bias))
        for name in "temperature seed repetition_penalty frequency_penalty presence_penalty".split():
            check(name, getattr(self, name))
        for token, bias in self.logit_bias:
            require_int("logit_bias", token, 0)
            check("logit_bias", bias)
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None:
                check(name, getattr(self, name))


def adjusted(logits: Tensor, sampling: Sampling, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """The logits (V,) that follow `prompt` and `text`, changed by penalties and biases."""
    s, device = sampling, logits.device
    seen_ids = [token for token in {*prompt, *text} if token < len(logits)] if s.repetition_penalty != 1 else []
    if seen_ids:
        seen = torch.tensor(seen_ids, device=device)
        old = logits[seen]
        logits = logits.index_copy(
            0, seen, torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
        )
    changes = dict(s.logit_bias)
    if s.frequency_penalty or s.presence_penalty:
        for token, n in Counter(text).items():
            changes[token] = changes.get(token, 0.0) - n * s.frequency_penalty - s.presence_penalty
    if changes:
        bias = torch.tensor(list(changes.values()), dtype=logits.dtype, device=device)
        logits = logits.index_add(0, torch.tensor(list(changes), device=device), bias)
    return logits


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
        beyond = (before >= sampling.top_p) & (before > 0)  # the likeliest stays, however little is asked for
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    if sampling.min_p is not None:
        shares = logits.softmax(-1)
        logits = logits.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)


def sample(logits: Tensor, sampling: Sampling, *, index: int) -> Tensor:
    """The token ids (B,) drawn from logits (B, V) as the `index`-th of each text; row i draws with seed + i.
    NO_TOKEN where the largest logit is no finite number."""
    seeds = sampling.seed + torch.arange(len(logits), device=logits.device)
    return draw(logits, sampling, seeds, torch.full_like(seeds, index))


def draw(logits: Tensor, sampling: Sampling, seeds: Tensor, index: Tensor) -> Tensor:
    """Like `sample`, with a seed and an index (B,) for each row instead of the sampling's."""
    lost = ~logits.amax(-1).isfinite()
    return _drawn(logits, sampling, seeds, index).masked_fill(lost, NO_TOKEN)


def _drawn(logits: Tensor, sampling: Sampling, seeds: Tensor, index: Tensor) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    threshold = uniform(fold(fold(seeds, 0), index))[:, None]
    shares = probabilities(logits, sampling)
    cumulative = shares.cumsum(-1).where(shares > 0, 0)  # no rounding may let a token in that was left out
    reached = cumulative >= threshold.to(shares.dtype) * cumulative.amax(-1, keepdim=True)
    return reached.to(torch.uint8).argmax(-1)  # the first that is reached


def likeliest(logits: Tensor, tokens: Sequence[int], n: int) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """By row of logits (m, V): the log-probability of its token, and the n likeliest with theirs."""
    shares = log_shares(logits)
    own = shares.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    return list(zip(own, largest(shares, n), strict=True))


def log_shares(logits: Tensor) -> Tensor:
    """Log-probabilities (..., V), in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def largest(shares: Tensor, n: int) -> list[tuple[tuple[int, float], ...]]:
    """By row of (m, V): the n ids with the most, each with what it has."""
    best = shares.topk(n)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]
