"""What a real training step holds, tensor by tensor.

Counted are the bytes of every storage that an operator returns, from then until nobody refers to it: parameters,
gradients, optimizer states, what autograd keeps, and results on their way. Not counted is what a kernel takes and
gives back within one operator, and what an allocator keeps for later.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ritornello.config import ModelConfig, Recipe
from ritornello.model import attention as attention_module
from ritornello.model import moe
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.ops import latent
from ritornello.ops.experts import experts_grouped
from ritornello.train.data import Batch
from ritornello.train.optim import build_optimizers
from ritornello.train.step import train_step


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


def measured(recipe: Recipe) -> Measured:
    """Of the second step of a new model, on random tokens: the first one makes the optimizers' states."""
    train, model = recipe.train, RecurrentDepthTransformer(recipe.model).train()
    optimizers = build_optimizers(model, train)
    data = random_batch(recipe.model, recipe.train.batch_size, recipe.data.seq_len)
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


def random_batch(config: ModelConfig, n_rows: int, length: int) -> Batch:
    """Rows of one document each."""
    tokens, labels = np.random.default_rng(0).integers(0, config.vocab_size, (2, n_rows, length))
    return Batch(tokens, labels, np.zeros_like(tokens), np.arange(n_rows), np.full(n_rows, length))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Norm(torch.autograd.Function):
    """Keeps what a GPU's fused kernel keeps: the input, the weight and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grads[0] * weight
        for_x = scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return for_x, None, (grads[0] * normed).flatten(0, -2).sum(0), None


class _Attention(torch.autograd.Function):
    """Keeps what a GPU's kernels keep, of values narrower than keys too: queries, keys, values, output, sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, sums = _attend(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out, _ = _attend(*inputs, ctx.scale)
        return *torch.autograd.grad(out, inputs, grads[0]), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal, one head of a batch row after the other; the output lies as (B, T, H, M)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * scale).float().masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).contiguous().transpose(1, 2)
    return out, scores.logsumexp(-1)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """A CPU takes a GPU's paths: fused norms, one attention for all widths, grouped experts."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
        assert mask is None
        return _Attention.apply(q, k, v, scale)

    def grouped(x: Tensor, gate_up: Tensor, down: Tensor, *rest: Tensor, exact: bool) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x, gate_up, down = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, gate_up, down))
        return experts_grouped(x, gate_up, down, *rest)

    with (
        mock.patch.object(torch.nn.functional, "rms_norm", _Norm.apply),
        mock.patch.object(attention_module, "attention", attention),
        mock.patch.object(latent, "attention", attention),
        mock.patch.object(moe, "experts", grouped),
    ):
        yield
