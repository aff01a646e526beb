"""Other people's models at the shapes of ours, and a training step of theirs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.config import ModelConfig


def openmythos(config: ModelConfig) -> nn.Module:
    """OpenMythos with every loop of `config`: its tokens would halt after about two at initialisation."""
    from open_mythos import MythosConfig, OpenMythos  # pyrefly: ignore

    shared = ("vocab_size", "dim", "n_heads", "n_kv_heads", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")
    shared += ("qk_nope_head_dim", "v_head_dim", "n_experts", "expert_dim", "lora_rank")
    return OpenMythos(
        MythosConfig(
            **{name: getattr(config, name) for name in shared},
            max_seq_len=config.max_seq_len,
            max_loop_iters=config.n_loops,
            prelude_layers=config.n_prelude_layers,
            coda_layers=config.n_coda_layers,
            attn_type=config.attention,
            n_experts_per_tok=config.n_active_experts,
            n_shared_experts=config.n_shared_experts // config.n_active_experts,  # each as wide as all active ones
            act_threshold=config.n_loops + 1.0,  # the probabilities of all loops add up to less
        )
    )


def count_loops(model: Any) -> tuple[Callable[[], object], list[int]]:
    """A list that gets an entry for each pass through OpenMythos' recurrent block, and how to stop that."""
    calls: list[int] = []
    handle = model.recurrent.block.register_forward_hook(lambda *_: calls.append(1))
    return handle.remove, calls


def training_step(model: nn.Module, tokens: Tensor, *, bf16: bool) -> Callable[[], float]:
    """What our trainer does in a step: cross-entropy, gradients, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step
