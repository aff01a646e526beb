"""The table of shapes: what it promises about sizes, and that each row can be built."""

import time

import pytest
import torch
from torch import nn

from ritornello.accounting import count_parameters
from ritornello.config import ModelConfig
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.presets import PRESETS, preset

# Total parameters with GQA and with MLA.
TOTALS = {
    "1b": (1_002_996_737, 1_004_311_297),
    "3b": (2_990_458_369, 2_990_626_817),
    "10b": (10_004_813_825, 9_999_844_353),
    "50b": (49_974_267_905, 49_873_623_041),
    "100b": (99_533_040_641, 99_370_862_337),
    "500b": (503_037_785_089, 502_450_365_441),
    "1t": (1_001_930_797_057, 1_000_793_680_897),
    "tiny": (2_741_922, 2_785_314),
    "140m-rdt": (140_013_312, 141_201_152),
    "140m-plain": (140_010_240, 141_198_080),
    "370m-rdt": (370_201_600, 366_281_728),
    "370m-plain": (370_197_504, 366_277_632),
    "770m-rdt": (767_639_040, 765_301_248),
    "770m-plain": (767_632_896, 765_295_104),
    "1.3b-rdt": (1_300_342_784, 1_290_930_176),
    "1.3b-plain": (1_300_334_592, 1_290_921_984),
    "tiny-plain": (2_744_256, 2_800_320),
    "tiny-dense": (422_272, 465_664),
    "tiny-dense-plain": (421_760, 465_152),
}
ACTIVE = {"1b": 0.114, "3b": 0.326, "10b": 0.856, "50b": 3.26, "100b": 5.65, "500b": 22.6, "1t": 42.0}  # billions, GQA
UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}
CASES = [(name, kind) for name in PRESETS for kind in ("gqa", "mla")]


def meta(config: ModelConfig) -> RecurrentDepthTransformer:
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def nominal(name: str) -> float:
    """The total that a name states: `1.3b-rdt` is 1.3e9."""
    number = name.split("-")[0]
    return float(number[:-1]) * UNITS[number[-1]]


def test_the_totals_above_are_of_all_presets() -> None:
    assert TOTALS.keys() == PRESETS.keys()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_builds_on_the_meta_device_with_its_total(name: str, kind: str) -> None:
    config = preset(name, attention=kind)
    start = time.process_time()
    model = meta(config)
    assert time.process_time() - start < 2
    assert all(p.is_meta for p in model.parameters())
    total = TOTALS[name][kind == "mla"]
    assert size(model) == total == count_parameters(config)["total"]
    if not name.startswith("tiny"):
        assert total == pytest.approx(nominal(name), rel=0.015)


def test_control_a_total_notices_one_row_more() -> None:
    assert size(meta(preset("1b", vocab_size=32769))) != TOTALS["1b"][0]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str) -> None:
    counts = count_parameters(preset(name))
    assert counts["active"] / 1e9 == pytest.approx(ACTIVE[name], rel=0.005)
    assert 0.04 < counts["active"] / counts["total"] < 0.12


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("tiny")])
def test_the_rules_of_the_table(name: str) -> None:
    c = PRESETS[name]
    assert c.dim % 128 == c.ffn_dim % 128 == 0 and c.head_dim in (64, 128)
    if c.ffn == "moe":
        assert (c.n_experts, c.n_active_experts, c.n_shared_experts, c.n_loops) == (384, 8, 1, 16)
        assert c.expert_dim % 128 == 0 and c.ffn_dim == 9 * c.expert_dim
    else:
        assert (c.vocab_size, c.tie_embeddings, c.n_loops) == (32768, True, 8)


@pytest.mark.parametrize("name", ["140m", "370m", "770m", "1.3b", "tiny-dense"])
def test_a_pair_differs_in_looping_alone(name: str) -> None:
    looped, plain = preset(name if name == "tiny-dense" else f"{name}-rdt"), preset(f"{name}-plain")
    assert looped.n_layers == plain.n_layers and plain.is_plain and not looped.is_plain
    injection_and_norm = 4 * looped.dim
    assert size(meta(looped)) - size(meta(plain)) == injection_and_norm


def test_tiny_sizes_match() -> None:
    tiny, total = count_parameters(preset("tiny")), {name: TOTALS[name][0] for name in TOTALS}
    assert total["tiny-plain"] == pytest.approx(tiny["total"], rel=0.015)
    assert total["tiny-dense"] == pytest.approx(tiny["active"], rel=0.015)


def test_tiny_has_all_parts() -> None:
    c = preset("tiny")
    assert (c.ffn, c.n_experts, c.injection, c.halting) == ("moe", 384, "lti", "gate")
    assert c.lora_rank and c.loop_embedding


@pytest.mark.parametrize("name", ["tiny", "tiny-plain", "tiny-dense", "tiny-dense-plain"])
def test_tiny_runs(name: str) -> None:
    model = RecurrentDepthTransformer(preset(name))
    assert model(torch.zeros(1, 4, dtype=torch.int64), n_loops=2).logits.isfinite().all()


def test_any_field_can_be_replaced() -> None:
    assert preset("1b", dim=512, n_heads=8).dim == 512
    assert preset("1b").dim == 1024


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("2b", {}, r"preset = '2b': must be one of 1b, 3b, "),
        ("770m-rtd", {}, r"did you mean '770m-rdt'"),
        ("1b", {"dims": 4}, r"preset override = 'dims': must be a field of ModelConfig"),
        ("1b", {"attention": "mha"}, r"attention = 'mha': must be one of gqa, mla"),
        ("1b", {"n_kv_heads": 3}, r"n_heads = 16: must be a multiple of n_kv_heads"),
    ],
)
def test_a_mistake_names_its_field(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preset(name, **options)
