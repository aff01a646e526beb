"""What a real training step holds, tensor by tensor.

Counted are the bytes of every storage that an operator returns, from then until nobody refers to it: parameters,
gradients, optimizer states, what autograd keeps, and results on their way. Not counted is what a kernel takes and
gives back within one operator, and what an allocator keeps for later.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ritornello.config import Recipe
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step
from tests.train.small import batch


class Live(TorchDispatchMode):
    """Bytes that are held `now`, and were at the `peak`."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now, self.peak, self.before_backward = 0, 0, 0
        self._seen: set[int] = set()
        for tensor in held:
            self._count(tensor)
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += n_bytes
            weakref.finalize(storage, self._gone, key, n_bytes)

    def _gone(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= n_bytes

    @contextmanager
    def watching_backward(self) -> Iterator[None]:
        """Notes in `before_backward` what is held when a backward pass begins."""
        backward = Tensor.backward

        def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self.before_backward = max(self.before_backward, self.now)
            backward(loss, *args, **kwargs)

        with mock.patch.object(Tensor, "backward", noted):
            yield


@dataclass(frozen=True)
class Measured:
    """Bytes. forward: beside weights and states, when the (last) backward pass begins."""

    weights: int
    gradients: int
    optimizer: int
    forward: int
    peak: int
    parts: dict[str, int] = field(default_factory=dict)


def measured(recipe: Recipe) -> Measured:
    """Of the second step of a new model, on random tokens: the first one makes the optimizers' states."""
    train, model = recipe.train, RecurrentDepthTransformer(recipe.model).train()
    optimizers = build_optimizers(model, train)
    data = batch(n=train.batch_size, length=recipe.data.seq_len, vocab_size=recipe.model.vocab_size)
    train_step(model, optimizers, data, train=train, step=0)
    for parameter in model.parameters():
        parameter.grad = None
    weights = [p.data for p in model.parameters()]
    states = [x for o in optimizers for state in o.state.values() for x in state.values() if isinstance(x, Tensor)]
    live = Live([*weights, *states])
    rest = live.now
    with live.watching_backward(), live:
        train_step(model, optimizers, data, train=train, step=1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return Measured(*map(_bytes, (weights, gradients, states)), live.before_backward - rest, live.peak)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
