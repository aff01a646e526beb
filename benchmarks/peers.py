"""Other people's models at the shapes of ours, and a training step of theirs."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritornello.config import ModelConfig

OPENMYTHOS = f"open-mythos {version('open-mythos')}"


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


def count_calls(module: nn.Module) -> tuple[Callable[[], object], list[int]]:
    """How to stop, and a list that until then gets an entry for each forward pass through `module`."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    return handle.remove, calls


def parcae(*, value_embeddings: bool) -> nn.Module:
    """Parcae's 140M. value_embeddings: with the three tables (75M numbers) that add token values to attention."""
    from parcae_lm import create_model  # pyrefly: ignore

    model = create_model("parcae-small-140m")
    if not value_embeddings:
        model.value_embeds.clear()
    return model


def _shape(c: ModelConfig) -> dict[str, Any]:
    """What transformers' models call alike."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "tie_word_embeddings": c.tie_embeddings,
        "use_cache": False,
    }


def llama(c: ModelConfig) -> nn.Module:
    """transformers' Llama with a plain model's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_shape(c), num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim))


def deepseek(c: ModelConfig) -> nn.Module:
    """transformers' DeepSeek-V3 with the layers of a model that loops once."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    same = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_shared_experts")
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_shape(c),
            **{name: getattr(c, name) for name in same},
            num_key_value_heads=c.n_heads,
            moe_intermediate_size=c.expert_dim,
            n_routed_experts=c.n_experts,
            num_experts_per_tok=c.n_active_experts,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=c.n_prelude_layers,
            routed_scaling_factor=1.0,
        )
    )


Forward = Callable[[Tensor, Tensor], Tensor]


def logits_loss(model: nn.Module) -> Forward:
    """inputs, labels (B, T) -> the mean cross-entropy, of a model that gives logits."""

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        out = model(inputs)
        return F.cross_entropy(getattr(out, "logits", out).flatten(0, 1).float(), labels.flatten())

    return loss


def parcae_loss(model: nn.Module, n_loops: int) -> Forward:
    """Parcae takes the loops without and with gradient, and computes its loss itself."""
    steps = torch.tensor([0, n_loops])
    return lambda inputs, labels: model(inputs, labels=labels.contiguous(), num_steps_pair=steps)["loss"]


def adamw(model: nn.Module, *, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def step(
    model: nn.Module,
    loss_of: Forward,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    *,
    bf16: bool = False,
) -> float:
    """What our trainer does in a step: cross-entropy, gradients, clipping, fused AdamW."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(inputs, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())
