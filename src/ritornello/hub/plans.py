"""How transformers shares a model out over processes (`from_pretrained(..., distributed_config=...)`).

Keys are modules and parameters of `RitornelloModel`, `*` any layer; values are styles of `transformers.distributed`.
What no plan names, every process has whole; so too the vocabulary, which halting and anchored states read.
"""

from collections.abc import Iterator

from ritornello.config import ModelConfig

Plan = dict[str, str]


def tensor_plan(c: ModelConfig) -> Plan:
    """Each process has some heads of the attention, some columns of each feed-forward network and each expert."""
    plan = {"rdt.embed_tokens.*": "replicate"}
    for layer, looped in _layers(c):
        lora = set(c.lora_targets) if looped and c.lora_rank else set()
        plan |= _columns(f"{layer}.self_attn.{'q_b_proj' if _latent_queries(c) else 'q_proj'}", "q" in lora)
        if c.attention == "gqa":
            plan |= _columns(f"{layer}.self_attn.k_proj") | _columns(f"{layer}.self_attn.v_proj")
        else:
            plan |= {f"{layer}.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj"} | _columns(
                f"{layer}.self_attn.kv_b_proj"
            )
        plan |= _rows(f"{layer}.self_attn.o_proj", "o" in lora)
        if looped and c.ffn == "moe":
            experts = f"{layer}.mlp.experts"
            plan |= {f"{experts}.gate_up_proj": "packed_colwise", f"{experts}.down_proj": "rowwise"}
            plan |= {experts: "moe_tp_experts"}
        network = f"{layer}.mlp.shared_experts" if looped and c.ffn == "moe" else f"{layer}.mlp"
        if network.endswith("mlp") or c.n_shared_experts:
            plan |= _columns(f"{network}.gate_proj", "ffn" in lora) | _columns(f"{network}.up_proj", "ffn" in lora)
            plan |= _rows(f"{network}.down_proj", "ffn" in lora)
    return plan


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


def _latent_queries(c: ModelConfig) -> bool:
    return c.attention == "mla" and c.q_lora_rank > 0


def _columns(path: str, lora: bool = False) -> Plan:
    """Cut by outputs; of the low-rank deltas, the half that makes them."""
    return {path: "colwise", **({f"{path}.loop_A": "replicate"} if lora else {})}


def _rows(path: str, lora: bool = False) -> Plan:
    """Cut by inputs; of the low-rank deltas, the half that reads them."""
    return {path: "rowwise", **({f"{path}.loop_B": "replicate"} if lora else {})}
