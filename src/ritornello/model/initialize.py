"""Weights at initialisation.

Matrices: normal of variance 2 / (5 · fan_in), truncated at 3 standard deviations (small init, 2312.16903 §3; there for
fan_in = D alone). Projections back into the residual stream: divided by √(2 · n_eff), n_eff the effective depth of a
looped model (as Huginn, 2502.05171, with the decay of an LTI carry taken into account), or zero (Parcae 2604.12946).
Norms start at 1, `loop_B` at 0, token embeddings have variance 1 if asked. A module's `reset` sets what else it holds.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ritornello.model.rdt import RecurrentDepthTransformer


@torch.no_grad()
def initialize(model: "RecurrentDepthTransformer", seed: int = 0) -> None:
    """Draw every parameter of `model` in place, from `seed` alone."""
    generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
    shrink = 0.0 if model.config.output_init == "zero" else (2 * model.config.effective_depth) ** -0.5
    unit = ["loop_embedding.weight", "value_table.weight"]
    unit += ["embed_tokens"] if model.config.embedding_init == "unit" else []
    for name, weight in model.named_parameters():
        output = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        std = math.sqrt(2 / (5 * weight.shape[-1])) * (shrink if output else 1.0) if weight.ndim >= 2 else 0.0
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif any(table in name for table in unit):  # of the size of what they are added to, by a scale or a gate
            weight.normal_(generator=generator)
        elif name.endswith("loop_B") or std == 0:
            weight.zero_()
        else:
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
    for module in model.modules():
        if hasattr(module, "reset"):
            module.reset(generator)  # pyrefly: ignore
