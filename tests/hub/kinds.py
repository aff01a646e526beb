"""Small models of every kind, behind transformers' interface."""

from typing import Any

import torch

from ritornello.hub import RitornelloConfig, RitornelloForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "dim": 32,
    "n_prelude_layers": 1,
    "n_recurrent_layers": 2,
    "n_coda_layers": 1,
    "n_loops": 3,
    "max_seq_len": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 48,
    "n_experts": 8,
    "n_active_experts": 2,
    "expert_dim": 16,
    "lora_rank": 2,
    "lora_targets": ("q", "o", "ffn"),
}
MLA = {
    "attention": "mla",
    "q_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "moe": {},
    "mla": MLA,
    "dense": {
        "ffn": "dense",
        "tie_embeddings": False,
        "qk_bias": True,
        "embedding_scale": 3.0,
        "lora_targets": tuple("kv"),
    },
    "shared keys": {"ffn": "dense", "kv_sharing": "first"},
    "gate": {"ffn": "dense", "halting": "gate", "norm": "pre_post"},
    "act": {"ffn": "dense", "halting": "act", "read_out": "mixture", "initial_state": "e"},
    "streams": {"ffn": "dense", "carry_streams": 2, "injection": "linear", "initial_state": "noise"},
    "values": {"ffn": "dense", "activation": "relu2", "qk_norm": True, "value_embeddings": (0, 2), "read_matrix": True},
    "plain": {"n_recurrent_layers": 0},
}


def config(kind: str = "moe", **options: Any) -> RitornelloConfig:
    return RitornelloConfig(**SHAPE | KINDS[kind] | options)


def model(kind: str = "moe", *, seed: int = 0, **options: Any) -> RitornelloForCausalLM:
    """With low-rank deltas and loop embeddings that matter, in evaluation mode."""
    torch.manual_seed(seed)
    found = RitornelloForCausalLM(config(kind, **options))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith(("loop_B", "loop_embedding_scale")):
                parameter.normal_(std=0.1)
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter *= 8  # a new model hardly looks at other tokens
            if ".halting.head." in name:  # and a new head stops all tokens alike
                parameter += (2.0 if kind == "gate" else 0.3) * torch.randn_like(parameter)
    return found.eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
