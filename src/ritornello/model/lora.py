"""Linear layers, with a low-rank delta of their own for each loop (depth-wise LoRA, 2410.20672)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.model.context import Loop


def low_rank(x: Tensor, down: Tensor, up: Tensor, loop: Loop) -> Tensor:
    """up[loop] · down[loop] · x for (B, T, in), with down (L, r, in), up (L, out, r).

    One loop index for all tokens takes one slice, one per sequence a batched product. One per token multiplies by all
    L slices and keeps the token's own: L·r columns are few, and nothing is sorted.
    """
    if isinstance(loop, int):
        return F.linear(F.linear(x, down[loop]), up[loop])
    if loop.shape[1] == 1:
        index = loop[:, 0]
        return torch.bmm(torch.bmm(x, down[index].transpose(1, 2)), up[index].transpose(1, 2))
    n_loops, rank, _ = down.shape
    own = F.one_hot(loop, n_loops).to(x.dtype)[..., None]
    hidden = F.linear(x, down.flatten(0, 1)).unflatten(-1, (n_loops, rank)) * own
    return F.linear(hidden.flatten(-2), up.transpose(0, 1).flatten(1))


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
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)
        y = F.linear(x, self.weight)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + low_rank(x, self.lora_A, self.lora_B, loop)
