"""Weights of fewer bytes, for decoding: a token reads every weight once a loop, and multiplies each only once.

Weights alone are rounded, once; products and the carry keep their precision. A weight comes back to its own dtype where
it is used: inside the kernel that reads it, where a compiled model decodes one sequence on a CPU; everywhere else as a
copy, which saves memory at rest but costs time.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ritornello.config import pick, require
from ritornello.model.lora import Linear
from ritornello.model.moe import Experts
from ritornello.model.rdt import RecurrentDepthTransformer

Weights = Literal["bf16", "int8"]


class _Rounded(nn.Module):
    """How weights lie in memory, and come back in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype


class _Bfloat16(_Rounded):
    def forward(self, rounded: Tensor) -> Tensor:
        return rounded.to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.bfloat16(),)


class _Int8(_Rounded):
    """Symmetric, with a scale for each row, all that goes into one output (LLM.int8(), 2208.07339, eq. 4)."""

    def forward(self, numbers: Tensor, scale: Tensor) -> Tensor:
        return (numbers * scale).to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (exact / scale).round().clamp(-127, 127).to(torch.int8), scale


_KINDS: dict[str, type[_Rounded]] = {"bf16": _Bfloat16, "int8": _Int8}


def quantize(model: RecurrentDepthTransformer, weights: Weights) -> None:
    """Round the matrices of `model` in place: linear layers, experts, the head, which is its own from then on if it was
    tied. Token embeddings, router, injection, norms, halting and what belongs to one loop stay as they are.

    From then on the model can neither be trained nor saved as a run, and keeps its dtype and device: move it before.

    Raises:
        ValueError: an unknown kind, or a model rounded before.
    """
    kind = pick(_KINDS, weights, "weights")
    require(isinstance(model, RecurrentDepthTransformer), "model", type(model).__name__, "a RecurrentDepthTransformer")
    again = any(parametrize.is_parametrized(module) for module in model.modules())
    require(not again, "model", "rounded before", "rounded once; load it again for other weights")
    model.requires_grad_(False)
    if model.head is None:  # which reads all embeddings, where a token reads one
        table = model.head_weight
        model.head = Linear(model.config.dim, model.config.vocab_size)
        model.head.weight = nn.Parameter(table, requires_grad=False)
    for module in [*model.modules()]:
        names = ["gate_up_proj", "down_proj"] if isinstance(module, Experts) else []
        names += ["weight"] if isinstance(module, Linear) else []
        for name in names:
            parametrize.register_parametrization(module, name, kind(getattr(module, name).dtype))
