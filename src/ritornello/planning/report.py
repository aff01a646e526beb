"""A plan as plain facts: for JSON, and as rows to read."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ritornello.accounting import POLICIES, count_parameters, kv_bytes_per_token
from ritornello.config import ModelConfig
from ritornello.planning import hardware
from ritornello.planning.plan import NO_PIPELINE, Candidate, Plan
from ritornello.planning.roofline import achieved, depth, flops, sent

Facts = dict[str, Any]
ASSUMED = {
    "attention": "one kernel that keeps no scores: flash, cuDNN or memory-efficient",
    "memory": f"{hardware.USABLE:.0%} of it usable",
    "products": f"{hardware.ATTAINABLE:.0%} of their peak rate",
    "memory's rate": f"{hardware.MEMORY_SHARE:.0%} of its peak",
    "links": f"{hardware.LINK_SHARE:.0%} of their peak, and nothing sent while something is computed",
    "experts": "as many tokens for each",
}


def facts(plan: Plan, *, tokens: float | None = None) -> Facts:
    """Bytes, seconds, FLOPs. tokens: a budget, for which days and GPU hours are given."""
    best, asked = plan.best, plan.asked
    recipe = best.recipe
    mean, trained = depth(recipe)
    found: Facts = {"parameters": {name: n for name, n in count_parameters(recipe.model).items() if name != "shares"}}
    found["run"] = {
        "gpus": asked.n_gpus,
        "context": recipe.data.seq_len,
        "batch_sequences": recipe.train.batch_size,
        "batch_tokens": recipe.train.batch_size * recipe.data.seq_len,
        "mean_loops": mean,
        "loops_with_gradient": trained,
        "optimizer": recipe.train.optimizer,
        "precision": recipe.train.precision,
    }
    found["layout"] = asdict(best.layout) | {
        "microbatch_size": recipe.train.microbatch_size,
        "checkpoint_activations": recipe.train.checkpoint_activations,
    }
    found["reasons"] = plan.reasons | {"pipeline": NO_PIPELINE}
    found["memory_bytes"] = _memory(best)
    found["step"] = _step(best)
    if tokens is not None:
        days = tokens / found["step"]["tokens_per_second"] / 86400
        found["budget"] = {"tokens": tokens, "days": days, "gpu_hours": 24 * days * asked.n_gpus}
    found["inference_bytes"] = inference(recipe.model, recipe.data.seq_len)
    found["next_best"] = [_short(x) for x in plan.next_best]
    found["assumed"] = ASSUMED | {"gpu": asked.gpu.source}
    return found


def _memory(x: Candidate) -> Facts:
    parts = {name: round(n) for name, n in asdict(x.memory).items()}
    return {"needed_when": x.moment, **parts, "total": round(x.memory.total), "usable": round(x.gpu.usable)}


def _step(x: Candidate) -> Facts:
    n_tokens = x.recipe.train.batch_size * x.recipe.data.seq_len
    trained, again = flops(x.recipe)
    return {
        "flops": trained * n_tokens,
        "flops_again": again * n_tokens,
        "seconds": x.time.step,
        "seconds_of_products": x.time.products,
        "seconds_of_memory": x.time.memory,
        "seconds_sending": x.time.sent,
        "bytes_sent": {name: round(part.n_bytes) for name, part in sent(x.recipe, x.layout).items()},
        "tokens_per_second": n_tokens / x.time.step,
        "share_of_peak": achieved(x.recipe, x.layout, x.gpu),
    }


def _short(x: Candidate) -> Facts:
    again = x.recipe.train.checkpoint_activations
    return {"layout": str(x.layout), "checkpoint_activations": again, "seconds": x.time.step, "bytes": x.memory.total}


def inference(config: ModelConfig, seq_len: int) -> Facts:
    """Weights in bfloat16, and a sequence's keys and values, by how many loops keep theirs."""
    kept = {p: seq_len * kv_bytes_per_token(config, n_loops=config.n_loops, policy=p) for p in POLICIES}
    found: Facts = {"weights": 2 * count_parameters(config)["total"], "n_loops": config.n_loops}
    return found | {f"keys_and_values_{policy}": n for policy, n in kept.items()}


UNITS = {"bytes": (1e9, "GB"), "flops": (1e15, "PFLOP"), "seconds": (1, "s")}


def rows(found: Mapping[str, Any]) -> Facts:
    """The same with units, to read."""
    return {_words(name): _row(name, value) for name, value in found.items() if value not in ({}, [])}


def _row(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_words(inner): _quantity(f"{name} {inner}", number) for inner, number in value.items()}
    return {x["layout"]: _next_best(x) for x in value} if isinstance(value, list) else _quantity(name, value)


def _next_best(x: Facts) -> str:
    again = ", activations computed again" if x["checkpoint_activations"] else ""
    return f"{x['seconds']:.3g} s, {x['bytes'] / 1e9:.1f} GB{again}"


def _quantity(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{inner} {_quantity(name, number)}" for inner, number in value.items()) or "nothing"
    if isinstance(value, bool | str) or "n_loops" in name:
        return str(value)
    if "share" in name:
        return f"{value:.1%}"
    unit = next((unit for word, unit in UNITS.items() if word in name and "tokens" not in name), None)
    return value if unit is None else f"{value / unit[0]:,.3g} {unit[1]}"


def _words(name: str) -> str:
    return name.replace("_", " ").removesuffix(" bytes")
