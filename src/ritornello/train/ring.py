"""The ring of a pipeline's stages, and what travels on it: messages, states, and on the way back gradients.

States that are sent take part in autograd in the order in which they were sent: one token goes through every sending
and taking of a stage. A backward pass so undoes them in the reverse order, and no stage waits for one that waits.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """What a stage reads before the state itself comes: all integers. kind 0: no more calls."""

    kind: int = 0
    recomputes: int = 0
    chain: int = 0  # which of the micro-batches on their way
    rows: int = 0
    tokens: int = 0
    width: int = 0
    dtype: int = 0
    gradients: int = 0
    bf16: int = 0
    training: int = 0
    known: int = 0  # rows that were here before; 0: a chain begins
    loop: int = 0  # of all tokens, or -1 and -2: (rows, 1) and (rows, tokens) follow
    running: int = 0  # 0: all, 1 and 2: (rows, 1) and (rows, tokens) follow
    documents: int = 0  # whether those of new rows follow
    key: int = 0  # whether sequences of new rows follow
    seed: int = 0
    step: int = 0

    def width_of(self, kind: int) -> int:
        """Of a table of rows: nothing, a number for each row, or one for each token."""
        return {1: 1, 2: self.tokens}.get(kind, 0)

    @property
    def lengths(self) -> list[int]:
        """Of loop, running, documents and sequences, as they follow one another."""
        n_new = self.rows - self.known
        return [
            self.rows * self.width_of(-self.loop),
            self.rows * self.width_of(self.running),
            n_new * self.tokens * self.documents,
            n_new * self.key,
        ]


@dataclass
class Ring:
    """The stages of one pipeline; this one's neighbours."""

    group: Any
    control: Any  # of the same processes, for messages that the host reads
    device: torch.device
    stage: int
    n: int
    hops: Mapping[tuple[int, int], Any]  # groups of two, from stage to stage: nccl does one thing at a time in each
    token: Tensor | None = None  # through which all that is sent hangs together
    _sent: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def closed(self, total: Tensor) -> Tensor:
        """`total`, so that differentiating it goes back through all that was sent since the last time."""
        token, self.token = self.token, None
        return total if token is None else total + 0 * token.to(total)

    def finish(self) -> None:
        """Wait until all that was sent has been read."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def say(self, call: Call, numbers: Tensor) -> None:
        """To the next stage."""
        head = torch.tensor([getattr(call, each.name) for each in fields(call)])
        self._keep(dist.isend(head, group=self.control, group_dst=(self.stage + 1) % self.n), head)
        self.post(numbers, 1)

    def hear(self) -> tuple[Call, Tensor]:
        """From the stage before."""
        head = torch.empty(len(fields(Call)), dtype=torch.int64)
        dist.recv(head, group=self.control, group_src=(self.stage - 1) % self.n)
        call = Call(*head.tolist())
        return call, self.fetch(torch.empty(sum(call.lengths), dtype=torch.int64, device=self.device), -1)

    def give(self, x: Tensor) -> None:
        """The state to the next stage; on the way back its gradient comes from there."""
        if torch.is_grad_enabled():
            self.token = _Give.apply(self._token, x, self)
        else:
            self.post(x, 1)

    def take(self, like: Tensor) -> Tensor:
        """The state from the stage before; on the way back its gradient goes there."""
        if not torch.is_grad_enabled():
            return self.fetch(like, -1)
        self.token, x = _Take.apply(self._token, like, self)
        return x

    def passed(self, x: Tensor) -> Tensor:
        """x as it is; on the way back it waits until all that was sent later has been undone, as that waits for it."""
        if not torch.is_grad_enabled():
            return x
        self.token, x = _Pass.apply(self._token, x)
        return x

    @property
    def _token(self) -> Tensor:
        return torch.zeros((), device=self.device, requires_grad=True) if self.token is None else self.token

    def post(self, x: Tensor, way: int) -> None:
        other = (self.stage + way) % self.n
        if x.numel():
            x, group = x.detach().contiguous(), self.hops[self.stage, other]
            self._keep(dist.isend(x, group=group, group_dst=int(other > self.stage)), x)

    def fetch(self, like: Tensor, way: int) -> Tensor:
        x, other = torch.empty_like(like, memory_format=torch.contiguous_format), (self.stage + way) % self.n
        if x.numel():
            dist.recv(x, group=self.hops[other, self.stage], group_src=int(other > self.stage))
        return x

    def _keep(self, work: Any, x: Tensor) -> None:
        while len(self._sent) > 8 * self.n + 8:  # long read: a round of every stage's is less
            self._sent.popleft()[0].wait()
        self._sent.append((work, x))


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring, ctx.like = ring, x.detach()[:0].new_empty(x.shape, device="meta")
        ring.post(x, 1)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore
        return grads[0], ctx.ring.fetch(torch.empty_like(ctx.like, device=ctx.ring.device), 1), None


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return token.clone(), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:  # pyrefly: ignore
        return grads[0], grads[1]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, like: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        ctx.ring = ring
        return token.clone(), ring.fetch(like, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore
        ctx.ring.post(grads[1], -1)
        return grads[0], None, None
