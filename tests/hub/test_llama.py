"""Plain pretrained transformers: the same logits as transformers' Llama and Mistral, from folders and GGUF files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral

from benchmarks.originals import fill, tokens
from ritornello import cli
from ritornello.hub.converters import CONVERTERS, read_published
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.model.test_parity import Float64Torch

SHAPE: dict[str, Any] = {"vocab_size": 23, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
STEEP = {"rope_theta": 100.0, "rope_type": "default"}
CASES: dict[str, dict[str, Any]] = {
    "head of its own": {},
    "tied, fewer keys": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "wide heads, steep angles": {"num_key_value_heads": 1, "head_dim": 10, "rope_parameters": STEEP},
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their norms and angles force float32, which is float64 here."""
    for module in (llama, mistral):
        monkeypatch.setattr(module, "torch", Float64Torch())


def theirs(case: str, *, kind: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Their model, every number of it by a formula, none at 0 or 1."""
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | CASES[case]))
    else:
        model = MistralForCausalLM(MistralConfig(**SHAPE | CASES[case], sliding_window=None))
    named = dict(model.named_parameters())
    for name, x in fill(named, torch.float64).items():
        named[name].data.copy_(x)
        named[name].data = x.to(dtype)
    return model.to(dtype).eval()


def ours(model: Any) -> RecurrentDepthTransformer:
    body = model.config.to_dict()
    converter = CONVERTERS[body["model_type"]]
    config = converter.config_from(body)
    found = RecurrentDepthTransformer(config).to(model.dtype).eval()
    found.load_state_dict(converter.from_theirs(model.state_dict(), config))
    return found


@torch.no_grad()
def apart(model: RecurrentDepthTransformer, other: nn.Module) -> float:
    return float((model(tokens()).logits - other(tokens()).logits).abs().max())


@every_case
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_logits_of_the_original(case: str, kind: str, exact: None) -> None:
    original = theirs(case, kind=kind)
    model = ours(original)
    assert model.config.is_plain and apart(model, original) < 1e-12
    for weight in model.parameters():  # no weight is left out
        weight.data[..., -1] *= 1.5
        assert apart(model, original) > 1e-6
        weight.data[..., -1] /= 1.5


@every_case
def test_tensors_go_both_ways(case: str) -> None:
    original = theirs(case, dtype=torch.bfloat16)
    model, given = ours(original), dict(original.state_dict())
    if model.config.tie_embeddings:
        del given["lm_head.weight"]
    back = CONVERTERS["llama"].to_theirs(model.state_dict(), model.config)
    assert back.keys() == given.keys() and all(torch.equal(back[name], x) for name, x in given.items())
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), ours(original).parameters(), strict=True))


@every_case
def test_a_published_folder(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by transformers, read here, written again, and run by transformers as ours."""
    original, source, target = theirs(case, dtype=torch.float32), tmp_path / "theirs", tmp_path / "ours"
    original.save_pretrained(source)
    model = read_published(source)
    assert apart(model, original) < 3e-5
    assert cli.main(["convert", "--from", "llama", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    found = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, model(tokens()).logits)


def test_what_it_is_read_as(tmp_path: Path) -> None:
    """A name that is not known may be said to be one that is; angles that follow from the rest may lie beside it."""
    original = theirs("head of its own", dtype=torch.float32)
    original.save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(body | {"model_type": "likewise"}), encoding="utf-8")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_type = 'likewise'"):
        read_published(tmp_path)
    assert apart(read_published(tmp_path, kind="llama"), original) < 3e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling = 'llama3': must be 'default'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096: must be None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    assert CONVERTERS["llama"].config_from(SHAPE).rope_theta == 10_000
    with pytest.raises(ValueError, match=message):
        CONVERTERS["llama"].config_from(SHAPE | changes)


LONG = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
}


def gguf_file(path: Path, *, scaled: bool = False) -> dict[str, Tensor]:
    """A Llama as llama.cpp writes it, matrices of 4 bits, rotary rows as pairs, one piece a byte; its true numbers."""
    config = CONVERTERS["llama"].config_from(SHAPE | LONG | {"tie_word_embeddings": True})
    with torch.device("meta"):
        described = RecurrentDepthTransformer(config).state_dict()
    weights = fill(CONVERTERS["llama"].to_theirs(described, config), torch.float32)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", *bytes_to_unicode().values(), "ab"])
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output", "model.layers": "blk"}
    names |= {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"} | {"model.token": "token"}
    names |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    for name, x in weights.items():
        short = name
        for theirs, shorter in names.items():
            short = short.replace(theirs, shorter)
        heads = {"attn_q": 4, "attn_k": 2}.get(short.split(".")[-2], 0)
        stored = x.view(heads, 2, 4, 32).transpose(1, 2).reshape(x.shape) if heads else x
        packed = quants.quantize(stored.numpy(), GGMLQuantizationType.Q4_1) if x.ndim == 2 else stored.numpy()
        writer.add_tensor(short, packed, raw_dtype=GGMLQuantizationType.Q4_1 if x.ndim == 2 else None)
    if scaled:
        writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / "model.gguf", tmp_path / "ours"
    weights = gguf_file(path)
    assert cli.main(["convert", "--from", "llama", str(path), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    found, original = (
        AutoModelForCausalLM.from_pretrained(target),
        LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    assert found.config.rope_theta == 500 and found.config.eos_token_id == 0
    with torch.no_grad():
        assert (found(tokens()).logits - original.eval()(tokens()).logits).abs().max() < 3e-5
    for name, x in CONVERTERS["llama"].to_theirs(found.native.state_dict(), found.config.shape()).items():
        step = (weights[name].max() - weights[name].min()) / 15
        assert (x - weights[name]).abs().max() <= step if x.ndim == 2 else torch.equal(x, weights[name])
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.decode(tokenizer("to and fro").input_ids) == "to and fro" and tokenizer.eos_token == "<|end|>"


def test_gguf_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source = .*: must be a file"):
        read_published(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("GGUF, not quite", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.gguf: not read as a GGUF model"):
        read_published(tmp_path / "text.gguf")
    gguf_file(tmp_path / "scaled.gguf", scaled=True)
    with pytest.raises(ValueError, match="rope_freqs"):
        read_published(tmp_path / "scaled.gguf")
    gguf_file(tmp_path / "short.gguf")
    whole = (tmp_path / "short.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match="short"):
        read_published(tmp_path / "short.gguf")
