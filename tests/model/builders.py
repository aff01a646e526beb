"""Tiny models over every entry of the model's tables, and the comparisons that tests share."""

import random
from functools import cache
from itertools import combinations, pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ritornello import config as settings
from ritornello.config import ExitRule, ModelConfig
from ritornello.model.halting import EXIT_TESTS, HALTING_HEADS, LEARNED_RULES, Signals
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.model.state import LoopState

VOCAB = 37

# Every choice that changes what the model computes. Literals are read, so that a new entry is covered unasked.
FACTORS: dict[str, tuple[Any, ...]] = {
    "attention": get_args(settings.Attention),
    "injection": get_args(settings.Injection),
    "halting": get_args(settings.Halting),
    "norm": get_args(settings.Norm),
    "ffn": get_args(settings.Ffn),
    "initial_state": get_args(settings.InitialState),
    "read_out": get_args(settings.ReadOut),
    "kv_sharing": get_args(settings.KvSharing),
    "positions": get_args(settings.Positions),
    "router_score": ("sigmoid", "softmax"),
    "carry_streams": (1, 3),
    "anchored": (False, True),
    "injection_matrix": (False, True),
    "router_bias_per_loop": (False, True),
    "normalize_expert_weights": (True, False),
    "n_active_groups": (2, 1),
    "lora_targets": (get_args(settings.LoraTarget), ("q", "o", "ffn"), ()),
    "loop_embedding": (True, False),
    "q_lora_rank": (0, 6),
    "n_shared_experts": (1, 0),
    "n_token_tables": (1, 2),
    "tie_embeddings": (True, False),
    "embedding_scale": (1.0, 3.0),
    "qk_bias": (False, True),
    "qk_norm": (False, True),
    "value_embeddings": ((), (0, 2)),
    "activation": get_args(settings.Activation),
    "read_matrix": (False, True),
    "noise_std": (settings.NOISE_STD, 0.1),
    "normalize_input": (True, False),
    "state_norm": get_args(settings.StateNorm),
    "loop_scale": ((1.0, 1.0), (1.0, 0.3)),
    "layers": ((1, 1, 1), (0, 2, 1), (1, 2, 0)),
    "policy": get_args(settings.CachePolicy),  # of the cache, not of the model
}

Choice = tuple[str, Any]
Row = dict[str, Any]


# The smallest shape in which nothing coincides with anything else.
BASE: Row = {
    "vocab_size": VOCAB,
    "dim": 16,
    "n_loops": 4,
    "max_seq_len": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "ffn_dim": 24,
    "n_experts": 8,
    "n_active_experts": 2,
    "expert_dim": 8,
    "n_expert_groups": 2,
    "n_active_groups": 2,
    "lora_rank": 2,
}


def tiny(*, layers: tuple[int, int, int] = (1, 1, 1), policy: str = "per_loop", **changes: Any) -> ModelConfig:
    """`layers`: of prelude, recurrent block and coda. `policy` belongs to the cache and changes nothing here."""
    names = ("n_prelude_layers", "n_recurrent_layers", "n_coda_layers")
    return ModelConfig(**(BASE | dict(zip(names, layers, strict=True)) | changes))


def refusal(row: Row) -> str:
    """Why this combination is refused; empty if it is not."""
    try:
        tiny(**row)
    except ValueError as error:
        return str(error)
    return ""


@cache
def covering() -> tuple[tuple[Row, ...], dict[tuple[Choice, Choice], str]]:
    """Rows in which every pair of entries of different factors occurs, and the pairs that the configuration refuses,
    with its reason. Greedy: a pair not yet seen is completed at random, the completion that adds most pairs kept.
    """
    draw = random.Random(0)
    entries = [(name, value) for name, values in FACTORS.items() for value in values]
    pairs = [(a, b) for a, b in combinations(entries, 2) if a[0] != b[0]]
    seen: set[tuple[Choice, Choice]] = set()
    rows: list[Row] = []
    refused = {pair: reason for pair in pairs if (reason := refusal(dict(pair))) and not completions(pair, draw, 1)}
    for pair in pairs:
        if pair not in seen and pair not in refused:
            best = max(completions(pair, draw, 50), key=lambda row: len(set(combinations(row.items(), 2)) - seen))
            rows.append(best)
            seen.update(combinations(best.items(), 2))
    return tuple(rows), refused


def completions(pair: tuple[Choice, Choice], draw: random.Random, n: int) -> list[Row]:
    """Up to n valid rows that hold both entries."""
    rows: list[Row] = []
    for _ in range(50):
        if len(rows) == n:
            break
        row = repaired({name: draw.choice(values) for name, values in FACTORS.items()} | dict(pair), pair)
        if not refusal(row):
            rows.append(row)
    return rows


def repaired(row: Row, pair: tuple[Choice, Choice]) -> Row:
    """Most random rows are refused for one of a few reasons; undo those where the pair leaves a choice."""
    fixed = dict(pair)
    row = dict(row)
    if row["injection"] == "none" and "initial_state" not in fixed:
        row["initial_state"] = "e"
    if row["read_out"] == "mixture" and row["halting"] != "act" and "read_out" not in fixed:
        row["read_out"] = "last"
    if row["anchored"] and row["carry_streams"] > 1 and "carry_streams" not in fixed:
        row["carry_streams"] = 1
    if row["anchored"] and row["state_norm"] == "loop" and "state_norm" not in fixed:
        row["state_norm"] = "none"
    for name in ("qk_bias", "qk_norm", "value_embeddings"):
        if row["attention"] == "mla" and name not in fixed:
            row[name] = FACTORS[name][0]
    undone: Row = {}
    if row["value_embeddings"] and row["n_token_tables"] > 1:
        undone = {"n_token_tables": 1, "value_embeddings": ()}
    row |= dict([(name, value) for name, value in undone.items() if name not in fixed][:1])
    undone = {"ffn": "dense", "activation": "swiglu"} if row["ffn"] == "moe" and row["activation"] == "relu2" else {}
    row |= dict([(name, value) for name, value in undone.items() if name not in fixed][:1])
    if row["attention"] == "mla" and "lora_targets" not in fixed:
        row["lora_targets"] = tuple(target for target in row["lora_targets"] if target not in ("k", "v"))
    return row


def label(row: Row) -> str:
    """Only what differs from the first entries."""
    parts = [f"{n}={v}" for n, v in row.items() if v != FACTORS[n][0]]
    return ",".join(parts).replace(" ", "").replace("'", "") or "first"


every_kind = pytest.mark.parametrize("row", covering()[0], ids=label)


def build(row: Row | ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> RecurrentDepthTransformer:
    """A model in evaluation mode in which every parameter matters: none is left at 0 or 1."""
    config = row if isinstance(row, ModelConfig) else tiny(**row)
    model = RecurrentDepthTransformer(config, seed=seed).to(dtype).eval()
    stir(model, seed)
    return model


@torch.no_grad()
def stir(model: nn.Module, seed: int = 0) -> None:
    """Move parameters that start at a constant away from it, or what they multiply would go untested."""
    generator = torch.Generator().manual_seed(seed)
    constant = (
        "loop_B",
        "norm.weight",
        "bias",
        "scale",
        "A_log",
        "dt",
        ".B",
        "_weight",
        "mixing",
        "head.linear.weight",
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(constant):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            tensor.add_(noise, alpha=0.2)


def tokens_for(config: ModelConfig, batch: int, length: int, *, seed: int = 0) -> Tensor:
    """(B, T), or (B, T, C) with C token tables."""
    shape = (batch, length) if config.n_token_tables == 1 else (batch, length, config.n_token_tables)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def rules_for(config: ModelConfig) -> tuple[str, ...]:
    """The names of the exit rules that this model can follow."""
    if config.halting in HALTING_HEADS:
        if config.read_out == "mixture":
            return LEARNED_RULES
        return (*LEARNED_RULES, "delta", *(("kl", "entropy") if config.needs_probe else ()))
    return ("delta", *(("kl", "entropy") if config.needs_probe else ()))


@torch.no_grad()
def lively(model: RecurrentDepthTransformer, tokens: Tensor, name: str, n_loops: int, **options: Any) -> ExitRule:
    """The rule with the threshold at which tokens of this batch stop at as many different loops as possible."""
    states = model(tokens, n_loops=n_loops, trajectory=True, weigh=True, **options).trajectory
    values = torch.stack([signal(model, name, *pair) for pair in pairwise(states[:-1])])
    fires = torch.ge if name in LEARNED_RULES else torch.lt
    ordered = values.flatten().sort().values
    first = [(fires(values, x).cumsum(0) == 0).sum(0).unique().numel() for x in (ordered[1:] + ordered[:-1]) / 2]
    best = max(range(len(first)), key=first.__getitem__)
    return ExitRule(name, float(ordered[best] + ordered[best + 1]) / 2, min_loops=2)  # the first loop was not looked at


def signal(model: RecurrentDepthTransformer, name: str, before: LoopState, now: LoopState) -> Tensor:
    """(B, T): what a rule compares with its threshold."""
    if name == "hazard":
        return now.halt.weight / before.halt.survival
    if name == "cumulative":
        return 1 - now.halt.survival
    h, old = model.carry.mean(now.h), model.carry.mean(before.h)
    log_probs = [model.logits(model.probe(x)).log_softmax(-1) if model.probe else None for x in (h, old)]
    return EXIT_TESTS[name](Signals(h, old, *log_probs))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal within an absolute tolerance, made for float64 values of order 1."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def differ(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    """The positive control of `close`: it would have noticed."""
    with pytest.raises(AssertionError):
        close(actual, expected, tolerance)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By parameter name, 0 where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)
