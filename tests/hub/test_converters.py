"""Published looped models say the same as their own code: where that is at hand, and from frozen numbers everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.originals import CASES, CONVERTERS, SETTINGS, ours, theirs, tokens
from ritornello import cli
from ritornello.hub import RitornelloForCausalLM
from ritornello.hub.converters import read_published
from ritornello.model.cache import Cache
from ritornello.model.rdt import RecurrentDepthTransformer
from tests.hub.at_hand import original

every_case = pytest.mark.parametrize(("name", "kind"), CASES)
TYPES = {"huginn": ("model_type", "huginn_raven"), "ouro": ("model_type", "ouro")}
TYPES |= {"parcae": ("_class_name", "ParcaeConfig")}
LOOPS = (1, 3, 6)


@torch.no_grad()
def apart(model: RecurrentDepthTransformer, other: torch.Tensor, n_loops: int) -> float:
    ids = tokens(*other.shape[:2])
    return float((model(ids, n_loops=n_loops).logits - other).abs().max())


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=["f64", "f32"])
@pytest.mark.filterwarnings("ignore")  # of code that was written for transformers 4
def test_logits_of_the_original(name: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, code = ours(name, SETTINGS[name][kind], dtype), original(name, SETTINGS[name][kind], dtype)
    found = {n: code.logits(tokens(), n) for n in LOOPS}
    for n, logits in found.items():
        assert logits.dtype == dtype
        assert apart(model, logits, n) <= tolerance < 0.1 < apart(model, logits, n + 1)
    assert CONVERTERS[name].config_from(code.model.config.to_dict()) == model.config


@every_case
def test_frozen_logits_of_the_original(name: str, kind: str) -> None:
    frozen = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    logits, n = torch.tensor(frozen["logits"][name][kind], dtype=torch.float64)[None], frozen["n_loops"]
    model = ours(name, SETTINGS[name][kind], torch.float64)
    assert apart(model, logits, n) <= 1e-12
    for weight in model.parameters():  # no weight is left out
        change = (0.1 * weight.abs().max()).item()
        weight.data += change * (torch.arange(weight.numel()) % 3 - 0.9).view(weight.shape)
        idle = weight.shape in ((1,), (1, model.config.dim))  # a gate, which no rule reads here
        assert (apart(model, logits, n) > 1e-6) != idle
        weight.data -= change * (torch.arange(weight.numel()) % 3 - 0.9).view(weight.shape)


@every_case
def test_tensors_go_both_ways(name: str, kind: str) -> None:
    model, given = ours(name, SETTINGS[name][kind], torch.bfloat16), theirs(name, SETTINGS[name][kind], torch.bfloat16)
    back = CONVERTERS[name].to_theirs(model.state_dict(), model.config)
    assert back.keys() == given.keys() and all(torch.equal(back[key], given[key]) for key in given)
    again = CONVERTERS[name].from_theirs(back, model.config)
    assert all(torch.equal(again[key], x) for key, x in model.state_dict().items())
    storages = {x.untyped_storage().data_ptr() for x in again.values()}
    assert len(storages) == len(again), "parts of a joined matrix would hold all of it"


@every_case
@torch.no_grad()
def test_token_by_token(name: str, kind: str) -> None:
    """From a cache, at the depth of its own and deeper."""
    model, ids = ours(name, SETTINGS[name][kind], torch.float64), tokens()
    for n in (model.config.n_loops, 6):
        whole = model(ids, n_loops=n).logits
        cache = Cache(model.config, batch_size=2, max_len=9, n_loops=n, dtype=torch.float64)
        parts = [model(part, n_loops=n, cache=cache).logits for part in (ids[:, :4], *ids[:, 4:].split(1, 1))]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12


def written(folder: Path, name: str, **changes: Any) -> Path:
    """A published folder: weights in two files with their index."""
    kind, kind_of = next(iter(SETTINGS[name])), TYPES[name]
    weights = theirs(name, SETTINGS[name][kind], torch.float32)
    if name == "huginn":  # its files hold what follows from the rest, too
        weights |= {
            "freqs_cis": torch.ones(1, 64, 1, 3, 2),
            "lm_head.weight": weights["transformer.wte.weight"].clone(),
        }
    if name == "parcae":
        weights |= {
            "freqs_cis": torch.ones(1, 64, 1, 5, 2),
            "lm_head.weight": weights["transformer.wte.weight"].clone(),
        }
    half = len(weights) // 2
    names, index = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], {}
    for file, keys in zip(names, ([*weights][:half], [*weights][half:]), strict=True):
        index |= dict.fromkeys(keys, file)
        save_file({key: weights[key].contiguous() for key in keys}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({kind_of[0]: kind_of[1], **SETTINGS[name][kind], **changes}))
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_a_published_folder(name: str, tmp_path: Path) -> None:
    read, made = read_published(written(tmp_path, name)), ours(name, next(iter(SETTINGS[name].values())), torch.float32)
    assert read.config == made.config and not read.training
    assert all(torch.equal(read.state_dict()[key], x) for key, x in made.state_dict().items())
    with torch.no_grad():
        assert torch.equal(read(tokens()).logits, made(tokens()).logits)


REFUSED: list[tuple[str, str, Any, str]] = [
    ("huginn", "nonlin_name", "GELU", "nonlin_name = 'GELU': must be 'SiLU'"),
    ("huginn", "n_embd", None, "n_embd = None: must be given"),
    ("huginn", "n_embd", "24", "n_embd = '24': must be an integer"),
    ("huginn", "n_embd", 25, "n_embd = 25: must be a multiple of n_heads"),
    ("huginn", "injection_type", "add", "injection_type = 'add': must be 'linear'"),
    ("huginn", "model_type", "ourou", "did you mean 'ouro'?"),
    ("huginn", "vocab_size", 24, "wrong shape"),
    ("huginn", "qk_bias", False, "not in this model"),
    ("huginn", "n_layers_in_coda", 2, "missing"),
    ("huginn", "n_layers_in_coda", -1, "n_coda_layers = -1"),
    ("ouro", "rope_scaling", {"rope_type": "yarn"}, "rope_scaling = 'yarn': must be 'default'"),
    ("ouro", "rope_theta", None, "rope_theta = None: must be given"),
    ("ouro", "rope_scaling", "yarn", "rope_scaling = 'yarn': must be an object"),
    ("ouro", "layer_types", ["sliding_attention"], "layer_types"),
    ("ouro", "layer_types", [{}], "layer_types"),
    ("ouro", "hidden_act", "gelu", "hidden_act = 'gelu': must be 'silu'"),
    ("parcae", "_class_name", "GPTConfig", "model_type = 'GPTConfig': must be one of"),
    ("parcae", "norm_class_name", None, "norm_class_name = 'LayerNorm': must be 'RMSNorm'"),
    ("parcae", "nonlin_name", "GELU", "nonlin_name = 'GELU': must be 'ReLU2'"),
    ("parcae", "logit_softcap", 15.0, "logit_softcap = 15.0: must be None"),
    ("parcae", "clip_qkv", 8, "clip_qkv = 8: must be None"),
    ("parcae", "num_key_value_heads", 2, "num_key_value_heads = 2: must be 4"),
    ("parcae", "recurrent_embedding_dimension", 32, "recurrent_embedding_dimension = 32: must be 40"),
    ("parcae", "init_strategy", "llama", "init_strategy = 'llama': must be one of"),
    ("parcae", "state_init", "unit", "state_init = 'unit': must be one of"),
    ("parcae", "injection_type", "diagnal", "did you mean 'diagonal'?"),
    ("parcae", "rope_settings", [1], "rope_settings = [1]: must be an object"),
    ("parcae", "rope_settings", {"rope_condense_ratio": 2}, "rope_condense_ratio = 2: must be 1"),
    ("parcae", "n_layers_in_coda", 10**12, "n_layers_in_coda = 1000000000000: must be an integer in [0, 1024]"),
    ("parcae", "n_embd", 16, "n_embd = 16: must be >= 32"),
    ("parcae", "prelude_norm", False, "not in this model"),
    ("parcae", "mean_recurrence", None, "mean_recurrence = None: must be given"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), REFUSED, ids=str)
def test_what_is_refused(name: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json|safetensors") as error:
        read_published(written(tmp_path, name, **{field: value}))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_converted_for_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line's folder says through transformers what the model says, token by token, too."""
    (tmp_path / "published").mkdir()
    published = written(tmp_path / "published", name, eos_token_id=[0, 1])
    (published / "tokenizer_config.json").write_text('{"ü": 1}', encoding="utf-8")
    target = tmp_path / "a" / "converted"
    assert cli.main(["convert", str(published), str(target), "--max-shard", "10KB"]) == 0
    assert capsys.readouterr().out.strip() == str(target) and len(list(target.glob("*.safetensors"))) > 1
    assert (target / "tokenizer_config.json").read_bytes() == (published / "tokenizer_config.json").read_bytes()
    found = AutoModelForCausalLM.from_pretrained(target)
    assert isinstance(found, RitornelloForCausalLM) and found.config.eos_token_id == [0, 1]
    model, ids = read_published(published), tokens()
    with torch.no_grad():
        for n in (model.config.n_loops, 5):
            assert torch.equal(found(ids, n_loops=n).logits, model(ids, n_loops=n).logits)
    text = found.generate(ids[:, :4], max_new_tokens=5, do_sample=False, n_loops=5, eos_token_id=None)
    assert torch.equal(text[:, 4:], model(text[:, :-1], n_loops=5).logits[:, 3:].argmax(-1))
    assert cli.main(["convert", str(published), str(target)]) == 2
    assert "a folder that does not exist yet" in capsys.readouterr().err


def test_numbers_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "ouro")
    file = folder / "model-00001-of-00002.safetensors"
    weights = load_file(file)
    save_file({name: x.to(torch.int8) if name == "lm_head.weight" else x for name, x in weights.items()}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight int8 instead of float32"):
        read_published(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = written(tmp_path, "ouro")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="names of safetensors files"):
        read_published(folder)
