"""How the input comes back at every loop: u = inject(h, e). All in float32 or better, whatever the rest runs in."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.config import ModelConfig
from ritornello.ops.precision import at_least_float32

A_LOG_MAX = 20.0  # exp(20) already makes A vanish; beyond, 0 · inf would be NaN


class Injection(nn.Module, ABC):
    """h, e (..., D) -> u (..., D), with ‖u‖ ≤ rho ‖h‖ + gain ‖e‖."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, h: Tensor, e: Tensor) -> Tensor: ...

    def rho(self) -> float:
        return 1.0

    def gain(self) -> float:
        return 1.0


class LTI(Injection):
    """u = A·h + B·e, a stable linear time-invariant system per channel (Parcae 2604.12946; S4D's zero-order hold).

    A = ρ_max · exp(−softplus(dt) · exp(min(A_log, 20))) lies in [0, ρ_max] for every finite parameter; with Parcae's
    ρ_max = 1 it rounds to 1. B = softplus(dt) · b, with b a vector, or a full matrix that starts as a multiple of I.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.rho_max = config.rho_max
        self.A_log = nn.Parameter(torch.empty(config.dim))
        self.dt = nn.Parameter(torch.empty(config.dim))
        self.B = nn.Parameter(torch.empty((config.dim, config.dim) if config.injection_matrix else config.dim))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """softplus(dt) = 1, so that decay_init sets A_log alone and input_init sets B alone."""
        self.dt.fill_(math.log(math.e - 1))
        self.A_log.fill_(math.log(math.log(self.rho_max / self.config.decay_init)))
        self.B.copy_(torch.eye(self.config.dim) if self.config.injection_matrix else torch.ones(()))
        self.B.mul_(self.config.input_init)

    def decay(self) -> Tensor:
        """A: (D,)"""
        rate = F.softplus(at_least_float32(self.dt)) * at_least_float32(self.A_log).clamp(max=A_LOG_MAX).exp()
        return self.rho_max * torch.exp(-rate)

    def input_matrix(self) -> Tensor:
        """B: (D,), or (D, D) acting on e from the left."""
        step = F.softplus(at_least_float32(self.dt))
        return (step[:, None] if self.config.injection_matrix else step) * at_least_float32(self.B)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            h, e, matrix = at_least_float32(h), at_least_float32(e), self.input_matrix()
            entering = F.linear(e, matrix) if self.config.injection_matrix else matrix * e
            return self.decay() * h + entering

    def rho(self) -> float:
        return self.decay().max().item()

    def gain(self) -> float:
        matrix = self.input_matrix()
        return (torch.linalg.matrix_norm(matrix, 2) if matrix.ndim == 2 else matrix.abs().max()).item()


class ConcatLinear(Injection):
    """u = W [h; e] (Huginn 2502.05171), started at W = [decay_init · I, input_init · I] to begin like `lti`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.dim, 2 * config.dim))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        eye = torch.eye(self.config.dim)
        self.weight.copy_(torch.cat((self.config.decay_init * eye, self.config.input_init * eye), 1))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            both = torch.cat((h, e.to(h.dtype).expand_as(h)), -1)
            return F.linear(at_least_float32(both), at_least_float32(self.weight))

    def _norm(self, half: int) -> float:
        return torch.linalg.matrix_norm(at_least_float32(self.weight.detach()).chunk(2, 1)[half], 2).item()

    def rho(self) -> float:
        return self._norm(0)

    def gain(self) -> float:
        return self._norm(1)


class Add(Injection):
    """u = h + e: nothing is forgotten, so nothing bounds the state."""

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return at_least_float32(h) + at_least_float32(e)


class NoInjection(Injection):
    """u = h: the input is seen once, as the initial state."""

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return at_least_float32(h)

    def gain(self) -> float:
        return 0.0


INJECTIONS: dict[str, type[Injection]] = {"lti": LTI, "linear": ConcatLinear, "add": Add, "none": NoInjection}
