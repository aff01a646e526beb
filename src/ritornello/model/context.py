"""What every layer of one forward pass shares: where its tokens are, what they may see, which randomness is theirs."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ritornello.config import ModelConfig, require
from ritornello.ops.attention import rotary_tables, visible
from ritornello.ops.noise import Key
from ritornello.ops.subset import Subset

if TYPE_CHECKING:
    from ritornello.model.cache import Cache

Loop = int | Tensor  # a loop index: one for all tokens, or (B, 1) by sequence, or (B, T) by token


@dataclass
class Capture:
    """Collects the named tensors of a forward pass: `tensors[name]` is a list of (loop, tensor). Free when absent.

    Names: `e`, `h` (after each loop), `<layer>.attention`, `<layer>.ffn` (branch outputs), `<layer>.experts` (indices).
    """

    names: frozenset[str]
    tensors: dict[str, list[tuple[Loop, Tensor]]] = field(default_factory=dict)

    def add(self, name: str, loop: Loop, tensor: Tensor) -> None:
        if name in self.names:
            self.tensors.setdefault(name, []).append((loop, tensor))


@dataclass(frozen=True)
class Context:
    """positions, documents (B, T); mask (B or 1, 1, T, S) bool or None: causal with T = S, or T = 1 seeing all."""

    positions: Tensor
    documents: Tensor | None
    mask: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    key: Key | None = None
    capture: Capture | None = None
    tokens: Tensor | None = None  # (B, T), where layers read the ids themselves
    some: Subset | None = None  # these are some tokens of a larger batch
    exact: bool = False  # no token's numbers may depend on which others are here

    def select(self, rows: Tensor | slice) -> "Context":
        """The same for some rows of the batch."""
        pick = lambda x: x if x is None or x.shape[0] == 1 else x[rows]  # noqa: E731
        return replace(
            self,
            positions=self.positions[rows],
            documents=pick(self.documents),
            mask=pick(self.mask),
            rope=None if self.rope is None else (self.rope[0][rows], self.rope[1][rows]),
            key=None if self.key is None else self.key.select(rows),
            tokens=pick(self.tokens),
        )

    def take(self, some: Subset) -> "Context":
        """The same for some tokens, which see what they saw among all."""
        if some.tokens.shape[1] == some.shape[1]:  # whole rows, whose causal mask is still a flag
            return replace(self.select(some.rows), some=some)
        rope = None if self.rope is None else (some.take(self.rope[0]), some.take(self.rope[1]))
        key = None if self.key is None else self.key.select(some.rows)
        mask, tokens, documents = some.seen(self.mask), some.take(self.tokens), some.take(self.documents)
        return Context(some.take(self.positions), documents, mask, rope, key, self.capture, tokens, some)

    def real(self) -> Tensor | None:
        """(B, T) bool, False at padding; None: no padding."""
        return None if self.documents is None else self.documents >= 0


def build_context(
    config: ModelConfig,
    x: Tensor,
    *,
    tokens: Tensor | None = None,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    cache: "Cache | None" = None,
    key: Key | None = None,
    capture: Capture | None = None,
) -> Context:
    """What the layers need to know about the tokens embedded as x (B, T, D), which follow those in `cache`.

    Value embeddings need their ids, `tokens` (B, T). A token's position is the number of tokens before it, in its own
    document where documents are in use.
    """
    shape, n_past, past = x.shape[:2], 0, None
    tokens = tokens if (reads := bool(config.value_embeddings)) else None
    given = {"tokens": tokens, "positions": positions, "documents": documents}
    for name, tensor in {**given, "key.sequences": key.sequences if key else None}.items():
        wanted, axes = (shape[:1], "(B,)") if name == "key.sequences" else (shape, "(B, T)")
        if tensor is not None:
            ok = isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.dtype == torch.bool)
            require(ok, name, getattr(tensor, "dtype", type(tensor).__name__), "a tensor of integers")
            require(tensor.shape == wanted, name, tuple(tensor.shape), f"of shape {axes} = {tuple(wanted)}")
    require(not reads or tokens is not None, "tokens", None, "given, and not inputs_embeds, with value_embeddings")
    if cache is not None:
        documents = cache.begin(config, (x.shape[0], x.shape[1]), documents)
        n_past, past = cache.length, cache.documents
    mask = visible(shape[1], n_past, documents, past, x.device)
    if positions is None and documents is not None and mask is not None:
        positions = mask.sum(-1)[:, 0] - 1
    elif positions is None:
        positions = torch.arange(n_past, n_past + shape[1], device=x.device).expand(shape)
    rope = None
    if config.positions == "rope":
        dtype = torch.promote_types(x.dtype, torch.float32)
        rope = rotary_tables(positions, dim=config.rope_dim, theta=config.rope_theta, dtype=dtype, yarn=config.yarn)
    return Context(positions, documents, mask, rope, key, capture, tokens)
