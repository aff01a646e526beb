"""Linear layers, with a low-rank delta of their own for each loop (depth-wise LoRA, 2410.20672)."""

import torch
from torch import Tensor, nn

from ritornello.model.context import Loop
from ritornello.ops.linear import linear, low_rank


def table_of(n: int, dim: int) -> nn.Embedding:
    """An embedding left for `initialize` to draw."""
    return nn.Embedding(n, dim, _weight=torch.empty(n, dim))


class Linear(nn.Linear):
    """y = W x (+ loop_B[loop] · loop_A[loop] · x). `loop_B` starts at zero, so every loop starts alike.

    Inputs take the weight's dtype, unless autocast chooses.
    """

    def __init__(self, n_in: int, n_out: int, *, n_loops: int = 0, rank: int = 0, bias: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw weights
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None  # pyrefly: ignore
        self.loop_A = nn.Parameter(torch.empty(n_loops, rank, n_in)) if rank else None
        self.loop_B = nn.Parameter(torch.empty(n_loops, n_out, rank)) if rank else None

    def forward(self, input: Tensor, loop: Loop = 0) -> Tensor:  # pyrefly: ignore
        x = input if torch.is_autocast_enabled(input.device.type) else input.to(self.weight.dtype)
        y = linear(x, self.weight, self.bias)
        return y if self.loop_A is None or self.loop_B is None else y + low_rank(x, self.loop_A, self.loop_B, loop)
