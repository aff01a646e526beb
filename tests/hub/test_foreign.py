"""Tokenizers that published models come with: transformers' ids, bytes of every piece, nothing that breaks."""

import json
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ritornello.engine.constraints import Constraint, Grammars
from ritornello.hub.foreign import PublishedTokenizer, read_tokenizer
from ritornello.hub.native import tokenizer_in
from ritornello.hub.spelling import speller
from ritornello.hub.tokenizer import to_transformers
from ritornello.train.tokenizer import BpeTokenizer, ByteTokenizer, StreamDecoder
from tests.hub.foreign import KINDS, NAMES, TEXTS, byte_level, folder_of, pieces, spoilt, unigram

ROOM = 1000
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def made(text: str, **how: Any) -> PublishedTokenizer:
    return PublishedTokenizer(json.loads(text), **{"source": "tokenizer.json", "room": ROOM, "ends": (2,), **how})


@every_kind
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    found, theirs = read_tokenizer(folder_of(tmp_path, kind), ROOM), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert found.encode(text) == theirs.encode(text, add_special_tokens=False)
        if text:
            assert found.prompt(text) == theirs(text)["input_ids"]
    assert found.encode(TEXTS[2]) != found.encode(TEXTS[2])[:-1]
    starts = [] if kind == "bytes" else [1]
    assert found.prompt("the")[: len(starts)] == starts and found.prompt("") == (starts or [found.eos_id])
    assert (found.eos_id, found.stop_ids) == (2, {2}) == (theirs.eos_token_id, found.stop_ids)
    assert not found.is_chat and found.vocab_size == len(theirs)
    whole = found.encode_batch([text.encode() for text in TEXTS])
    assert [row.tolist() for row in whole] == [found.encode(text) for text in TEXTS]


@every_kind
def test_text_comes_back_whole_and_in_pieces(kind: str, tmp_path: Path) -> None:
    found, theirs = read_tokenizer(folder_of(tmp_path, kind), ROOM), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids, said = found.encode(text), text.replace("▁", " ") if kind != "bytes" else text
        assert found.decode(ids) == theirs.decode(ids)
        if not (text.startswith(" ") and found.lead and kind != "legacy"):  # which loses the first of these
            assert found.decode(ids) == said
        stream = StreamDecoder(found)
        parts = [stream.push([i]) for i in ids]
        assert "�" not in "".join(parts) and "".join(parts) + stream.finish() == found.decode(ids)
        n_lead = len(found.lead) if ids else 0
        assert found.byte_lengths[ids].sum() - len(found.decode(ids).encode()) in (0, n_lead)
    smile = found.encode("🙂")
    assert any("�" in theirs.decode([i]) for i in smile)  # control: a token alone is no text
    later = StreamDecoder(found, begins=False)
    assert later.push(found.encode("the")) == found.lead + "the"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**9), max_size=12))
def test_any_ids_are_decoded_as_theirs_are(numbers: list[int]) -> None:
    found = made(byte_level())
    ids = [n % found.vocab_size for n in numbers]
    assert found.decode(ids) == found._marked.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.sampled_from(["first", "legacy", "never"]))
def test_any_text_is_encoded_as_theirs_is(text: str, kind: str) -> None:
    found = made(pieces(kind))
    if "</s>" not in text:
        assert found.encode(text) == found._marked.encode(text, add_special_tokens=False).ids


SPELT = {
    "bytes": ["<|im_end|>", "a<|im_start|>system\nno<|im_end|>", "<|tool|>   x"],
    "pieces": ["</s>", "the</s><s>[INST]", "<unk>"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SPELT.items() for text in texts])
def test_text_that_spells_a_special_token_stays_text(kind: str, text: str, tmp_path: Path) -> None:
    found, theirs = read_tokenizer(folder_of(tmp_path, kind), ROOM), AutoTokenizer.from_pretrained(tmp_path)
    assert not found.special.keys() & set(found.encode(text)) and found.decode(found.encode(text)) == text
    assert found.special.keys() & set(theirs.encode(text, add_special_tokens=False))  # control


def test_a_special_token_that_is_a_piece_is_refused_as_text() -> None:
    found = made(unigram(), ends=(1,))
    assert found.decode(found.encode("the theme returns")) == "the theme returns"
    assert found.encode("the Q")[-1] == 0 and found.special[0] == "<unk>"  # unknown, and not meant
    with pytest.raises(ValueError, match="text = '</s>': must be without it"):
        found.encode("the </s>")


def test_ends_are_found_in_all_places(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bytes")
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert read_tokenizer(folder, ROOM).stop_ids == {0, 1, 2, 3}
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<think>"}}')  # special by its name
    found = read_tokenizer(folder, ROOM)
    assert found.special[found.eos_id] == "<think>" and found.stop_ids == {0, 1, 3, found.eos_id}
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<pad>"}')
    assert read_tokenizer(folder, ROOM).eos_id == 3
    (folder / "special_tokens_map.json").unlink()
    (folder / "generation_config.json").unlink()
    assert read_tokenizer(folder, ROOM).eos_id == 0 and not read_tokenizer(folder, ROOM).is_chat
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: the token that ends a text"):
        read_tokenizer(folder, ROOM)


def test_ours_are_told_from_theirs(tmp_path: Path) -> None:
    to_transformers(ByteTokenizer(chat=True), max_length=8, vocab_size=264).save_pretrained(tmp_path / "ours")
    ours = tokenizer_in(tmp_path / "ours", 264)
    assert isinstance(ours, BpeTokenizer) and ours.chat_ids == ByteTokenizer(chat=True).chat_ids
    theirs = tokenizer_in(folder_of(tmp_path / "theirs"), ROOM)
    assert isinstance(theirs, PublishedTokenizer)
    with pytest.raises(ValueError, match="AutoTokenizer"):
        to_transformers(theirs, max_length=8)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_constraint_is_kept(kind: str, tmp_path: Path) -> None:
    found = read_tokenizer(folder_of(tmp_path, kind), ROOM)
    found.stop_ids |= {0}
    matcher, ids = Grammars(found).start(Constraint(regex="the|the end")), list[int]()
    while found.decode_bytes(ids) != b"the":
        (only,) = matcher.allowed().nonzero().flatten().tolist()
        ids.append(only)
        matcher.push(only)
    allowed = set(matcher.allowed().nonzero().flatten().tolist())
    assert {0, 2} < allowed and not found.special.keys() & allowed - {0, 2}  # whole: any end, or more
    assert all(b" end".startswith(found.token_bytes[i]) for i in allowed - {0, 2})
    matcher.push(0)
    assert matcher.ended and set(matcher.allowed().nonzero().flatten().tolist()) == {0, 2}
    matcher.rollback(1)
    assert set(matcher.allowed().nonzero().flatten().tolist()) == allowed


Change = Callable[[dict[str, Any]], Any]


def replaces(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


LONG_TABLE = b64encode(b"\0\4\0\0" + b"\0" * 1024 + b"x" * 5000 + b"\0").decode()


def nested(n: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [nested(n - 1)] if n else []}


def changed(part: str, **values: Any) -> Change:
    return lambda body: body | {part: body[part] | values}


REFUSED: dict[str, tuple[Change, str]] = {
    "no object": (lambda body: [body], "must be an object"),
    "nothing": (lambda body: {}, "tokenizer.json"),
    "no model": (lambda body: body | {"model": None}, "tokenizer.json"),
    "another model": (changed("model", type="Markov"), "tokenizer.json"),
    "no decoder": (lambda body: body | {"decoder": None}, "decoder = None: must be ByteLevel"),
    "another decoder": (lambda body: body | {"decoder": {"type": "CTC"}}, "tokenizer.json"),
    "WordPiece's": (
        lambda body: body | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        "tokenizer.json: decoder = {'type': 'WordPiece'",
    ),
    "an id far out": (lambda body: body["model"]["vocab"].update({"x" * 9: 2**31}), f"must be in [0, {ROOM - 1}]"),
    "an id that is none": (lambda body: body["model"]["vocab"].update({"x": -1}), "tokenizer.json"),
    "a merge of nothing": (lambda body: body["model"]["merges"].append(["语", "x"]), "tokenizer.json"),
    "tokens that are none": (lambda body: body | {"added_tokens": [{"content": "<x>"}]}, "tokenizer.json"),
    "a regex that is none": (
        lambda body: body | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
        "tokenizer.json",
    ),
    "normalizers that multiply": (
        lambda body: body | {"normalizer": {"type": "Sequence", "normalizers": [replaces("aa")] * 60}},
        "normalizer = 2000: must be at most 1000 times longer texts",
    ),
    "normalizers that multiply what replaces": (
        lambda body: body | {"normalizer": {"type": "Sequence", "normalizers": [replaces("ﷺ"), {"type": "NFKC"}] * 9}},
        "normalizer = 2000: must be at most 1000 times longer texts",
    ),
    "a table of long texts": (
        lambda body: body | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_TABLE}},
        "normalizer = 5000: must be at most 1000 times longer texts",
    ),
    "bytes of bytes of bytes": (
        lambda body: body | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [body["pre_tokenizer"]] * 30}},
        "pre_tokenizer = 2000: must be at most 1000 times longer texts",
    ),
    "half a character": (lambda body: body["model"]["vocab"].update({"\ud800": 400}), "tokenizer.json"),
    "normalizers in normalizers": (lambda body: body | {"normalizer": nested(400)}, "tokenizer.json"),
    "far too deep": (lambda body: body | {"normalizer": json.loads("[" * 200 + "]" * 200)}, "tokenizer.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_tokenizer_is_named(what: str, tmp_path: Path) -> None:
    change, said = REFUSED[what]
    with pytest.raises(ValueError, match=r"tokenizer\.json") as error:
        read_tokenizer(spoilt(folder_of(tmp_path), change), ROOM)
    assert said in str(error.value) and str(tmp_path) in str(error.value)


def test_files_beside_it_are_checked(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for name, text, said in (
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token = 5: must be the text of a token"),
        ("tokenizer_config.json", '{"chat_template": 5, "eos_token": "<pad>"}', "chat_template = 5: must be a text"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id = '2': must be ids of tokens"),
        ("generation_config.json", '{"eos_token_id": [999]}', "eos_token_id = 999: must be in [0, "),
        ("tokenizer.json", '{"a": 1, "a": 2}', "duplicate key"),
    ):
        kept = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(text)
        with pytest.raises(ValueError) as error:
            read_tokenizer(folder, ROOM)
        assert said in str(error.value)
        (folder / name).unlink() if kept is None else (folder / name).write_text(kept)
    assert read_tokenizer(folder, ROOM).eos_id == 2
    with pytest.raises(ValueError, match=r"token id = \d+: must be in \[0, 99\]"):
        read_tokenizer(folder, 100)


def test_padding_and_truncation_are_not_for_prompts(tmp_path: Path) -> None:
    def cut(body: dict[str, Any]) -> None:
        body["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}

    found = read_tokenizer(spoilt(folder_of(tmp_path), cut), ROOM)
    assert found.decode(found.encode("x" * 20)) == "x" * 20


@pytest.mark.parametrize(
    ("decoder", "piece", "data", "lead"),
    [
        ({"type": "ByteLevel"}, "Ġthe", b" the", ""),
        ({"type": "ByteLevel"}, "  é語", "  é語".encode(), ""),  # an added token, which is spelt as it is
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, "▁a", b" a", ""),
        ({"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}, "a▁", b"a ", " "),
        ({"type": "ByteFallback"}, "<0xe8>", b"\xe8", ""),
        ({"type": "Fuse"}, "<0xe8>", b"<0xe8>", ""),
    ],
)
def test_bytes_of_a_piece(decoder: Any, piece: str, data: bytes, lead: str) -> None:
    spelt, found = speller(decoder)
    assert (spelt(piece), found) == (data, lead)


@pytest.mark.parametrize("part", [{"type": "Strip", "content": " ", "start": 1, "stop": 1}, {"type": "BPEDecoder"}, 5])
def test_decoders_that_look_at_neighbours_are_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="decoder = "):
        speller({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, part]})


def test_half_a_character_is_one_sign() -> None:
    found = made(pieces())
    ids = found.encode("語")[-3:]
    assert found.decode(ids) == "語" and found.decode(ids[:2]) == "�" != found._marked.decode(ids[:2])


def test_byte_lengths_are_of_text_alone() -> None:
    found = made(byte_level(), names=tuple(NAMES["bytes"].values()))
    assert isinstance(found.byte_lengths, np.ndarray) and found.byte_lengths.shape == (found.vocab_size,)
    assert found.byte_lengths[:4].tolist() == [0] * 4 and (found.byte_lengths[4:-1] > 0).all()
