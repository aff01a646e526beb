"""How transformers shares a model out over processes (`from_pretrained(..., distributed_config=...)`).

Keys are modules and parameters of `RitornelloModel`, `*` any layer; values are styles of `transformers.distributed`.
What no plan names, every process has whole; so too the vocabulary, which halting and anchored states read.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel, TensorParallelLayer

from ritornello.config import ModelConfig

Plan = dict[str, str]


class _Cut(TensorParallelLayer):
    """A product with its weight cut over processes; of a loop's low-rank deltas, `whole` is on each of them."""

    whole = ""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if param != self.whole:
            super().shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        module._hf_quantized_needs_local_tp = True  # pyrefly: ignore - computes with each process' own part
        super().install_forward(module, mesh)
        forward, hooked, group = module.forward, set(), mesh.get_group()

        def summed(*args: Any, **kwargs: Any) -> Tensor:
            """Of the gradient of what is whole each process has a part."""
            x = module._parameters.get(self.whole)
            if x is not None and x.requires_grad and torch.is_grad_enabled() and x not in hooked:
                x.register_post_accumulate_grad_hook(lambda x: dist.all_reduce(x.grad, group=group))
                hooked.add(x)
            return forward(*args, **kwargs)

        module.forward = summed
        return module


class Columns(_Cut, ColwiseParallel):
    whole = "loop_A"


class Rows(_Cut, RowwiseParallel):
    whole = "loop_B"


COLUMNS, ROWS = "ritornello_columns", "ritornello_rows"
ALL_PARALLEL_STYLES.register(COLUMNS, Columns())  # pyrefly: ignore
ALL_PARALLEL_STYLES.register(ROWS, Rows())  # pyrefly: ignore


def tensor_plan(c: ModelConfig) -> Plan:
    """Each process has some heads of the attention, some columns of each feed-forward network and each expert. With
    value embeddings, whose tables no style cuts, attention is whole."""
    plan = {"rdt.embed_tokens.*": "replicate"} | ({} if c.tie_embeddings else {"rdt.head": "replicate"})
    for layer, looped in _layers(c):
        network = f"{layer}.mlp"
        plan |= {} if c.value_embeddings else _heads(c, f"{layer}.self_attn")
        if looped and c.ffn == "moe":
            plan[f"{network}.experts"] = "moe_tp_experts"
            plan |= {f"{network}.experts.gate_up_proj": "packed_colwise", f"{network}.experts.down_proj": "rowwise"}
            network = f"{network}.shared_experts" if c.n_shared_experts else ""
        if network:
            plan |= {f"{network}.gate_proj": COLUMNS} if c.activation == "swiglu" else {}
            plan |= {f"{network}.up_proj": COLUMNS, f"{network}.down_proj": ROWS}
    return plan


def _heads(c: ModelConfig, attention: str) -> Plan:
    columns = ["q_b_proj" if c.attention == "mla" and c.q_lora_rank else "q_proj"]
    columns += ["k_proj", "v_proj"] if c.attention == "gqa" else ["kv_b_proj"]
    latent = {f"{attention}.kv_a_proj_with_mqa": "mla_kv_a_proj"} if c.attention == "mla" else {}
    return {f"{attention}.{name}": COLUMNS for name in columns} | {f"{attention}.o_proj": ROWS} | latent


def expert_plan(c: ModelConfig) -> Plan | None:
    """Each process has some of the experts; None: there are none."""
    if c.is_plain or c.ffn != "moe":
        return None
    experts = "rdt.recurrent.*.mlp.experts"
    whole = dict.fromkeys((f"{experts}.gate_up_proj", f"{experts}.down_proj"), "grouped_gemm")
    return whole | {experts: "ep_dispatch_experts"}


def fsdp_plan(c: ModelConfig) -> Plan:
    """Looped layers are put together once a pass: freed after each loop, they would be gathered in every one."""
    return {layer: "keep_full_weight" if looped else "free_full_weight" for layer, looped in _layers(c)}


def _layers(c: ModelConfig) -> Iterator[tuple[str, bool]]:
    """The stacks of layers that there are, and whether they are looped."""
    stacks = {"prelude_layers": c.n_prelude_layers, "recurrent": c.n_recurrent_layers, "coda_layers": c.n_coda_layers}
    return ((f"rdt.{stack}.*", stack == "recurrent") for stack, n in stacks.items() if n)
