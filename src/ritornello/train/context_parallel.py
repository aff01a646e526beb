"""Context parallelism: processes that share out the tokens of every row, for sequences too long for one device.

Only attention looks at other tokens. At every layer and loop the entries of all tokens, GQA's keys and values or MLA's
latents, are put together, and each process asks for its own tokens (Llama 3 2407.21783, §3.3.2). Each has two pieces of
a row, the i-th and the i-th last, so that all see equally many tokens before theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ritornello.accounting import PIECES
from ritornello.config import require
from ritornello.model.cache import KeyValues
from ritornello.model.context import Context, Loop, build_context
from ritornello.model.depth import Depth
from ritornello.model.layers import Layer
from ritornello.model.moe import MixtureOfExperts
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops.routing import sum_tokens
from ritornello.train.tensor_parallel import Inward, Outward


@dataclass(frozen=True)
class Pieces:
    """Of rows of `length` tokens, which each of `n` processes has; `index`: this one. One process has all."""

    length: int
    n: int = 1
    index: int = 0

    def __post_init__(self) -> None:
        ok = self.n == 1 or self.length % (PIECES * self.n) == 0
        require(ok, "parallel.context", self.n, f"1, or such that {PIECES} x it divides data.seq_len ({self.length})")

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(T,) places in the row: those of the first process, then those of the next."""
        if self.n == 1:
            return np.arange(self.length)
        pieces = np.arange(self.length).reshape(2 * self.n, -1)
        return np.concatenate([pieces[[i, -1 - i]].ravel() for i in range(self.n)])

    @cached_property
    def mine(self) -> NDArray[np.int64]:
        """(T / n,) the places of this process."""
        return self.order.reshape(self.n, -1)[self.index]

    def take(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Of rows (B, T) this process' tokens (B, T / n)."""
        return rows if self.n == 1 else rows[:, self.mine]

    def depth(self, whole: Depth) -> Depth:
        """The plan of this process' tokens: rows join when their first token does, wherever that is."""
        starts = whole.starts
        return whole if starts is None or starts.shape[1] == 1 else replace(whole, starts=starts[:, self.mine])


@contextmanager
def shared(model: RecurrentDepthTransformer, pieces: Pieces, group: Any) -> Iterator[None]:
    """Within, the model gets this process' tokens of each row, as does every other of the group."""
    if pieces.n == 1:
        yield
        return
    layers = [*model.prelude_layers, *model.recurrent, *model.coda_layers]
    mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, MixtureOfExperts)]  # pyrefly: ignore
    hooks = [_reaching(layer, pieces, group) for layer in layers]
    model.context = partial(_context, model, pieces, group)
    for mixture in mixtures:
        mixture.sum_tokens = lambda x: Inward.apply(Outward.apply(sum_tokens(x), group), group)  # pyrefly: ignore
    try:
        yield
    finally:
        del model.context
        for mixture in mixtures:
            mixture.sum_tokens = sum_tokens
        for hook in hooks:
            hook.remove()


def _reaching(layer: nn.Module, pieces: Pieces, group: Any) -> Any:
    """Let a layer's attention reach the entries of all tokens."""
    assert isinstance(layer, Layer)

    def wrapped(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, loop, table, context, kv, running = inputs
        return x, loop, table, context, Everyone(kv, pieces, group), running

    return layer.self_attn.register_forward_pre_hook(wrapped)


class Everyone(KeyValues):
    """Entries of this process' tokens in, those of all out."""

    def __init__(self, own: KeyValues, pieces: Pieces, group: Any) -> None:
        self.own, self.pieces, self.group = own, pieces, group

    def put(self, layer: int, loop: Loop, entry: Tensor, running: Tensor | None, some: Any) -> Tensor:
        assert some is None, "processes would leave out different rows"
        found = self.own.put(layer, loop, entry, running, some)
        assert isinstance(found, Tensor)
        return Gathered.apply(found, self.pieces, self.group)


def _context(
    model: RecurrentDepthTransformer,
    pieces: Pieces,
    group: Any,
    x: Tensor,
    *,
    documents: Any = None,
    tokens: Any = None,
    **others: Any,
) -> Context:
    """`model.context` of this process' tokens x (B, t, D): what they see among all."""
    if others.get("positions") is not None or others.get("cache") is not None:
        raise NotImplementedError("positions or a cache with shared tokens")
    mine = torch.from_numpy(pieces.mine).to(x.device)
    every = None if documents is None else Gathered.apply(documents[..., None], pieces, group)[..., 0]
    shape = len(x), pieces.length  # all that counts of x and of ids
    others["tokens"] = None if tokens is None else tokens.new_zeros(()).expand(shape)
    whole = build_context(model.config, x[:, :1, :1].expand(*shape, -1), documents=every, **others)
    tokens = None if whole.tokens is None else tokens
    mask = whole.mask
    if mask is None:
        mask = torch.ones(pieces.length, pieces.length, dtype=torch.bool, device=x.device).tril()[None, None]
    rope = None if whole.rope is None else (whole.rope[0][:, mine], whole.rope[1][:, mine])
    own: Any = {"tokens": tokens, "positions": whole.positions[:, mine], "documents": documents}
    return replace(whole, **own, mask=mask[:, :, mine], rope=rope)


class Gathered(torch.autograd.Function):
    """x (B, t, W) of each process -> (B, T, W), in the order of the row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: Pieces, group: Any) -> Tensor:
        ctx.pieces, ctx.group = pieces, group
        found = x.new_empty(pieces.n * x.shape[0], *x.shape[1:])
        dist.all_gather_single(found, x.contiguous(), group=group)
        places = torch.from_numpy(pieces.order.argsort()).to(x.device)
        return found.unflatten(0, (pieces.n, -1)).transpose(0, 1).flatten(1, 2)[:, places]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore
        grad, n = grads[0], ctx.pieces.n
        order = torch.from_numpy(ctx.pieces.order).to(grad.device)
        parts = grad[:, order].unflatten(1, (n, -1)).transpose(0, 1)
        total = grad.new_empty(parts.shape[1:])
        dist.reduce_scatter_single(total, parts.flatten(0, 1).contiguous(), group=ctx.group)
        return total, None, None
