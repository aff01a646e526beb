"""Published layers in our block, against transformers' DeepSeek-V3 with the same random weights, in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import modeling_rope_utils
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from ritornello.hub.deepseek import config_from, recurrent_block
from ritornello.hub.shards import dequantize
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.builders import close, differ
from tests.model.test_parity import Float64Torch, causal_mask, compare, draw, randomize, through
from tests.model.test_parity import T as LENGTH

B, VOCAB, DIM = 2, 23, 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_mtp_layers": 0,
    "max_position_embeddings": 64,
    "q_lora_rank": None,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "n_routed_experts": 12,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2, "beta_slow": 1}
YARN |= {"rope_theta": 500.0, "mscale": 1.0, "mscale_all_dim": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "queries projected at once": {},
    "queries through a latent, groups": {"q_lora_rank": 14, "n_group": 4, "topk_group": 2},
    "shared experts, weights as they are": {
        "n_shared_experts": 3,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
    },
    "YaRN": {"q_lora_rank": 14, "rope_parameters": YARN},
    "YaRN of one ramp, another epsilon": {
        "rope_parameters": YARN | {"beta_fast": 1.0, "factor": 32.0},
        "rms_norm_eps": 1e-3,
        "q_lora_rank": 14,
    },
    "YaRN, queries at once, halves": {"rope_parameters": YARN, "rope_interleave": False},
}
WHOLE: dict[str, Any] = {"prelude": [0], "ends": True, "n_loops": 1, "injection": "none", "initial_state": "e"}
WHOLE |= {"normalize_input": False}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (deepseek, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", Float64Torch())


def published(folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> DeepseekV3ForCausalLM:
    """A model whose weights are all random, saved in several shards."""
    config = DeepseekV3Config(**(SHAPE | changes))
    config._attn_implementation = config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).to(dtype).eval()
    randomize(model)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def edit(path: Path, **changes: Any) -> None:
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in body.items() if value is not ...}))


def layer_of(theirs: DeepseekV3ForCausalLM, number: int, x: Tensor) -> Tensor:
    angles = theirs.model.rotary_emb(x, torch.arange(LENGTH)[None])
    return theirs.model.layers[number](x, causal_mask(), position_embeddings=angles)


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_a_layer(exact: None, tmp_path: Path, setting: str) -> None:
    theirs, x = published(tmp_path, **SETTINGS[setting]), draw(B, LENGTH, DIM)
    model = recurrent_block(tmp_path, [2], max_seq_len=32).model().double().eval()
    layer = model.recurrent[0]
    compare(lambda: through(model, layer, x), expected := layer_of(theirs, 2, x), layer)
    layer.mlp.router.e_score_correction_bias.zero_()
    differ(through(model, layer, x), expected, 1e-3)


@pytest.mark.parametrize(
    "lost", [{"rope_interleave": False}, {"rope_parameters": SHAPE["rope_parameters"]}, {"rms_norm_eps": 1e-6}]
)
@torch.no_grad()
def test_control_what_the_configuration_says_matters(exact: None, tmp_path: Path, lost: dict[str, Any]) -> None:
    theirs, x = published(tmp_path, **SETTINGS["YaRN of one ramp, another epsilon"]), draw(B, LENGTH, DIM)
    edit(tmp_path / "config.json", **lost)
    model = recurrent_block(tmp_path, [2]).model().double().eval()
    differ(through(model, model.recurrent[0], x), layer_of(theirs, 2, x), 1e-4)


@pytest.mark.parametrize("setting", ["queries through a latent, groups", "YaRN"])
@torch.no_grad()
def test_a_whole_model(exact: None, tmp_path: Path, setting: str) -> None:
    """One loop over all layers with experts, between theirs without and their head; e is not normed, as it is there."""
    theirs, ids = published(tmp_path, **SETTINGS[setting]), torch.randint(VOCAB, (B, 20))
    model = recurrent_block(tmp_path, [1, 2], **WHOLE).model().double().eval()
    expected = theirs(ids, use_cache=False).logits
    normed = recurrent_block(tmp_path, [1, 2], **WHOLE | {"normalize_input": True}).model().double().eval()
    differ(normed(ids).logits, expected, 1e-2)
    close(model(ids).logits, expected, 1e-10)
    cache = Cache(model.config, batch_size=B, max_len=20, dtype=torch.float64)
    parts = [model(piece, cache=cache).logits for piece in (ids[:, :17], *ids[:, 17:].split(1, 1))]
    close(torch.cat(parts, 1), expected, 1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_half_precision_runs(tmp_path: Path, setting: str) -> None:
    """Where something was scaled, types differ within a layer."""
    published(tmp_path, torch.bfloat16, **SETTINGS[setting])
    half = recurrent_block(tmp_path, [2], prelude=[0], ends=True, n_loops=2).model().eval()
    full = recurrent_block(tmp_path, [2], prelude=[0], ends=True, n_loops=2, dtype=torch.float32).model().eval()
    ids = torch.randint(VOCAB, (B, 9))
    apart = (half(ids).logits - full(ids).logits).abs()
    assert 0 < apart.median() < 0.05  # of logits about 1; an expert chosen otherwise moves some by more


@torch.no_grad()
def test_as_it_is_stored(tmp_path: Path) -> None:
    """bfloat16 stays, norms and routers become float32; the loop around the layer is new."""
    published(tmp_path, torch.bfloat16)
    made = recurrent_block(tmp_path, [1, 2], n_loops=3, lora_rank=2, n_coda_layers=1)
    kinds = {name.rpartition("layers.")[2].partition(".")[2]: x.dtype for name, x in made.state.items()}
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {
        f"{i}.{name}"
        for i in range(2)
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.kv_a_layernorm.weight",
            "mlp.router.weight",
            "mlp.router.e_score_correction_bias",
        )
    }
    model = made.model(seed=1)
    out = model(torch.randint(VOCAB, (1, 9)), n_loops=5)
    assert out.logits is not None and out.logits.isfinite().all() and out.loops_used.eq(5).all()
    apart = recurrent_block(tmp_path, [1, 2], n_loops=3, router_bias_per_loop=True).model()(torch.zeros(1, 2).long())
    assert apart.logits is not None and apart.logits.isfinite().all()
    own = set(model.state_dict()) - set(made.state)
    assert "injection.A_log" in own and not any("experts" in name for name in own)


PUBLISHED = {  # what the two families' config.json say, and billions of parameters, published as 671 and 1,000
    "DeepSeek-V3": ({"topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_theta": 10000}, 671.03),
    "Kimi-K2": (
        {"model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64}
        | {"n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "rope_theta": 50000.0}
        | {"routed_scaling_factor": 2.827},
        1026.4,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_family_is_as_large(name: str) -> None:
    """Every layer, on the meta device."""
    changes, billions = PUBLISHED[name]
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    theirs = DeepseekV3Config().to_dict() | {"rope_parameters": None, "max_position_embeddings": 163840}
    theirs |= {"rope_scaling": scaling | {"mscale": 1.0, "mscale_all_dim": 1.0}, "scoring_func": "sigmoid"} | changes
    dense, n = theirs["first_k_dense_replace"], theirs["num_hidden_layers"]
    whole = config_from(theirs, range(dense, n), **(WHOLE | {"prelude": range(dense)}))
    with torch.device("meta"):
        model = RecurrentDepthTransformer(whole)
    assert sum(x.numel() for x in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-4)
    assert whole.yarn == (40.0, 4096, 32.0, 1.0) and whole.router_scale == theirs["routed_scaling_factor"]


BLOCKED = {"hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 136, "q_lora_rank": 130}
BLOCKED |= {"n_routed_experts": 3, "num_hidden_layers": 2, "num_experts_per_tok": 2}


def by_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8, scales of blocks of 128, and the product: a block at a time."""
    rows, columns = (list(range(0, n, 128)) for n in weight.shape)
    small, back = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            place = slice(row, row + 128), slice(column, column + 128)
            scales[i, j] = weight[place].abs().max() / 448
            small[place] = (weight[place] / scales[i, j]).to(small.dtype)
            back[place] = small[place].float() * scales[i, j]
    return small, scales, back


def quantized(folder: Path) -> dict[str, Tensor]:
    """The matrices of layers that FP8 releases quantise, now in blocks; returned: what they are worth in float32."""
    worth: dict[str, Tensor] = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(index.values())):
        found = load_file(folder / file)
        for name in [name for name, x in found.items() if "_proj" in name and x.ndim == 2]:
            found[name], found[f"{name}_scale_inv"], worth[name] = by_blocks(found[name])
            index[f"{name}_scale_inv"] = file
        save_file(found, folder / file)
    edit(folder / "model.safetensors.index.json", weight_map=index)
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit(folder / "config.json", quantization_config=said)
    return worth


def test_fp8_is_what_its_blocks_say_bit_for_bit(tmp_path: Path) -> None:
    published(tmp_path, torch.float32, **BLOCKED)
    worth = quantized(tmp_path)
    found = recurrent_block(tmp_path, [1]).state
    place = "model.layers.1.mlp."
    for i in range(3):
        gate, up = (worth[f"{place}experts.{i}.{name}_proj.weight"] for name in ("gate", "up"))
        assert torch.equal(found["recurrent.0.mlp.experts.gate_up_proj"][i], torch.cat((gate, up)))
    kv_a = worth["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    assert torch.equal(found["recurrent.0.self_attn.kv_a_proj_with_mqa.weight"][:10], kv_a[:10])
    assert torch.equal(found["recurrent.0.self_attn.kv_a_proj_with_mqa.weight"][10:14], kv_a[10::2])
    down = "mlp.shared_experts.down_proj.weight"
    assert torch.equal(found[f"recurrent.0.{down}"], worth[f"model.layers.1.{down}"])
    half = recurrent_block(tmp_path, [1], dtype=torch.bfloat16).state[f"recurrent.0.{down}"]
    assert torch.equal(half, worth[f"model.layers.1.{down}"].bfloat16())


@pytest.mark.parametrize("shape", [(128, 128), (1, 300), (257, 129), (5, 7)])
def test_dequantize(shape: tuple[int, int]) -> None:
    small, scales, back = by_blocks(torch.randn(shape))
    assert torch.equal(dequantize(small, scales), back)
    precise = dequantize(small, scales, dtype=torch.float64)
    assert torch.equal(precise.float(), back) and precise.dtype == torch.float64
    if scales.numel() > 1:  # control: scales of the wrong blocks
        assert not torch.equal(dequantize(small, scales.flip(0, 1)), back)


def test_only_shards_of_the_layer_are_read(tmp_path: Path) -> None:
    published(tmp_path, torch.float32)
    before = recurrent_block(tmp_path, [2]).state
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in places.items() if name.startswith("model.layers.2.")}
    others = set(places.values()) - needed
    assert needed and others
    for file in others:
        (tmp_path / file).write_bytes(b"\x80\x04nothing that may be read")
    assert all(torch.equal(before[name], x) for name, x in recurrent_block(tmp_path, [2]).state.items())
    with pytest.raises(ValueError, match=r"not a safetensors file; pickles are never loaded"):
        recurrent_block(tmp_path, [1])


def test_without_an_index(tmp_path: Path) -> None:
    model = published(tmp_path / "sharded", torch.float32)
    model.save_pretrained(tmp_path / "one")
    one, several = (recurrent_block(tmp_path / name, [1, 2]).state for name in ("one", "sharded"))
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"config.json: model_type = 'llama': must be one of deepseek_v3, kimi_k2"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax': must be one of sigmoid"),
        ({"attention_bias": True}, r"attention_bias = True"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads = 2: must be num_attention_heads \(4\)"),
        ({"kv_lora_rank": ...}, r"kv_lora_rank = 'nothing': must be given"),
        ({"kv_lora_rank": "ten"}, r"kv_lora_rank"),
        (
            {"kv_lora_rank": 11},
            r"safetensors: 'model.layers.1.self_attn.kv_a_proj_with_mqa.weight': shape = \[18, 24\]",
        ),
        ({"n_routed_experts": 13}, r"safetensors: 'model.layers.1.mlp.gate.e_score_correction_bias': shape"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5.0}}, r"rope_scaling type = 'linear'"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, r"rope_scaling mscale = 0.7: must be mscale_all_dim \(1.0\)"),
        ({"rope_parameters": YARN | {"mscale_all_dim": "1"}}, r"mscale_all_dim = '1': must be a finite number"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, r"yarn_factor = 0.5: must be a finite number in \[1, "),
        ({"rope_parameters": YARN | {"beta_fast": 0.5}}, r"yarn_fast = 0.5: must be a finite number in \[1, "),
        ({"rope_interleave": "no"}, r"rope_interleave = 'no'"),
        ({"first_k_dense_replace": "1"}, r"first_k_dense_replace = '1': must be an integer"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, r"quant_method = 'compressed-tensors'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weight_block_size = None: must be two integers"),
        ({"num_hidden_layers": 1}, r"layers = \[1\]: must be numbers in \[0, 0\]"),
    ],
)
def test_a_configuration_that_ours_cannot_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    published(tmp_path, torch.float32)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        recurrent_block(tmp_path, [1])


@pytest.mark.parametrize(
    ("layers", "more", "message"),
    [
        ([0, 1], {}, r"layers = \[0, 1\]: must be all below 1, which are dense, or none"),
        ([], {}, r"layers = \[\]: must be numbers in \[0, 2\], at least one"),
        ([3], {}, r"layers = \[3\]"),
        ([1], {"prelude": [2]}, r"prelude_layers = \[2\]: must be layers without experts"),
        ([1], {"n_heads": 8}, r"n_heads = 8: must be left out: the checkpoint decides it"),
        ([1], {"n_loop": 8}, r"shape = 'n_loop': .*did you mean 'n_loops'"),
    ],
)
def test_a_wish_that_does_not_fit(tmp_path: Path, layers: list[int], more: dict[str, Any], message: str) -> None:
    published(tmp_path, torch.float32)
    with pytest.raises(ValueError, match=message):
        recurrent_block(tmp_path, layers, **more)


def spoil(folder: Path, how: str) -> None:
    index, name = folder / "model.safetensors.index.json", "model.layers.1.mlp.gate.weight"
    places = json.loads(index.read_text())["weight_map"]
    path = folder / places[name]
    found = load_file(path)
    if how == "outside":
        edit(index, weight_map=places | {name: "../elsewhere.safetensors"})
    elif how == "link":
        path.rename(folder / "blob")
        path.symlink_to(folder / "blob")
    elif how == "lost":
        path.unlink()
    elif how == "unlisted":
        edit(index, weight_map={key: file for key, file in places.items() if key != name})
    elif how == "elsewhere":
        other = next(file for file in sorted(places.values()) if file != path.name)
        edit(index, weight_map=places | {name: other})
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        bad = {"nan": found[name].index_fill(0, torch.tensor([1]), torch.nan), "integers": found[name].long()}
        bad |= {"unscaled": found[name].to(torch.float8_e4m3fn)}
        save_file(found | {name: bad[how]}, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("outside", r"weight_map = '../elsewhere.safetensors': must be the name of a safetensors file in the folder"),
        ("link", r"safetensors: a regular file must hold 'model.layers.1.*a folder of its own"),
        ("lost", r"safetensors: a regular file must hold 'model.layers.1.*download this shard too"),
        ("unlisted", r"index.json: no tensor 'model.layers.1.mlp.gate.weight'"),
        ("elsewhere", r"safetensors: no tensor 'model.layers.1.mlp.gate.weight'"),
        ("cut", r"safetensors: not a valid safetensors file"),
        ("nan", r"safetensors: NaN or infinite values in 'model.layers.1.mlp.gate.weight'"),
        ("integers", r"safetensors: 'model.layers.1.mlp.gate.weight': dtype = 'I64': must be one of"),
        ("unscaled", r"safetensors: 'model.layers.1.mlp.gate.weight': FP8 without a weight_block_size"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, how: str, message: str) -> None:
    published(tmp_path, torch.float32)
    spoil(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        recurrent_block(tmp_path, [1])
