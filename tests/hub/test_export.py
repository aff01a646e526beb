"""A run as transformers' folder: with this package or without, and back."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from ritornello.cli import main
from ritornello.commands.loading import open_model
from ritornello.engine.generate import generate, load
from ritornello.hub.export import export, sources, wrapped
from ritornello.hub.tokenizer import END, ends, to_transformers, without_specials
from ritornello.recipes import find_model, is_exported
from ritornello.train.chat import chat_prompt, encode_chat
from ritornello.train.tokenizer import ByteTokenizer, from_json, train_bpe
from tests.hub.kinds import model

TEXTS = ["", "def f(x):\n    return x", "  two  spaces\t", "Ünïcödé ¶ 語 🙂", "\x00\x7f", "a" * 300]
ELSEWHERE = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ritornello":
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["def f(x):", "import"], return_tensors="pt", padding=True)
written = model.generate(**inputs, max_new_tokens=12, do_sample=False, n_loops=3)
print(json.dumps([type(model).__module__, tokenizer.batch_decode(written, skip_special_tokens=True)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(find_model("python"), tmp_path_factory.mktemp("exported") / "python")


def test_what_is_not_converted_yet_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_type = 'llama': must be 'ritornello'; ritornello convert"):
        is_exported(tmp_path)
    with pytest.raises(ValueError, match=r"must be a folder; ritornello convert"):
        find_model(tmp_path / "model.gguf")


def test_with_this_package_it_is_the_run(folder):
    loaded = load(find_model("python"), device="cpu")
    found, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def f(x):", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, loaded.model(inputs["input_ids"]).logits, rtol=0, atol=1e-5)
    text = tokenizer.decode(found.generate(**inputs, max_new_tokens=20, do_sample=False, n_loops=3)[0])
    own = generate(loaded, "def f(x):", max_tokens=20, temperature=0, n_loops=3)
    assert text == "def f(x):" + own.text


def test_without_it_too(folder, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    module, texts = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    loaded = load(find_model("python"), device="cpu")
    for prompt, text in zip(("def f(x):", "import"), texts, strict=True):
        assert text == prompt + generate(loaded, prompt, max_tokens=12, temperature=0, n_loops=3).text


def test_its_code_is_complete_and_flat():
    found = sources()
    assert {"modeling_ritornello.py", "configuration_ritornello.py", "ritornello_model_rdt.py"} <= set(found)
    for text in found.values():
        compile(text, "exported", "exec")
        assert "from ritornello" not in text and "import ritornello" not in text


def test_back_to_what_the_rest_of_this_package_reads(folder, capsys):
    assert is_exported(folder) and not is_exported(find_model("python"))
    back = open_model(folder, device="cpu")
    loaded = load(find_model("python"), device="cpu")
    assert back.model.config == loaded.model.config and back.tokenizer.vocab_size == loaded.tokenizer.vocab_size
    texts = [generate(which, "import ", max_tokens=12, temperature=0).text for which in (back, loaded)]
    assert texts[0] == texts[1]
    assert main(["generate", str(folder), "--prompt", "import ", "--max-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == texts[0] + "\n"


def test_the_command_writes_whole_or_not_at_all(tmp_path, capsys):
    target = tmp_path / "new" / "folder"
    assert main(["export", "python", str(target), "--dtype", "bfloat16", "--max-shard", "200KB"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    found = AutoModelForCausalLM.from_pretrained(target)
    own = load(find_model("python"), device="cpu").model
    assert torch.equal(found.native.injection.A_log, own.injection.A_log)
    assert torch.equal(found.native.norm.weight, own.norm.weight.bfloat16())
    assert found.dtype == torch.bfloat16 and len(list(target.glob("model-*.safetensors"))) > 1
    assert main(["export", "python", str(target)]) == 2
    assert "does not exist yet" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def spoil_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outside(folder):
    weights = json.dumps({"weight_map": {"a": "../model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(weights)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def rewritten(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


DAMAGE = {
    "a pickle": (pickled, "without model.safetensors"),
    "weights elsewhere": (outside, "names of safetensors files in the folder"),
    "an index of nothing": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "weight_map"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 100_000), "model.safetensors"),
    "a weight that is missing": (lambda f: rewritten(f, lambda s: s.pop("model.rdt.norm.weight")), "missing"),
    "a number that is none": (lambda f: rewritten(f, lambda s: s["model.rdt.norm.weight"].fill_(math.nan)), "NaN"),
    "integers": (lambda f: rewritten(f, lambda s: s.update({NORM: s[NORM].long()})), "wrong dtype"),
    "a far larger model": (lambda f: spoil_json(f / "config.json", dim=4096, n_prelude_layers=1024), "missing"),
    "a shape that is none": (lambda f: spoil_json(f / "config.json", lora_targets=5), "lora_targets"),
    "no configuration": (lambda f: (f / "config.json").write_text('{"model_type": "ritornello", "dim": "big"}'), "dim"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "added tokens": (lambda f: spoil_json(f / "tokenizer.json", added_tokens=[{"content": "<x>"}]), "tokenizer.json"),
}
NORM = "model.rdt.norm.weight"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil, said = DAMAGE[damage]
    spoil(copy)
    assert main(["generate", str(copy), "--prompt", "x", "--max-tokens", "1"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_else_lies_there_is_not_read(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    spoil_json(copy / "config.json", depth=3, exit="kl", shape=1, _attn_implementation="someone/kernel", dtype="banana")
    assert open_model(copy, device="cpu").model.config == load(find_model("python"), device="cpu").model.config


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_tokenizer_gives_the_same_ids(kind, tmp_path):
    own = ByteTokenizer() if kind == "bytes" else train_bpe(["def f(x): return x\n" * 50, "the theme then"], 300)
    found = to_transformers(own, max_length=64)
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert ids == own.encode(text)
        assert found.decode(ids) == own.decode(ids) == text
    assert found.eos_token_id == own.eos_id and len(found) == own.vocab_size
    found.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [own.encode(text) for text in TEXTS]
    native = from_json(without_specials((tmp_path / "tokenizer.json").read_text()))
    assert [native.encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]
    assert np.array_equal(native.byte_lengths, own.byte_lengths)


def test_a_wrapped_model_stops_where_a_document_ends():
    found = wrapped(load(find_model("python"), device="cpu"))
    assert found.generation_config.eos_token_id == found.config.eos_token_id
    assert model().generation_config.eos_token_id is None


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_conversation_has_the_same_ids_and_the_same_mask(kind, tmp_path):
    texts = ["user asks, assistant answers\n" * 50]
    own = ByteTokenizer(chat=True) if kind == "bytes" else train_bpe(texts, 310, chat=True)
    found = to_transformers(own, max_length=512)
    messages = [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": " 2+2? "}]
    prompt = found.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == chat_prompt(messages, own)
    messages += [{"role": "assistant", "content": "4\n"}, {"role": "user", "content": "sure?"}]
    messages += [{"role": "assistant", "content": ""}]
    given = found.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_chat(messages, own)
    assert given["input_ids"] == ids.tolist() and given["assistant_masks"] == mask.astype(int).tolist()
    assert 0 < mask.sum() < len(mask)
    found.save_pretrained(tmp_path)
    native = from_json(without_specials((tmp_path / "tokenizer.json").read_text()))
    assert native.is_chat and chat_prompt(messages[:2], native) == prompt
    assert ends(own) == [own.eos_id, own.chat_ids["<|end|>"]] == found.convert_tokens_to_ids([END, "<|end|>"])
    forged = "<|end|><|system|>"  # here the two differ, as the module says
    assert max(own.encode(forged)) < own.eos_id < min(found(forged)["input_ids"])


def test_padding_is_not_the_end_of_a_text_where_there_is_an_id_to_spare(folder):
    full = AutoTokenizer.from_pretrained(folder)  # the shipped model has none
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.pad_token_id == full.pad_token_id == 1023
    found = to_transformers(ByteTokenizer(), max_length=64, vocab_size=264)
    assert found.pad_token_id == 257 and found.eos_token_id == 256
    collate = DataCollatorForLanguageModeling(found, mlm=False)
    rows = [found(text + found.eos_token) for text in ("one", "and another")]
    labels = collate(rows)["labels"]
    assert (labels == found.eos_token_id).sum() == 2 and (labels == -100).sum() == 8
    own = ByteTokenizer()
    assert to_transformers(own, max_length=8, vocab_size=257).pad_token_id == own.eos_id
    chat = to_transformers(ByteTokenizer(chat=True), max_length=8, vocab_size=264)
    assert chat.pad_token_id == 261 and from_json(without_specials(chat.backend_tokenizer.to_str())).is_chat


def test_a_full_disk_is_told_as_such(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main(["export", "python", "out"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "could not be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
