"""The states of tokens on their way through the loop, each in a lane of its own until the coda has taken it."""

import numpy as np
import torch
from torch import Tensor

from ritornello.engine.pages import Rows
from ritornello.model.halting import HaltState

HALT = ("survival", "remainder", "mixture", "log_probs")


class Lanes:
    """Named tensors with one row for each lane; made when first written."""

    def __init__(self, n_lanes: int) -> None:
        self.n_lanes = n_lanes
        self._free = list(range(n_lanes))[::-1]
        self._tensors: dict[str, Tensor] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, n: int) -> Rows:
        assert n <= self.n_free
        kept = len(self._free) - n
        taken = self._free[kept:]
        del self._free[kept:]
        return np.array(taken, np.int64)

    def drop(self, lanes: Rows) -> None:
        self._free.extend(lanes.tolist())

    def put(self, name: str, lanes: Tensor, value: Tensor) -> None:
        """value (1, N, ...) into the lanes (N,)."""
        if name not in self._tensors:
            self._tensors[name] = value.new_zeros(self.n_lanes, *value.shape[2:])
        self._tensors[name].index_copy_(0, lanes, value[0])

    def get(self, name: str, lanes: Tensor) -> Tensor:
        """(1, N, ...)"""
        return self._tensors[name].index_select(0, lanes)[None]

    def put_halt(self, lanes: Tensor, state: HaltState) -> None:
        for name in HALT:
            value = getattr(state, name)
            if value is not None:
                self.put(name, lanes, value)

    def get_halt(self, lanes: Tensor) -> HaltState:
        """Of tokens that have not halted."""
        found = {name: self.get(name, lanes) if name in self._tensors else None for name in HALT}
        survival = found["survival"]
        assert survival is not None
        running = torch.zeros_like(survival, dtype=torch.bool)
        return HaltState(halted=running, weight=torch.zeros_like(survival), **found)  # pyrefly: ignore
