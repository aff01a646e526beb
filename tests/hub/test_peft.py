"""PEFT's adapters around every kind of weight: what is trained, saved, loaded and merged."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from tests.hub.kinds import model, tokens

# PEFT 0.21 asks by a name that transformers 5.23 is leaving
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLOSE = {"rtol": 0, "atol": 1e-12}
NAMED = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "dense": ("dense", {"target_modules": NAMED}),
    "moe": ("moe", {"target_modules": NAMED}),
    "mla": ("mla", {"target_modules": "all-linear"}),
    "experts": ("moe", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "head": ("dense", {"target_modules": ["q_proj", "head"]}),
    "whole modules": ("dense", {"target_modules": ["q_proj"], "modules_to_save": ["input_norm", "head"]}),
    "dora": ("moe", {"target_modules": "all-linear", "use_dora": True}),
}
each = pytest.mark.parametrize("case", CASES)


def adapted(case):
    kind, options = CASES[case]
    base = model(kind).double()
    before = base(tokens()).logits
    found = get_peft_model(base, LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return found.eval(), before


def gradients(found, x):
    found.zero_grad()
    found.train()(x, labels=x).loss.backward()
    found.eval()
    return {name: p.grad.clone() for name, p in found.named_parameters() if p.grad is not None}


@each
def test_only_the_adapter_is_trained_with_or_without_recomputation(case):
    found, _ = adapted(case)
    x = tokens()
    grads = gradients(found, x)
    trained = {name for name, p in found.named_parameters() if p.requires_grad}
    assert trained == set(grads) and all(("lora_" in name) or ("modules_to_save" in name) for name in trained)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    found.get_base_model().activation_checkpointing_enable()
    for name, grad in gradients(found, x).items():
        torch.testing.assert_close(grad, grads[name], **CLOSE)


@each
def test_saved_loaded_and_merged(case, tmp_path):
    found, before = adapted(case)
    x = tokens()
    logits, deeper = found(x).logits, found(x, n_loops=5).logits
    assert (logits - before).abs().max() > 0.1
    found.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert len(saved) == sum(p.requires_grad for p in found.parameters()) and not any("loop_" in name for name in saved)
    again = PeftModel.from_pretrained(model(CASES[case][0]).double(), tmp_path).eval()
    assert torch.equal(again(x).logits, logits)
    with again.disable_adapter():
        assert torch.equal(again(x).logits, before)
    merged = again.merge_and_unload()
    assert type(merged) is type(model()) and not any("lora_" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(x).logits, logits, **CLOSE)
    torch.testing.assert_close(merged(x, n_loops=5).logits, deeper, **CLOSE)


@each
def test_adapters_work_in_a_cache(case):
    """MLA's absorption reads weights, around which an adapter lies."""
    found, _ = adapted(case)
    x = tokens()
    whole = found(x).logits
    first = found(x[:, :6], use_cache=True)
    cache = first.past_key_values
    parts = [first.logits, *(found(x[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
