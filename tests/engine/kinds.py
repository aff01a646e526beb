"""Models of every kind that the engine serves, requests, and what each gets alone."""

import random
from typing import Any

import torch

from ritornello.config import ExitName, ExitRule, ModelConfig
from ritornello.engine.engine import Engine
from ritornello.engine.generate import decode
from ritornello.engine.request import Request
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.builders import build, signal, tokens_for

HUGINN = {
    "injection": "linear",
    "state_norm": "read",
    "normalize_input": False,
    "embedding_scale": 4.0,
    "qk_bias": True,
}
OURO = {"injection": "none", "state_norm": "loop", "normalize_input": False, "layers": (1, 2, 0), "lora_targets": ()}
PARCAE = {"ffn": "dense", "activation": "relu2", "injection_matrix": True, "qk_norm": True, "read_matrix": True}
PARCAE |= {"value_embeddings": (0, 1), "noise_std": 0.2, "initial_state": "noise"}
KINDS: dict[str, tuple[dict[str, Any], ExitName | None]] = {  # settings, and the exit rule
    "gqa": ({"halting": "none"}, None),
    "mla": ({"halting": "none", "attention": "mla"}, None),
    "act": ({"halting": "act", "read_out": "mixture"}, None),
    "act exits": ({"halting": "act", "read_out": "mixture"}, "cumulative"),
    "kl": ({"halting": "kl", "lora_targets": ("q", "k", "v", "o", "ffn")}, "kl"),
    "delta, mla": ({"halting": "kl", "attention": "mla"}, "delta"),
    "gate": ({"halting": "gate"}, "hazard"),
    "streams": ({"halting": "kl", "carry_streams": 3}, "entropy"),
    "first": ({"halting": "kl", "kv_sharing": "first"}, "kl"),
    "noise": ({"halting": "none", "initial_state": "noise", "norm": "sandwich"}, None),
    "bias by loop": ({"halting": "none", "router_bias_per_loop": True, "positions": "none"}, None),
    "as Huginn": ({"halting": "none", "initial_state": "noise", "norm": "sandwich", **HUGINN}, "delta"),
    "as Ouro": ({"halting": "state_gate", "initial_state": "e", "norm": "pre_post", **OURO}, "cumulative"),
    "as Parcae": ({"halting": "none", **PARCAE}, "delta"),
    "damped": ({"halting": "none", "loop_scale": (1.0, 0.3), **OURO, "initial_state": "e"}, "delta"),
    "plain": ({"halting": "none", "layers": (2, 0, 1)}, None),
    "bare": ({"halting": "none", "layers": (0, 1, 0)}, None),
}


def prompts(config: ModelConfig, n: int, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(config.vocab_size), k=rng.randint(1, 23)) for _ in range(n)]


def alone(model: RecurrentDepthTransformer, request: Request) -> tuple[list[int], list[int]]:
    """Tokens, and the loops of each, by the slow way."""
    how: Any = {"n_loops": request.n_loops, "exit": request.exit, "sampling": request.sampling}
    found = decode(model, [request.prompt], n_new=request.max_tokens, **how)
    pairs = [(int(token), int(loops)) for token, loops in found]
    return [token for token, _ in pairs], [loops for _, loops in pairs]


def answers(engine: Engine, numbers: list[int]) -> dict[int, tuple[list[int], list[int]]]:
    found: dict[int, tuple[list[int], list[int]]] = {number: ([], []) for number in numbers}
    for event in engine.run():
        if event.token is not None:
            found[event.number][0].append(event.token)
            found[event.number][1].append(event.loops)
    return found


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[RecurrentDepthTransformer, ExitRule | None]:
    """The model of a kind, and a rule by which some of its tokens leave early."""
    row, name = KINDS[kind]
    model = build(row, dtype=dtype).eval()
    return model, None if name is None else ruled(model, name)


def ruled(model: RecurrentDepthTransformer, name: ExitName) -> ExitRule:
    """With the threshold that half of the model's tokens pass after their second loop."""
    with torch.no_grad():
        first, second = model(tokens_for(model.config, 6, 12), n_loops=3, trajectory=True, weigh=True).trajectory[:2]
        return ExitRule(name, float(signal(model, name, first, second).median()), min_loops=1)


def is_empty(engine: Engine) -> bool:
    """Whether nothing is held any more but by prefixes, which are forgotten."""
    engine.prefixes.clear()
    return engine.pages.n_used == engine.exact and engine.lanes.n_free == engine.lanes.n_lanes - engine.exact
