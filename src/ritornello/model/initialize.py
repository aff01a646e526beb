"""Weights at initialisation.

Matrices: normal of variance 2 / (5 · fan_in), truncated at 3 standard deviations (small init, 2312.16903 §3; there for
fan_in = D alone). Projections back into the residual stream: divided by √(2 · n_eff), n_eff the effective depth of a
looped model (as Huginn, 2502.05171, with the decay of an LTI carry taken into account), or zero (Parcae 2604.12946).
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ritornello.model.carry import HyperConnections
from ritornello.model.halting import HALTING_HEADS
from ritornello.model.injection import Injection
from ritornello.model.lora import Linear
from ritornello.model.moe import Experts, Router
from ritornello.model.norm import RMSNorm

if TYPE_CHECKING:
    from ritornello.model.rdt import RecurrentDepthTransformer


@torch.no_grad()
def initialize(model: "RecurrentDepthTransformer", seed: int) -> None:
    """Draw every parameter of `model` in place, from `seed` alone."""
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    config = model.config
    shrink = 0.0 if config.output_init == "zero" else (2 * config.effective_depth) ** -0.5
    for name, module in model.named_modules():
        output = name.endswith(("o_proj", "down_proj"))
        if isinstance(module, Linear):
            _draw(module.weight, generator, shrink if output else 1.0)
            if module.lora_A is not None and module.lora_B is not None:
                _draw(module.lora_A, generator)
                module.lora_B.zero_()
        elif isinstance(module, Experts):
            _draw(module.gate_up_proj, generator)
            _draw(module.down_proj, generator, shrink)
        elif isinstance(module, Router):
            _draw(module.weight, generator)
            module.e_score_correction_bias.zero_()
        elif isinstance(module, nn.Embedding):
            _draw(module.weight, generator)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1)
        elif isinstance(module, Injection):
            module.reset(generator)
        elif isinstance(module, HyperConnections):
            module.reset()
        elif isinstance(module, tuple(HALTING_HEADS.values())):
            module.reset(generator)
    if model.head is not None:
        _draw(model.head.weight, generator)
    if not config.is_plain:
        _initialize_recurrence(model, generator)


def _initialize_recurrence(model: "RecurrentDepthTransformer", generator: torch.Generator) -> None:
    if model.loop_embedding is not None and model.loop_embedding_scale is not None:
        model.loop_embedding.weight.normal_(generator=generator)
        model.loop_embedding_scale.zero_()
    if model.probe is not None:
        model.probe.translator.weight.copy_(torch.eye(model.config.dim))


def _draw(weight: Tensor, generator: torch.Generator, scale: float = 1.0) -> None:
    std = scale * math.sqrt(2 / (5 * weight.shape[-1]))
    if std == 0:
        weight.zero_()
    else:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
