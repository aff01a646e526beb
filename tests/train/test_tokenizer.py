import hashlib
import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ritornello.train.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer, from_json, train_bpe

TEXTS = [
    "the cat sat on the mat; the cat <|endoftext|> sat\n",
    "naïve 日本語 🙂 café\n\n\tthe end",
    "<s></s>[UNK]<pad>",
] * 3
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), train_bpe(TEXTS, 320)]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@each
@given(text=unicode_text)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@given(data=st.binary())
def test_bytes_that_are_no_text_survive_too(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode_batch([data])[0]) == data


@each
@pytest.mark.parametrize("text", ["<|endoftext|>", "<s>", "</s>", "[UNK]", "<|im_start|>", "Ġ", "\0", "<0x0A>", "▁"])
def test_text_that_looks_special_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(f"a{text}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{text}b"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == f"a{text}b"


@each
@given(text=unicode_text, cuts=st.lists(st.integers(0, 50)))
def test_a_stream_says_the_same(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids, stream = tokenizer.encode(text), StreamDecoder(tokenizer)
    edges = [0, *sorted(cuts), len(ids)]
    parts = [stream.push(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join([*parts, stream.finish()]) == text


def test_a_stream_holds_back_half_a_character() -> None:
    tokenizer, stream = ByteTokenizer(), StreamDecoder(ByteTokenizer())
    ids = tokenizer.encode("🙂")
    assert [stream.push([i]) for i in ids] == ["", "", "", "🙂"]
    assert "".join(tokenizer.decode([i]) for i in ids) != "🙂"  # control: token by token it breaks
    assert stream.push(ids[:2]) + stream.finish() == "\N{REPLACEMENT CHARACTER}"


@each
def test_json_brings_it_back(tokenizer: Tokenizer) -> None:
    copy = from_json(tokenizer.to_json())
    assert type(copy) is type(tokenizer)
    assert copy.to_json() == tokenizer.to_json()
    assert copy.token_bytes == tokenizer.token_bytes
    assert copy.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_the_vocabulary_has_the_size_asked_for_where_the_text_allows() -> None:
    assert ByteTokenizer().vocab_size == 257
    assert train_bpe(TEXTS, 270).vocab_size == 270
    assert train_bpe(["ab ab"], 4096).vocab_size < 265
    with pytest.raises(ValueError, match="vocab_size = 256: must be an integer >= 257"):
        train_bpe(TEXTS, 256)


TRAIN = """
import hashlib
from ritornello.train.tokenizer import train_bpe
import sys
print(hashlib.sha256(train_bpe(sys.stdin.read().split("|"), 300).to_json().encode()).hexdigest())
"""


def test_training_does_not_depend_on_threads_or_process() -> None:
    expected = hashlib.sha256(train_bpe("|".join(TEXTS).split("|"), 300).to_json().encode()).hexdigest()
    for n in "1", "3":
        done = subprocess.run(
            [sys.executable, "-c", TRAIN],
            input="|".join(TEXTS),
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "RAYON_NUM_THREADS": n, "PYTHONHASHSEED": n},
        )
        assert done.stdout.strip() == expected
    assert train_bpe([*TEXTS, "zz zz zz zz zz zz zz"], 300).to_json() != train_bpe(TEXTS, 300).to_json()  # control


def test_a_long_word_is_learnt_in_time() -> None:
    word = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 300_000)))
    start = time.process_time()
    tokenizer = train_bpe([f"a {word} z"], 300)
    assert time.process_time() - start < 15  # uncut: more than half a minute
    assert tokenizer.decode(tokenizer.encode(word)) == word


@each
def test_ids_out_of_range_are_named(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id = {bad}: must be in"):
            tokenizer.decode([65, bad])
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])  # pyrefly: ignore
    assert tokenizer.decode(np.array([tokenizer.eos_id])) == ""


@each
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text = '\\ud800': must be valid Unicode \(character 1\)"):
        tokenizer.encode("a\ud800")


BPE = json.loads(TOKENIZERS[1].to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "must be an object"),
        ("{}", "type = None"),
        ('{"type": "Pickle"}', "type = 'Pickle'"),
        (json.dumps({**BPE, "added_tokens": [{"id": 3, "content": "the"}]}), "added_tokens"),
        (json.dumps({**BPE, "normalizer": {"type": "Lowercase"}}), "normalizer"),
        (json.dumps({**BPE, "pre_tokenizer": None}), "pre_tokenizer = None"),
        (json.dumps({**BPE, "model": {**BPE["model"], "vocab": {"a": 0}}}), "every byte needs an id"),
        (json.dumps({**BPE, "model": {**BPE["model"], "vocab": {"a": 7}}}), "without a gap"),
        (json.dumps({**BPE, "model": {**BPE["model"], "vocab": {"a": True}}}), "pieces with ids"),
        (json.dumps({**BPE, "model": {**BPE["model"], "vocab": None}}), "pieces with ids"),
        (json.dumps({**BPE, "model": {**BPE["model"], "merges": [["a", "日"]]}}), "merge = "),
        (json.dumps({**BPE, "model": {**BPE["model"], "merges": {"a": 1}}}), "merges = "),
    ],
)
def test_a_strange_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(text)
