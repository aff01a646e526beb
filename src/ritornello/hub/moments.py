"""What the matrices of a plain model read: E[x xᵀ] of their inputs over some text, norms' weights left out.

With them, low-rank deltas are nearest in what matrices say rather than in their numbers, as in SVD-LLM (2403.07378);
and the one matrix that stands for several is their least-squares fit, as in RegMean (2212.09849).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.model.norm import RMSNorm
from ritornello.model.rdt import RecurrentDepthTransformer

READ_BY = {  # a norm: the matrices that read what it gives
    "input_layernorm": tuple(f"self_attn.{name}_proj" for name in "qkv"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
OTHERS = ("self_attn.o_proj", "mlp.down_proj")
DAMPING = 0.01  # of the mean of the diagonal, added to it: no direction counts for nothing
Moments = dict[str, Tensor]  # by matrix: (in, in)


@torch.no_grad()
def second_moments(model: RecurrentDepthTransformer, texts: Iterable[Tensor]) -> list[Moments]:
    """Of each layer, in its order, over all tokens (B, T) of `texts`; damped; in float32 or better."""
    layers = [*model.prelude_layers, *model.coda_layers]
    sums: list[Moments] = [{} for _ in layers]
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(_adding(found, name))
        for layer, found in zip(layers, sums, strict=True)
        for name in (*READ_BY, *OTHERS)
    ]
    n_tokens = 0
    try:
        for tokens in texts:
            model(tokens, return_logits=False)
            n_tokens += tokens.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return [_by_matrix({name: _damped(x / n_tokens) for name, x in found.items()}) for found in sums]


def _adding(found: Moments, name: str) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = F.rms_norm(x, x.shape[-1:], eps=module.eps) if isinstance(module, RMSNorm) else x
        found[name] = found.get(name, 0) + x.mT @ x

    return add


def _damped(x: Tensor) -> Tensor:
    return x + DAMPING * x.diagonal().mean() * torch.eye(len(x), dtype=x.dtype, device=x.device)


def _by_matrix(found: Moments) -> Moments:
    return {name: found[name] for name in OTHERS} | {m: found[norm] for norm, ms in READ_BY.items() for m in ms}


def fit(matrices: Tensor, moments: Tensor) -> Tensor:
    """The matrix (out, in) with the least Σ E‖W_i x_i − W x_i‖² of matrices (L, out, in), moments (L, in, in)."""
    return torch.linalg.solve(moments.sum(0), (matrices @ moments).sum(0), left=False)


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^−½ of a symmetric positive C (in, in): E‖R x‖² = ‖R C^½‖²."""
    values, vectors = torch.linalg.eigh(moments)
    size = values.clamp(min=float(values[-1]) * torch.finfo(values.dtype).eps).sqrt()
    return (vectors * size) @ vectors.mT, (vectors / size) @ vectors.mT
