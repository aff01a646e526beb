"""Who may be chosen, how many chose whom, and how evenly (DeepSeek-V3 2412.19437, §2.1.2)."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor


def limit_groups(choice: Tensor, n_groups: int, n_active: int) -> Tensor:
    """choice (..., E), with -inf outside the best `n_active` of `n_groups` groups, a group rated by its two best."""
    if n_active == n_groups:
        return choice
    grouped = choice.unflatten(-1, (n_groups, -1))
    rating = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    best = rating.topk(n_active, -1).indices
    allowed = torch.zeros_like(rating, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)


def choose(
    logits: Tensor, bias: Tensor, k: int, groups: tuple[int, int], *, sigmoid: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """indices (..., k), weights (..., k) and scores (..., E) of logits (..., E): a bias on sigmoid scores, or on the
    logits of a softmax, takes part in the choice alone (eq. 16). groups: how many there are, and how many may be chosen
    from; normalize: weights sum to 1."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = limit_groups((scores if sigmoid else logits).detach() + bias, *groups)
    indices = choice.topk(k, -1, sorted=False).indices
    weights = scores.gather(-1, indices)
    return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20) if normalize else weights, scores


def sum_tokens(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B, ...): over the tokens of each sequence."""
    return x.sum(1)


def balance_loss(
    indices: Tensor, scores: Tensor, masks: Sequence[Tensor | None], sum_tokens: Callable[[Tensor], Tensor] = sum_tokens
) -> Tensor:
    """Sequence-level balance loss (eq. 17-20), 1 at perfect balance, mean over sequences.

    indices (B, T, k): the chosen experts; scores (B, T, E); masks (B, T or 1) bool: of tokens that count, None: all.
    sum_tokens: where a sequence has more tokens than these.
    """
    mask = _counted(scores[..., :1], masks)
    n_tokens = sum_tokens(mask).clamp(min=1)
    chosen = torch.zeros_like(scores).scatter(-1, indices, 1.0) * mask
    frequency = sum_tokens(chosen) * (scores.shape[-1] / indices.shape[-1]) / n_tokens
    probability = sum_tokens(scores / scores.sum(-1, keepdim=True) * mask) / n_tokens
    return (frequency * probability).sum() / max(1, len(scores))


Chosen = tuple[int | Tensor, list[Tensor], Sequence[Tensor | None]]  # of a pass, see `expert_load`


class Routing:
    """What the tokens chose, pass by pass; counted when someone asks."""

    def __init__(self, n_loops: int, n_layers: int, n_experts: int) -> None:
        self.shape = (n_loops, n_layers, n_experts)
        self._seen: list[Chosen] = []

    def add(self, loop: int | Tensor, chosen: list[Tensor], masks: Sequence[Tensor | None]) -> None:
        """See `expert_load`; a mask that is None keeps all."""
        self._seen.append((loop, chosen, masks))

    @cached_property
    def load(self) -> Tensor:
        """(n_loops, R, E) int64: the tokens each expert got, by loop index and recurrent layer."""
        return expert_load(self.shape, self._seen)


def expert_load(shape: tuple[int, int, int], seen: list[Chosen]) -> Tensor:
    """How many tokens each expert got: int64 of `shape` (loops, layers, E).

    seen: by pass, its loop index (an int, or (B, 1 or T); the last row takes those beyond), the experts (B, T, k) that
    each layer's tokens chose, and masks (B, T or 1) of the tokens that count.
    """
    n_loops, n_layers, n_experts = shape
    load = torch.zeros(n_loops * n_layers * n_experts, dtype=torch.int64, device=seen[0][1][0].device)
    for loop, chosen, masks in seen:
        row = min(loop, n_loops - 1) if isinstance(loop, int) else loop.clamp(max=n_loops - 1)[..., None]
        for layer, indices in enumerate(chosen):
            address = (row * n_layers + layer) * n_experts + indices
            load.scatter_add_(0, address.flatten(), _counted(address, masks).flatten())
    return load.view(shape)


def _counted(like: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """1 for tokens that every mask (B, T or 1) keeps, else 0, in the shape and type of `like` (B, T, ...)."""
    counted = torch.ones_like(like)
    for mask in masks:
        counted = counted if mask is None else counted * mask[..., None]
    return counted
