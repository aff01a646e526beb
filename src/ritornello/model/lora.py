"""Linear layers, with a low-rank delta of their own for each loop (depth-wise LoRA, 2410.20672)."""

import torch
from torch import Tensor, nn

from ritornello.model.context import Loop
from ritornello.ops.linear import linear, low_rank


class Linear(nn.Module):
    """y = W x (+ lora_B[loop] · lora_A[loop] · x). `lora_B` starts at zero, so every loop starts alike.

    Inputs take the weight's dtype, unless autocast chooses.
    """

    def __init__(self, n_in: int, n_out: int, *, n_loops: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.lora_A = nn.Parameter(torch.empty(n_loops, rank, n_in)) if rank else None
        self.lora_B = nn.Parameter(torch.empty(n_loops, n_out, rank)) if rank else None

    def forward(self, x: Tensor, loop: Loop = 0) -> Tensor:
        weight = self.weight
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        y = linear(x, weight)
        return y if self.lora_A is None or self.lora_B is None else y + low_rank(x, self.lora_A, self.lora_B, loop)
