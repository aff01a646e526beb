"""What `ritornello plan` says of memory beside what a training step of a small model holds."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from benchmarks.held import Measured, as_on_a_gpu, measured
from ritornello.config import DataConfig, ModelConfig, Recipe, TrainConfig
from ritornello.planning.layout import Layout
from ritornello.planning.memory import Moments

SIZES: dict[str, Any] = {"vocab_size": 256, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 160}
SIZES |= {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
SIZES |= {"n_experts": 16, "n_active_experts": 2, "expert_dim": 32}  # 64 pairs an expert: no slot stays empty
KINDS = tuple(product(("dense", "moe"), ("gqa", "mla"), (2, 4, 8), (0, 2), (False, True), ("fp32", "bf16")))


def small(*, seq_len: int = 128, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """Four sequences, every token at the same loops: `train`'s max_loops."""
    n_loops = train.get("max_loops", 4)
    config = ModelConfig(**SIZES | {"n_loops": n_loops} | (model or {}))
    how = {"batch_size": 4, "warmup_steps": 0, "depth": "fixed", "max_loops": n_loops, "mean_loops": float(n_loops)}
    return Recipe(model=config, data=DataConfig(seq_len=seq_len), train=TrainConfig(**how | train))


def of_kind(ffn: str, attention: str, n_loops: int, backprop: int, checkpoint: bool, precision: str) -> Recipe:
    how: dict[str, Any] = {"backprop_loops": backprop, "checkpoint_activations": checkpoint, "precision": precision}
    return small(model={"ffn": ffn, "attention": attention}, max_loops=n_loops, **how)


def planned(recipe: Recipe, *, fused: bool = False) -> Measured:
    """The formulas' account of what `measured` measures."""
    moments = Moments.of(recipe, Layout(), fused=fused)
    all_of_them = moments.all()
    most = max(all_of_them.values(), key=lambda x: x.total)
    begin = all_of_them["the last layers' gradients"]
    forward = begin.activations + begin.copies + begin.loss + begin.gradients
    gradients = all_of_them["the optimizer"].gradients
    return Measured(*(round(x) for x in (most.weights, gradients, most.optimizer, forward, most.total)))


def rows() -> Iterator[dict[str, Any]]:
    for ffn, attention, n_loops, backprop, checkpoint, precision in KINDS:
        if backprop < n_loops:
            recipe = of_kind(ffn, attention, n_loops, backprop, checkpoint, precision)
            shape = f"{ffn}, {n_loops} loops" + (f", {backprop} with a gradient" if backprop else "")
            common = {"bench": "plan", "shape": shape + (", computed again" if checkpoint else "")}
            common |= {"attention": attention, "dtype": precision}
            yield from beside(recipe, common)


def beside(recipe: Recipe, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a step holds at most, and what it keeps for its backward pass on a CPU's paths and on a GPU's."""
    real, formula = measured(recipe), planned(recipe)
    pairs = {"peak bytes": (formula.peak, real.peak), "bytes before the backward pass": (formula.forward, real.forward)}
    if (recipe.train.max_loops, recipe.train.backprop_loops) == (4, 0):
        with as_on_a_gpu():
            on_gpu = measured(recipe)
        pairs["the same, a GPU's paths"] = planned(recipe, fused=True).forward, on_gpu.forward
    for metric, (ours, peer) in pairs.items():
        said = {"metric": metric, "ours": ours, "peer": peer, "peer_name": "measured", "ratio": peer / ours}
        yield common | said | {"ratio_low": None, "ratio_high": None, "ceiling": None, "utilisation": None, "n": 1}
