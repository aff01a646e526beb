"""The state that travels from loop to loop, in float32 or better: its start, and how the block reads and writes it."""

import torch
from torch import Tensor, nn

from ritornello.config import NOISE_STD
from ritornello.model.context import Context, Loop
from ritornello.ops.noise import Key, fold, normal
from ritornello.ops.precision import at_least_float32


def initial_state(kind: str, e: Tensor, context: Context, std: float = NOISE_STD) -> Tensor:
    """h_0 (B, T, D): zeros, e, or normal noise clamped at 3 standard deviations (2502.05171).

    Noise depends on (key, position, channel) alone, so that a prefix, a chunk or another batch sees the same.
    """
    e = at_least_float32(e)
    if kind != "noise":
        return e if kind == "e" else torch.zeros_like(e)
    keys = (context.key or Key()).fold(context.positions, 0)[..., None]
    noise = normal(fold(keys, torch.arange(e.shape[-1], device=e.device))).clamp(-3, 3)
    return std * noise.to(e.dtype)


def damped(x: Tensor, y: Tensor, loop: Loop, first: float, later: float) -> Tensor:
    """x + s · (y − x), with s = `first` in loop 0 and `later` from loop 1 on (2605.23872: sub-steps of a block)."""
    if isinstance(loop, int):
        return x.lerp(y, first if loop == 0 else later)
    return torch.where((loop == 0)[..., None], x.lerp(y, first), x.lerp(y, later))


class SingleStream(nn.Module):
    """The state is one vector per token: read as it is, replaced by what the block makes of it."""

    def expand(self, h: Tensor) -> Tensor:
        return h

    inputs = read = mean = expand

    def write(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return y


class HyperConnections(nn.Module):
    """The state is n vectors per token, (B, T, n, D) (hyper-connections 2409.19606, static, around the whole block).

    The block reads a learned combination of the streams and writes its change to each with a learned strength. Streams
    mix by a matrix of softmax rows: a convex combination, so that mixing never makes the largest stream larger. The
    paper's matrix is unconstrained, which would void the bound on the state.
    """

    def __init__(self, n_streams: int) -> None:
        super().__init__()
        self.read_weight = nn.Parameter(torch.empty(n_streams))
        self.write_weight = nn.Parameter(torch.empty(n_streams))
        self.mixing = nn.Parameter(torch.empty(n_streams, n_streams))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Reads the mean, writes to all alike with small differences to break the symmetry, hardly mixes."""
        n = self.read_weight.shape[0]
        self.read_weight.fill_(1 / n)
        self.write_weight.copy_(torch.linspace(0.8, 1.2, n))
        self.mixing.copy_(4 * torch.eye(n))

    def expand(self, h: Tensor) -> Tensor:
        return h[..., None, :].expand(*h.shape[:-1], self.read_weight.shape[0], h.shape[-1])

    def inputs(self, e: Tensor) -> Tensor:
        return e[..., None, :]

    def read(self, u: Tensor) -> Tensor:
        return (u * self.read_weight.to(u.dtype)[:, None]).sum(-2)

    def write(self, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`x` is what the block read, `y` what it made of it; their difference is its change."""
        with torch.autocast(u.device.type, enabled=False):
            mixed = self.mixing.to(u.dtype).softmax(-1) @ u
        return mixed + self.write_weight.to(u.dtype)[:, None] * (y - x)[..., None, :]

    def mean(self, h: Tensor) -> Tensor:
        return h.mean(-2)
