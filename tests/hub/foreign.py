"""Tokenizers and chat templates as published models come with them, made here."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "",
    " ",
    "hello there, the theme returns",
    "  two  spaces\t",
    "line\n\n  next 2026\n",
    "Ünïcödé ¶ 語 🙂",
    "\x00\x7f",
    "naïve ▁ <0x41> end",
    "a" * 300,
]
CORPUS = ["hello there, the theme returns; two spaces and the next line of 2026\n", "is the user there? the end."] * 20

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Be brief.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
TRIMS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"""  # as Llama 3's does
PLAIN = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if message['role'] == 'user' -%}
{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
LOUD = CHATML.replace("message['content']", "message['content'] | upper")


@cache
def byte_level() -> str:
    """SmolLM2's kind: specials are ids 0 … 3, digits stand alone, nothing is put before a text."""
    found = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    found.pre_tokenizer, found.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special: Any = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer: Any = trainers.BpeTrainer
    found.train_from_iterator(
        CORPUS, trainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    found.add_tokens(["<think>"])
    found.add_special_tokens([AddedToken("<|tool|>", rstrip=True, special=True)])
    return found.to_str()


@cache
def pieces(kind: str = "first") -> str:
    """Llama 2's kind: bytes as pieces, a sign for the space, <s> before a text; `legacy`: by a normalizer."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer: Any = trainers.BpeTrainer
    learnt.train_from_iterator(CORPUS, trainer(vocab_size=60, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    more = ["<", "/", "/s", "/s>", "[", "]", "I", "N", "S", "T"]  # so that text can become "</s>", as in Llama's own
    merges = [*map(tuple, model["merges"]), ("/", "s"), ("/s", ">"), ("<", "/s>")]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*first, *words, *more, ">"]))}
    kind_of: Any = models.BPE
    found = Tokenizer(kind_of(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "legacy":
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*plain, *([] if kind == "never" else [decoders.Strip(" ", 1, 0)])])
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in first[:3]])
    found.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return found.to_str()


@cache
def unigram() -> str:
    """SentencePiece's other kind, in which a special token is a piece like any other."""
    words = ["<unk>", "</s>", "▁", "▁the", *"abcdefhilmnorstu<>/", "re"]
    kind: Any = models.Unigram
    found = Tokenizer(kind([(word, 0.0 if word[0] == "<" else -float(i)) for i, word in enumerate(words)], unk_id=0))
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found.add_special_tokens(["<unk>", "</s>"])
    return found.to_str()


NAMES: dict[str, dict[str, str]] = {
    "bytes": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
    "pieces": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
KINDS = {
    "bytes": (byte_level, NAMES["bytes"]),
    "pieces": (pieces, NAMES["pieces"]),
    "legacy": (lambda: pieces("legacy"), NAMES["pieces"]),
    "always": (lambda: pieces("always"), NAMES["pieces"]),
    "never": (lambda: pieces("never"), NAMES["pieces"]),
}


def folder_of(folder: Path, kind: str = "bytes", *, template: str | None = None, **about: Any) -> Path:
    """A published folder's files of text. about: more of tokenizer_config.json."""
    text, names = KINDS[kind]
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(text(), encoding="utf-8")
    found = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names, **about}
    (folder / "tokenizer_config.json").write_text(json.dumps(found), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def spoilt(folder: Path, change: Any) -> Path:
    """With another tokenizer.json."""
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(body if (found := change(body)) is None else found), encoding="utf-8")
    return folder
