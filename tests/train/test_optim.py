import pytest
from torch import nn

from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train.optim import build_optimizers, groups, set_learning_rate
from tests.train.small import model_config, train_config

KINDS = {
    "moe": {"loop_embedding": True, "lora_targets": ("q", "o", "ffn")},
    "mla": {"attention": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    "mla q": {"attention": "mla", "q_lora_rank": 4, "qk_rope_head_dim": 4, "tie_embeddings": False},
    "linear": {"injection": "linear", "halting": "gate", "anchored": True},
    "matrix": {"injection_matrix": True, "halting": "act", "carry_streams": 3, "norm": "sandwich"},
    "plain": {"n_recurrent_layers": 0, "n_token_tables": 2},
}
ADAMW = {  # parts of a name that Muon never sees, and whether AdamW decays them
    "embed_tokens": False,
    "norm": False,
    "layernorm": False,
    "injection": False,
    "carry": False,
    "loop_embedding": False,
    "router": False,
    "probe": False,
    "halting": False,
    "head": True,
    "loop_A": True,
    "loop_B": True,
    "experts.gate_up_proj": True,
    "experts.down_proj": True,
}


def expected(name: str, parameter: nn.Parameter) -> str:
    if "shared_experts" in name and "loop_" not in name:
        return "muon"
    found = [decays for part, decays in ADAMW.items() if part in name]
    if found:
        return "decay" if all(found) else "no_decay"
    assert parameter.ndim == 2 and "proj" in name, name
    return "muon"


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_the_group_its_name_says(kind, optimizer):
    model = RecurrentDepthTransformer(model_config(**KINDS[kind]))
    table = groups(model, train_config(optimizer=optimizer))
    found = {name: group for group, members in table.items() for name in members}
    wanted = {name: expected(name, parameter) for name, parameter in model.named_parameters()}
    if optimizer == "adamw":
        wanted = {name: "decay" if group == "muon" else group for name, group in wanted.items()}
    assert found == wanted
    assert sum(map(len, table.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_each_parameter_has_one_optimizer_and_its_options(optimizer):
    model = RecurrentDepthTransformer(model_config())
    train = train_config(optimizer=optimizer, weight_decay=0.3)
    optimizers = build_optimizers(model, train)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    options = {group["name"]: group for o in optimizers for group in o.param_groups}
    assert options.keys() == ({"decay", "no_decay", "muon"} if optimizer == "muon" else {"decay", "no_decay"})
    assert {name: group["weight_decay"] for name, group in options.items()} == {
        name: 0.0 if name == "no_decay" else 0.3 for name in options
    }


def test_a_part_that_is_frozen_is_in_no_group():
    model = RecurrentDepthTransformer(model_config())
    model.prelude_layers.requires_grad_(False)
    names = {name for members in groups(model, train_config()).values() for name in members}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("prelude_layers")}


def test_rates_scale_from_each_groups_peak():
    train = train_config(optimizer="muon", lr=1e-3, muon_lr=5e-3)
    optimizers = build_optimizers(RecurrentDepthTransformer(model_config()), train)
    for scale in (0.5, 0.1):
        set_learning_rate(optimizers, scale)
        rates = {group["name"]: group["lr"] for o in optimizers for group in o.param_groups}
        assert rates == {"decay": 1e-3 * scale, "no_decay": 1e-3 * scale, "muon": 5e-3 * scale}
