"""Balance by a bias: what each optimizer step does to the routers, outside of gradients."""

import torch
from torch import Tensor

from ritornello.model.layers import Layer
from ritornello.model.moe import MixtureOfExperts
from ritornello.model.rdt import RecurrentDepthTransformer


@torch.no_grad()
def update_router_bias(model: RecurrentDepthTransformer, load: Tensor, *, rate: float, min_tokens: int = 0) -> None:
    """Raise the selection bias of experts below the mean load by `rate`, lower the others' (2412.19437 §2.1.2).

    load: (n_loops, R, E) of one optimizer step, summed over micro-batches and ranks. With a bias per loop, loops that
    saw fewer than `min_tokens` tokens keep theirs.
    """
    for place, layer in model.recurrent.named_children():  # all, or those of a stage
        assert isinstance(layer, Layer) and isinstance(layer.mlp, MixtureOfExperts)
        counts = load[:, int(place)].float()
        counts = counts if model.config.router_bias_per_loop else counts.sum(0)
        step = rate * (counts.mean(-1, keepdim=True) - counts).sign()
        if model.config.router_bias_per_loop:
            step = step * (counts.sum(-1, keepdim=True) >= min_tokens * model.config.n_active_experts)
        layer.mlp.router.e_score_correction_bias += step
