"""No state ever exceeds `state_bound`, whatever the weights; without forgetting, it would."""

import math

import pytest
import torch

from ritornello.model.cache import Passing
from ritornello.model.depth import Depth
from ritornello.model.rdt import RecurrentDepthTransformer, Run
from tests.model.builders import build, stir, tokens_for

KINDS: dict[str, dict] = {
    "first": {},
    "dense": {"ffn": "dense"},
    "mla": {"attention": "mla", "q_lora_rank": 6},
    "pre_post": {"norm": "pre_post"},
    "sandwich": {"norm": "sandwich", "ffn": "dense"},
    "two layers": {"layers": (0, 2, 0), "initial_state": "e"},
    "matrix": {"injection_matrix": True, "initial_state": "noise"},
    "streams": {"carry_streams": 3},
    "streams, pre_post": {"carry_streams": 3, "norm": "pre_post", "initial_state": "noise"},
    "streams, sandwich": {"carry_streams": 3, "norm": "sandwich"},
    "anchored": {"anchored": True, "initial_state": "noise"},
    "input as it is": {"normalize_input": False, "initial_state": "e", "embedding_scale": 3.0, "n_token_tables": 2},
    "input of a sandwich": {"normalize_input": False, "initial_state": "e", "norm": "sandwich", "ffn": "dense"},
    "norm of each loop": {"state_norm": "loop", "injection": "none", "initial_state": "e"},
    "damped": {"loop_scale": (1.0, 0.3)},
    "damped sandwich": {"loop_scale": (0.7, 0.3), "norm": "sandwich", "ffn": "dense"},
    "damped streams, sandwich": {"loop_scale": (1.0, 0.3), "norm": "sandwich", "carry_streams": 3},
    "softmax, free weights": {"router_score": "softmax", "normalize_expert_weights": False, "router_scale": 2.5},
    "one loop's tables": {"n_loops": 1},
    "as Parcae": {"ffn": "dense", "activation": "relu2", "value_embeddings": (0, 1), "qk_norm": True},
    "as Parcae, no norm of e": {"value_embeddings": (0, 1), "normalize_input": False, "initial_state": "noise"},
}


def wild(row: dict, *, factor: float = 3.0) -> RecurrentDepthTransformer:
    """Weights three times too large, nothing at its initial constant, a slow decay in some channels."""
    model = build(row, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "mixing" not in name and not name.startswith("injection"):
                parameter.mul_(factor)
    stir(model, 1)
    return model


@torch.no_grad()
def measured(model: RecurrentDepthTransformer, loops: tuple[int, ...]) -> dict[int, float]:
    """The largest ‖h‖ over tokens within so many loops."""
    tokens = tokens_for(model.config, 3, 4)
    x = model.embed(tokens)
    context = model.context(x, tokens=tokens)
    e = model.prelude(x, context, Passing())
    largest, found = 0.0, {}
    for n, state in enumerate(model.iterate(e, context, Run(Depth.uniform(max(loops)))), 1):
        largest = max(largest, float(state.h.norm(dim=-1).max()))
        if n in loops:
            found[n] = largest
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_measured_states_stay_below(kind: str) -> None:
    model = wild(KINDS[kind])
    for n, norm in measured(model, (4, 64)).items():
        assert 0 < norm <= model.state_bound(n) * (1 + 1e-5)


def test_at_4096_loops() -> None:
    model = wild({"ffn": "dense", "layers": (0, 1, 0), "lora_targets": ()})
    (norm,) = measured(model, (4096,)).values()
    assert norm <= model.state_bound(4096) * (1 + 1e-5)


def test_pre_post_is_tight() -> None:
    """Branches whose outputs agree at every loop come near: the bound is not vacuous."""
    model = build({"norm": "pre_post", "layers": (0, 1, 0)}, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("layernorm.weight") or name == "input_norm.weight":
                p.fill_(1)
        model.injection.A_log.fill_(-3.0)
    (norm,) = measured(model, (64,)).values()
    assert 0.3 < norm / model.state_bound(64) <= 1


def test_add_escapes_the_bound_of_lti() -> None:
    lti, add = (wild({"injection": kind, "ffn": "dense"}) for kind in ("lti", "add"))
    bound = lti.state_bound(4096)
    assert measured(lti, (64,))[64] <= bound
    escaped = measured(add, (64, 600))
    assert escaped[600] > lti.state_bound(10**9) >= bound * 0.999
    assert escaped[64] <= add.state_bound(64), "its own bound grows with the loops"


def test_bound_counts_the_parts() -> None:
    """Each part that can enlarge the state enlarges the bound."""
    base = wild({"ffn": "dense"})
    before = base.state_bound(64)
    for name in (
        "recurrent.0.self_attn.o_proj.loop_B",
        "recurrent.0.mlp.down_proj.weight",
        "recurrent.0.self_attn.v_proj.weight",
        "injection.B",
        "loop_embedding_scale",
        "input_norm.weight",
    ):
        model = wild({"ffn": "dense"})
        with torch.no_grad():
            model.get_parameter(name).mul_(10)
        assert model.state_bound(64) > before, name
    table = wild({"ffn": "dense", "value_embeddings": (1,)})
    assert table.state_bound(64) > before


def test_bound_needs_no_forgetting_factor_below_one() -> None:
    """Infinite rather than an error where nothing is bounded."""
    model = build({"injection": "linear"})
    with torch.no_grad():
        model.injection.weight.mul_(5)
    assert math.isinf(model.state_bound(4096))
