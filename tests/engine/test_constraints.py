"""Whatever is chosen among the allowed ids, the text is what was asked for; and no more is forbidden than must be."""

import dataclasses
import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ritornello.engine.constraints import LONGEST, Constraint, Grammars, Matcher
from ritornello.recipes import find_model
from ritornello.train.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, from_json, train_bpe

pytest.importorskip("llguidance")


class Entry(BaseModel):
    """Made into a schema, and checks what was written by it: an independent reader of the same words."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(max_length=6)]
    age: Annotated[int, Field(ge=-5, le=150)]
    words: Annotated[list[Literal["été", "日本", "𝄞", 'a"b', "null"]], Field(max_length=3)]
    share: Literal[0.5] | None
    known: bool
    parent: "Entry | None" = None


SCHEMA = json.dumps(Entry.model_json_schema())
REGEXES = (
    "[a-c]{3,5}-[0-9]{2}",
    "(été|naïve|日本語|🎵)(, (été|naïve|日本語|🎵)){0,3}",
    ".{1,5}",
    "(a/b|\\\\|\"|'|\n|/\\*){2,4}",
    "[^a-z]?x*",
    "def [a-z_]{1,8}\\(\\):",
)
CONSTRAINTS = [Constraint(json_schema=SCHEMA), *(Constraint(regex=regex) for regex in REGEXES)]


def bpe() -> BpeTokenizer:
    texts = ['{"name": "été", "age": 12, "words": ["日本"], "parent": null}', "naïve abc-12 🎵 def abc():\n"]
    return train_bpe(texts * 9, 400)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "bpe": bpe,
    "python": lambda: from_json((find_model("python") / "tokenizer.json").read_text(encoding="utf-8")),
}


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return TOKENIZERS[name]()


@cache
def grammars_of(name: str) -> Grammars:
    return Grammars(tokenizer_of(name))


def kept(constraint: Constraint, data: bytes) -> bool:
    """Whether the text is what was asked for, by other people's code."""
    try:
        text = data.decode()
        if constraint.regex is not None:
            return re.fullmatch(constraint.regex, text) is not None
        json.loads(text)
        return bool(Entry.model_validate_json(text))
    except (ValueError, ValidationError):
        return False


def ids(allowed: Tensor) -> list[int]:
    return allowed.nonzero()[:, 0].tolist()


def walk(matcher: Matcher, rng: random.Random, limit: int = 3000) -> list[Tensor]:
    """Chooses among the allowed ids until the text ends; returns what was allowed each time."""
    masks = []
    while not matcher.ended and len(masks) < limit:
        masks.append(matcher.allowed())
        matcher.push(rng.choice(ids(masks[-1])))
    return masks


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: "json" if c.regex is None else ascii(c.regex))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_walk_ends_in_a_text_that_was_asked_for(name: str, constraint: Constraint) -> None:
    tokenizer = tokenizer_of(name)
    for seed in range(8):
        matcher = grammars_of(name).start(constraint)
        masks = walk(matcher, random.Random(seed))
        assert matcher.ended and matcher.tokens[-1] == tokenizer.eos_id
        assert kept(constraint, tokenizer.decode_bytes(matcher.tokens)), tokenizer.decode(matcher.tokens)
        for i, allowed in enumerate(masks):  # the end of the document is allowed where the text is whole, only there
            whole = kept(constraint, tokenizer.decode_bytes(matcher.tokens[:i]))
            assert whole == bool(allowed[tokenizer.eos_id])


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: "json" if c.regex is None else ascii(c.regex))
def test_control_a_walk_without_masks_fails(constraint: Constraint) -> None:
    tokenizer, rng = tokenizer_of("bpe"), random.Random(0)
    for _ in range(8):
        tokens = [rng.randrange(tokenizer.eos_id) for _ in range(rng.randint(7, 40))]
        assert not kept(constraint, tokenizer.decode_bytes(tokens))


TEXTS = ("", "a", "ab", "abba", "été", "étau", "日本", "日月", "🎵")


def test_no_more_and_no_less_than_leads_to_a_text() -> None:
    """Byte by byte, compared with all the texts there are."""
    grammars, texts = grammars_of("bytes"), {text.encode() for text in TEXTS}
    constraint = Constraint(regex="|".join(TEXTS))
    prefixes = {text[:n] for text in texts for n in range(len(text) + 1)}
    for prefix in prefixes:
        matcher = grammars.start(constraint)
        for byte in prefix:
            matcher.push(byte)
        expected = [byte for byte in range(256) if prefix + bytes([byte]) in prefixes] + [256] * (prefix in texts)
        assert ids(matcher.allowed()) == expected


@pytest.mark.parametrize("name", ["bpe", "python"])
def test_of_longer_tokens_none_that_leads_nowhere_and_all_texts_can_be_written(name: str) -> None:
    tokenizer, texts = tokenizer_of(name), {text.encode() for text in TEXTS}
    start = grammars_of(name).start(Constraint(regex="|".join(TEXTS)))
    found, open_ends = set(), [start]
    while open_ends:
        matcher = open_ends.pop()
        for token in ids(matcher.allowed()):
            longer = matcher.copy()
            longer.push(token)
            data = tokenizer.decode_bytes(longer.tokens)
            assert any(text.startswith(data) for text in texts)
            if longer.ended:
                found.add(data)
            else:
                open_ends.append(longer)
    assert found == texts
    assert start.tokens == []


@pytest.mark.parametrize("constraint", CONSTRAINTS[:3], ids=["json", "regex", "words"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_rollback_is_as_if_nothing_had_been_pushed(name: str, constraint: Constraint) -> None:
    rng, other = random.Random(0), 0
    for seed in range(4):
        matcher = grammars_of(name).start(constraint)
        masks = walk(matcher, random.Random(seed))  # to the end of the document and back
        tokens = matcher.tokens.copy()
        while matcher.tokens:
            n = rng.randint(1, min(5, len(matcher.tokens)))
            wrong = matcher.copy()
            matcher.rollback(n)
            wrong.rollback(n - 1)
            place = len(matcher.tokens)
            assert matcher.tokens == tokens[:place] and not matcher.ended
            assert torch.equal(matcher.allowed(), masks[place])
            other += not torch.equal(wrong.allowed(), masks[place])
        again = walk(matcher, random.Random(seed))
        assert all(torch.equal(a, b) for a, b in zip(again, masks, strict=True))
        assert matcher.tokens == tokens
    assert other > 0  # the control: one too few is seen


def test_pushing_again_comes_to_the_same_place() -> None:
    """A text that was put off starts over from its tokens."""
    grammars = grammars_of("python")
    first = grammars.start(CONSTRAINTS[0])
    masks = walk(first, random.Random(1))
    again = grammars.start(CONSTRAINTS[0])
    for token, allowed in zip(first.tokens, masks, strict=True):
        assert torch.equal(again.allowed(), allowed)
        again.push(token)
    assert again.ended


def test_a_copy_goes_its_own_way() -> None:
    matcher = grammars_of("bytes").start(Constraint(regex="ab|ac|b"))
    matcher.push(ord("a"))
    copy, before = matcher.copy(), matcher.allowed()
    copy.push(ord("b"))
    assert (matcher.tokens, copy.tokens) == ([ord("a")], [ord("a"), ord("b")])
    assert torch.equal(matcher.allowed(), before) and ids(copy.allowed()) == [256]


def test_what_may_not_come_is_refused_and_changes_nothing() -> None:
    tokenizer = tokenizer_of("bytes")
    matcher = Grammars(tokenizer, vocab_size=260).start(Constraint(regex="a+\u00ff?"))
    for token in (ord("b"), 255, 256, 257, 259):  # 255: a byte that llguidance uses as a mark
        with pytest.raises(ValueError, match=f"token = {token}: must be allowed by the constraint"):
            matcher.push(token)
    for token in (-1, 260, True, 1.0):
        with pytest.raises(ValueError, match="token = "):
            matcher.push(token)  # type: ignore[arg-type]
    assert ids(matcher.allowed()) == [ord("a")] and matcher.tokens == []
    matcher.push(ord("a"))
    assert ids(matcher.allowed()) == [ord("a"), 0xC3, 256]
    with pytest.raises(ValueError, match=r"n = 2: must be an integer in \[0, 1\]"):
        matcher.rollback(2)
    matcher.push(256)
    assert ids(matcher.allowed()) == [256]
    with pytest.raises(ValueError, match="token = 97"):
        matcher.push(ord("a"))
    matcher.push(256)  # what a draft may do
    matcher.rollback(2)
    assert ids(matcher.allowed()) == [ord("a"), 0xC3, 256]


def test_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    tokenizer = tokenizer_of("bpe")
    padded = Grammars(tokenizer, vocab_size=tokenizer.vocab_size + 41)
    allowed = padded.start(Constraint(regex="(?s:.)*")).allowed()
    assert allowed.shape == (tokenizer.vocab_size + 41,) and allowed.dtype == torch.bool
    assert torch.equal(allowed[: tokenizer.vocab_size], grammars_of("bpe").start(Constraint(regex="(?s:.)*")).allowed())
    assert not allowed[tokenizer.vocab_size :].any()
    with pytest.raises(ValueError, match="vocab_size = 12"):
        Grammars(tokenizer, vocab_size=12)


def test_a_token_of_any_length_is_taken() -> None:
    """One too long for llguidance is left out; shorter ones write the same."""
    vocab = json.loads(train_bpe(["a"], 257).to_json())["model"]["vocab"]
    for size in range(2, 2 * LONGEST):
        vocab["a" * size] = len(vocab)
    tokenizer = BpeTokenizer(vocab, [("a", "a" * size) for size in range(1, 2 * LONGEST - 1)])
    grammars = Grammars(tokenizer)
    allowed = grammars.start(Constraint(regex="a*")).allowed()
    assert max(len(tokenizer.token_bytes[i]) for i in ids(allowed)) == LONGEST
    matcher = grammars.start(Constraint(regex=f"a{{{LONGEST + 1}}}"))  # one token as the tokenizer writes it
    walk(matcher, random.Random(0))
    assert tokenizer.decode(matcher.tokens) == "a" * (LONGEST + 1)


def test_json_is_written_on_one_line_unless_the_schema_asks() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    schema["additionalProperties"] = False

    def written(schema: dict[str, Any]) -> set[str]:
        tokenizer, found = tokenizer_of("bytes"), set()
        for seed in range(20):
            matcher = grammars_of("bytes").start(Constraint(json_schema=json.dumps(schema)))
            walk(matcher, random.Random(seed))
            found.add(tokenizer.decode(matcher.tokens))
        return found

    assert written(schema) == {'{"a":null}', '{"a": null}'}
    loose = written(schema | {"x-guidance": {"whitespace_flexible": True}})
    assert any("\n" in text for text in loose) and all(json.loads(text) == {"a": None} for text in loose)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "constraint = []: must be exactly one of json_schema and regex"),
        ({"json_schema": "{}", "regex": "a"}, "constraint = ['json_schema', 'regex']"),
        ({"json_schema": ""}, "json_schema = ''"),
        ({"json_schema": {"type": "null"}}, "json_schema = {'type': 'null'}: must be text"),
        ({"json_schema": "{"}, "json_schema: not valid JSON"),
        ({"json_schema": "[" * 10**5}, "json_schema: not valid JSON"),
        ({"json_schema": '{"type": "null", "type": "null"}'}, "json_schema: not valid JSON: duplicate key 'type'"),
        ({"json_schema": '{"a":' * 500 + "1" + "}" * 500}, "json_schema = "),
        ({"json_schema": "true"}, "json_schema = True: must be an object"),
        ({"json_schema": '{"type": "nul"}'}, "json_schema = "),
        ({"json_schema": '{"type": 1}'}, "json_schema = "),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json_schema": '{"type": "string", "format": "colour"}'}, "colour"),
        ({"json_schema": '{"$ref": "#"}'}, "no text is one"),
        ({"json_schema": '{"const": 1e400}'}, "json_schema = "),
        ({"json_schema": '{"$ref": "https://example.org/a.json"}'}, "json_schema = "),
        ({"json_schema": '{"type": "integer", "minimum": 3, "maximum": 2}'}, "json_schema = "),
        ({"regex": ""}, "regex = ''"),
        ({"regex": b"a"}, "regex = b'a': must be text"),
        ({"regex": "("}, "regex = '('"),
        ({"regex": "a{3,2}"}, "regex = 'a{3,2}'"),
        ({"regex": "(?=a)a"}, "regex = '(?=a)a'"),
        ({"regex": r"(a)\1"}, "regex = "),
        ({"regex": "a\\"}, "without a lone backslash"),
        ({"regex": "a/ | /b["}, "regex = "),
        ({"regex": r"a^b"}, "lookarounds not supported"),
        ({"regex": r"[^\s\S]"}, "no text is one"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_mistake_names_its_field(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        Constraint(**given)
    assert "\n" not in str(caught.value)


def test_an_expression_cannot_leave_its_place() -> None:
    """Expressions are handed over inside a larger grammar."""
    for regex in ("a/ | /b", "a\n| b", "a/i\nstart2: /b", r"a\/b", r"a\\/b"):
        matcher = grammars_of("bytes").start(Constraint(regex=regex))
        for seed in range(9):
            walk(matcher, random.Random(seed))
            assert re.fullmatch(regex, tokenizer_of("bytes").decode(matcher.tokens))
            matcher.rollback(len(matcher.tokens))


def test_where_llguidance_gives_up_the_text_does_not_just_end() -> None:
    import llguidance

    matcher = grammars_of("bytes").start(CONSTRAINTS[0])
    few = llguidance.LLParserLimits(step_max_items=1, step_lexer_fuel=1)
    matcher._matcher = llguidance.LLMatcher(matcher._grammars._tokens, CONSTRAINTS[0].grammar, limits=few, log_level=0)
    with pytest.raises(ValueError, match="json_schema = "):
        for token in itertools.chain(b'{"name": "', itertools.repeat(ord("a"))):
            assert not matcher.allowed()[256]
            matcher.push(token)


def test_constraints_are_values() -> None:
    one, other = Constraint(regex="a"), Constraint(regex="b")
    assert one == Constraint(regex="a") != other and len({one, Constraint(regex="a"), other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.regex = "c"  # type: ignore[misc]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"llguidance; pip install 'ritornello\[constrain\]'"):
        Constraint(regex="a")
