"""A file of requests: each text is the one written alone, and whatever ends a run, the next one goes on."""

import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ritornello.config import ExitRule
from ritornello.engine import batch, prompts
from ritornello.engine.batch import run_file
from ritornello.engine.engine import Engine
from ritornello.engine.generate import Loaded, generate
from ritornello.train import files
from tests.engine.test_generate import BYTES, LIMIT, divisive, scripted, small, unused
from tests.train.test_files import short_writes

Row = dict[str, Any]


def written(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path: Path) -> dict[str, Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def answered(loaded: Loaded, tmp_path: Path, rows: list[Row], **options: Any) -> dict[str, Row]:
    run_file(loaded, written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", **options)
    return answers(tmp_path / "out.jsonl")


def test_each_text_is_what_generate_writes_alone(tmp_path: Path) -> None:
    loaded = small(halting="gate", initial_state="noise")
    rule = divisive(loaded.model, "hazard")
    bias = {"repetition_penalty": 1.2, "logit_bias": {"101": 2.5, "9": -1.0}}
    cases: list[tuple[Row, Row]] = [  # a line, and what it changes of `usual`
        ({"prompt": "The quick"}, {}),
        ({"prompt": "", "id": "empty", "temperature": 0}, {"temperature": 0}),
        ({"prompt": "naïve", "loops": 2, "top_k": 5, "seed": 7}, {"n_loops": 2, "top_k": 5, "seed": 7}),
        ({"prompt": "RDT", "exit": None, "max_tokens": 2}, {"exit": None, "max_tokens": 2}),
        ({"prompt": "RDT", "exit": "delta", "min_loops": 2}, {"exit": ExitRule("delta", 0.03, 2)}),
        ({"prompt": "RDT", "exit_threshold": 0.0}, {"exit": ExitRule("hazard", 0.0, 2)}),
        ({"prompt": "RDT", "loops": None, "stop": "e", "min_p": 0.1}, {"n_loops": None, "stop": "e", "min_p": 0.1}),
        ({"prompt": "{", **bias}, {**bias, "logit_bias": ((9, -1.0), (101, 2.5))}),
        (
            {"prompt": "{", "presence_penalty": 1, "frequency_penalty": 2},
            {"presence_penalty": 1, "frequency_penalty": 2},
        ),
        ({"prompt": "x" * LIMIT}, {}),
        ({"prompt": "x" * (LIMIT - 1)}, {}),
    ]
    usual: Row = {"max_tokens": 6, "exit": rule, "seed": 5, "n_loops": 3, "top_p": 0.95}
    found = answered(loaded, tmp_path, [row for row, _ in cases], **usual)
    for number, (row, changes) in enumerate(cases, start=1):
        answer, alone = found[row.get("id", str(number))], generate(loaded, row["prompt"], **usual | changes)
        assert (answer["text"], answer["loops"], answer["reason"]) == (alone.text, alone.loops, alone.reason)
        n_prompt_tokens = max(1, len(row["prompt"].encode()))
        assert (answer["n_tokens"], answer["n_prompt_tokens"]) == (len(alone.tokens), n_prompt_tokens)
        assert answer["loops_mean"] == (pytest.approx(sum(alone.loops) / len(alone.loops)) if alone.loops else None)
    assert len({used for answer in found.values() for used in answer["loops"]}) > 1
    assert found["1"]["text"] != generate(loaded, "The quick", **usual | {"seed": 6}).text


def test_why_a_text_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    end = BYTES.eos_id
    loaded = scripted(monkeypatch, [*b"abcde"], [*b"ab", end, *b"cd"], [*b"vwxyz"], [97, 0xC3, end, 98, 99])
    rows = [{"prompt": "x", "seed": i, "stop": ["cd"]} for i in range(4)]
    found = answered(loaded, tmp_path, rows, max_tokens=5)
    told = [(found[id]["text"], found[id]["reason"], found[id]["n_tokens"]) for id in "1234"]
    assert told == [
        ("ab", "stop", 4),
        ("ab", "end", 2),
        ("vwxyz", "length", 5),
        ("a\N{REPLACEMENT CHARACTER}", "end", 2),
    ]


def test_log_probabilities_come_with_each_token(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "abc", "logprobs": 3, "temperature": 0}, {"prompt": "abc", "logprobs": None}]
    found = answered(small(), tmp_path, [*rows, {"prompt": "abc"}], max_tokens=4, n_logprobs=0)
    for told in found["1"]["logprobs"]:
        assert told["likeliest"][0] == [told["token"], told["logprob"]] and len(told["likeliest"]) == 3
    assert len(found["1"]["logprobs"]) == len(found["3"]["logprobs"]) == found["1"]["n_tokens"] == 4
    assert "logprobs" not in found["2"] and found["3"]["logprobs"][0]["likeliest"] == []


def test_a_text_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    loaded = small()
    with torch.no_grad():
        loaded.model.embed_tokens[0].weight[5] = torch.nan
    rows = [{"prompt": text, "logit_bias": {"5": -100}} for text in ("ab", "\5b", "abc")]
    source, target = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run_file(loaded, source, target, max_tokens=3) == Counter(length=2, failed=1)
    found = answers(target)
    assert [found[id]["reason"] for id in "123"] == ["length", "failed", "length"] and found["2"]["n_tokens"] == 0
    assert run_file(loaded, source, target, max_tokens=3) == Counter(), "nor is it tried again"


ROWS: list[Row] = [{"id": "first", "prompt": "ab"}, {"prompt": "cde", "seed": 3}, {"prompt": "é", "temperature": 0}]
SHORT: Row = {"max_tokens": 1, "n_loops": 1}


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Loaded, Path, Path]:
    """A model, a file of requests, and their answers."""
    loaded, target = small(), tmp_path / "out.jsonl"
    assert len(answered(loaded, tmp_path, ROWS, **SHORT)) == len(ROWS)
    return loaded, tmp_path / "in.jsonl", target


def test_a_run_killed_at_any_byte_of_a_line_goes_on(
    whole: tuple[Loaded, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    loaded, source, target = whole
    data = target.read_bytes()
    kept = data.rindex(b"\n", 0, -1) + 1
    for size in range(kept, len(data)):
        target.write_bytes(data[:size])
        assert run_file(loaded, source, target, **SHORT) == Counter(length=1)
        assert target.read_bytes() == data
    assert sorted(path.name for path in target.parent.iterdir()) == [".out.jsonl.lock", "in.jsonl", "out.jsonl"]
    monkeypatch.setattr(batch, "_keep", lambda *_: None)  # control
    target.write_bytes(data[:-9])
    run_file(loaded, source, target, **SHORT)
    assert target.read_bytes() != data


def test_what_is_answered_is_not_done_again(whole: tuple[Loaded, Path, Path]) -> None:
    loaded, source, target = whole
    data = target.read_bytes()
    lines = data.splitlines(keepends=True)
    for keep in ([], lines[:1], lines[1:], lines[:0:-1], lines):
        target.write_bytes(b"".join(keep))
        told: list[tuple[int, int]] = []
        reasons = run_file(loaded, source, target, observer=lambda *now, told=told: told.append(now), **SHORT)
        assert reasons.total() == len(lines) - len(keep)
        assert told == [(done, 3) for done in range(len(keep), 4)]
        assert sorted(target.read_bytes().splitlines(keepends=True)) == sorted(lines)
        assert target.read_bytes().startswith(b"".join(keep))


def test_the_same_request_in_other_words_is_the_same(whole: tuple[Loaded, Path, Path]) -> None:
    loaded, source, target = whole
    written(source, [{**row, "max_tokens": 1, "loops": 1, "top_k": None, "stop": []} for row in ROWS])
    assert run_file(loaded, source, target, max_tokens=9, n_loops=2) == Counter()


def test_a_full_disk_ends_a_run_between_two_lines(
    whole: tuple[Loaded, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, source, target = whole
    data = target.read_bytes()
    target.unlink()
    with monkeypatch.context() as patch:
        short_writes(patch, capacity=data.rindex(b"\n", 0, -1) + 50)
        with pytest.raises(OSError, match="cannot write") as caught:
            run_file(loaded, source, target, **SHORT)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(target)
    assert target.read_bytes() == data[: data.rindex(b"\n", 0, -1) + 1]
    assert run_file(loaded, source, target, **SHORT) == Counter(length=1)
    assert target.read_bytes() == data


def changed(name: str, value: object) -> Callable[[bytes], bytes]:
    """The last line with another value."""

    def change(data: bytes) -> bytes:
        *kept, last = data.splitlines(keepends=True)
        return b"".join(kept) + json.dumps(json.loads(last) | {name: value}).encode() + b"\n"

    return change


OTHERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another id": (changed("id", "9"), ":3 = '9': must be an id of the input"),
    "twice": (lambda data: data + data.splitlines(keepends=True)[0], ":4 = 'first': must be answered once"),
    "another key": (changed("key", "0" * 64), ":3 = '3': must be answered with the same prompt, settings and model"),
    "no key": (changed("key", None), ":3: .* is not an answer"),
    "requests": (lambda data: b'{"id": "first", "prompt": "a"}\n', ":1: .* is not an answer"),
    "requests without an end": (lambda data: data + b'{"id": "first", "prompt": "a"}', ":4: .* is not an answer"),
    "notes": (lambda data: b"Dear diary,\n", ":1: not valid JSON"),
    "notes without an end": (lambda data: data + b"Dear diary", ":4 = .* must be the beginning of an answer"),
    "a list": (lambda data: b"[1]\n", r":1 = \[1\]: must be a JSON object"),
    "no UTF-8": (lambda data: b"\xff\n", ":1: not UTF-8"),
    "blank": (lambda data: data + b"\n", ":4: not valid JSON"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_output_is_refused_and_left_as_it_is(whole: tuple[Loaded, Path, Path], case: str) -> None:
    loaded, source, target = whole
    change, said = OTHERS[case]
    data = change(target.read_bytes())
    target.write_bytes(data)
    with pytest.raises(ValueError, match=rf"out\.jsonl{said}"):
        run_file(loaded, source, target, **SHORT)
    assert target.read_bytes() == data


def test_answers_of_another_kind_are_refused(whole: tuple[Loaded, Path, Path]) -> None:
    loaded, source, target = whole
    others: list[Row] = [{"seed": 1}, {"temperature": 0.5}, {"n_loops": 2}, {"stop": "x"}, {"n_logprobs": 0}]
    for options in others:
        with pytest.raises(ValueError, match="must be answered with the same prompt, settings and model"):
            run_file(loaded, source, target, **SHORT | options)
    with pytest.raises(ValueError, match="the same prompt"):
        run_file(small(positions="none"), source, target, **SHORT)
    written(source, [{**ROWS[0], "prompt": "ba"}, *ROWS[1:]])
    with pytest.raises(ValueError, match=r":1 = 'first'.*the same prompt"):
        run_file(loaded, source, target, **SHORT)
    written(source, ROWS)
    assert run_file(loaded, source, target, **SHORT) == Counter()  # control
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1e-9
    with pytest.raises(ValueError, match="the same prompt"):
        run_file(loaded, source, target, **SHORT)


def test_one_process_at_a_time(whole: tuple[Loaded, Path, Path]) -> None:
    loaded, source, target = whole
    target.with_name("link.jsonl").symlink_to(target)
    with files.lock_file(target):
        for path in (target, target.with_name("link.jsonl")):
            with pytest.raises(ValueError, match=r"out\.jsonl: in use by process"):
                run_file(loaded, source, path, **SHORT)
        assert run_file(loaded, source, target.with_name("other.jsonl"), **SHORT).total() == len(ROWS)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", ROWS)
    places = [("in.jsonl", "in.jsonl", "output"), ("in.jsonl", ".", "output"), ("in.jsonl", "no/out", "output")]
    for one, other, said in [*places, ("none.jsonl", "out.jsonl", "input"), (".", "out.jsonl", "input")]:
        with pytest.raises(ValueError, match=f"^{said} = .*: must be"):
            run_file(unused(), tmp_path / one, tmp_path / other)
    assert list(tmp_path.iterdir()) == [source]


GOOD = b'{"prompt": "a"}\n'
BAD: dict[bytes, str] = {
    b"": "input = .*: must be a file with at least one request",
    b"\n \r\n": "input = .*: must be a file with at least one request",
    GOOD + b"{": ":2: not valid JSON",
    GOOD + b"\xef\xbb\xbf" + GOOD: ":2: not valid JSON",
    GOOD + b'{"prompt": "\xff"}': ":2: not UTF-8 at byte 12",
    GOOD + b"[]": r":2 = \[\]: must be a JSON object",
    b'{"prompt": "a", "prompt": "b"}': ":1: not valid JSON: duplicate key 'prompt'",
    b'{"id": "a"}': ":1: prompt = None: must be there",
    b'{"prompt": 3}': ":1: prompt = 3: must be a valid string",
    b'{"prompt": "\\ud800"}': ":1: ",
    b'{"prompt": "' + b"x" * (LIMIT + 1) + b'"}': f":1: prompt = '25 tokens': must be at most max_seq_len = {LIMIT}",
    b'{"prompt": "a", "id": 3}': ":1: id = 3: must be a valid string",
    b'{"prompt": "a", "id": ""}': ":1: id = '': must be a text that is not empty",
    b'{"prompt": "a", "id": "x"}\n' * 2: ":2: id = 'x': must be another",
    GOOD + b'{"prompt": "a", "id": "1"}': ":2: id = '1': must be another",
    b'{"prompt": "a", "temprature": 1}': ":1: key = 'temprature': .*did you mean 'temperature'",
    b'{"prompt": "a", "n_loops": 1}': ":1: key = 'n_loops': .*did you mean .*loops'",
    b'{"prompt": "a", "max_tokens": 0}': ":1: max_tokens = 0",
    b'{"prompt": "a", "max_tokens": null}': ":1: max_tokens = None",
    b'{"prompt": "a", "max_tokens": 2.5}': ":1: max_tokens = 2.5",
    b'{"prompt": "a", "max_tokens": true}': ":1: max_tokens = True",
    b'{"prompt": "a", "loops": 0}': ":1: loops = 0",
    b'{"prompt": "a", "loops": 5000}': ":1: loops = 5000",
    b'{"prompt": "a", "exit": "hazrd"}': ":1: exit = 'hazrd'",
    b'{"prompt": "a", "exit": "kl"}': ":1: exit = ",
    b'{"prompt": "a", "exit_threshold": 1.0}': ":1: exit_threshold = 1.0: must be used with exit",
    b'{"prompt": "a", "min_loops": 2}': ":1: min_loops = 2: must be used with exit",
    b'{"prompt": "a", "exit": "delta", "min_loops": 9}': ":1: min_loops = 9",
    b'{"prompt": "a", "exit": "delta", "exit_threshold": -1}': ":1: exit_threshold = -1",
    b'{"prompt": "a", "temperature": "hot"}': ":1: temperature = 'hot'",
    b'{"prompt": "a", "temperature": NaN}': ":1: not valid JSON: NaN",
    b'{"prompt": "a", "temperature": 1e999}': ":1: temperature = inf",
    b'{"prompt": "a", "top_k": 0}': ":1: top_k = 0",
    b'{"prompt": "a", "top_p": 2}': ":1: top_p = 2",
    b'{"prompt": "a", "min_p": -1}': ":1: min_p = -1",
    b'{"prompt": "a", "seed": -1}': ":1: seed = -1",
    b'{"prompt": "a", "stop": 3}': ":1: stop = 3",
    b'{"prompt": "a", "stop": [""]}': ":1: stop = ",
    b'{"prompt": "a", "repetition_penalty": 0}': ":1: repetition_penalty = 0",
    b'{"prompt": "a", "logit_bias": {"e": 1}}': ":1: logit_bias = 'e': must be the id of a token",
    b'{"prompt": "a", "logit_bias": {"257": 1}}': ":1: logit_bias = 257",
    b'{"prompt": "a", "logit_bias": {"7": null}}': r":1: logit_bias\.7 = None",
    b'{"prompt": "a", "logprobs": 21}': ":1: logprobs = 21",
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}": ":1: ",
    GOOD + b'{"prompt": "' + b"x" * 300 + b'"}': ":2 = '301 bytes or more': must be at most 300 bytes",
}


@pytest.mark.parametrize("data", BAD, ids=lambda data: str(data[:60]))
def test_a_bad_line_is_named_before_anything_is_computed(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "MAX_LINE", 20_000 if b"[[[" in data else 300)
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    said = BAD[data] if BAD[data].startswith("input") else rf"^{source}{BAD[data]}"
    with pytest.raises(ValueError, match=said) as caught:
        run_file(unused(), source, tmp_path / "out.jsonl")
    assert len(str(caught.value)) < 1000 and list(tmp_path.iterdir()) == [source]


def test_control_good_lines_are_computed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="something was computed"):
        answered(unused(), tmp_path, [{"prompt": "a"}])


def test_a_mistake_that_all_lines_share_is_no_lines(tmp_path: Path) -> None:
    wrong: list[Row] = [{"temperature": -1}, {"max_tokens": 0}, {"n_loops": 0}, {"n_logprobs": 21}, {"stop": [""]}]
    for options in wrong:
        with pytest.raises(ValueError, match=f"^{next(iter(options))} = .*: must be"):
            answered(unused(), tmp_path, ROWS, **options)


def test_lines_that_are_blank_or_end_otherwise(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\r\n{"prompt": "a"}\r\n\n  {"prompt": "b", "id": null}')
    run_file(small(), source, tmp_path / "out.jsonl", **SHORT)
    assert answers(tmp_path / "out.jsonl").keys() == {"2", "4"}


def test_the_engine_knows_of_few_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, rows = small(), [{"prompt": "ab" * (1 + i % 3), "seed": i, "max_tokens": 1 + i % 4} for i in range(14)]
    most, submit = [0], Engine.submit

    def counted(engine: Engine, request: Any) -> int:
        number = submit(engine, request)
        most[0] = max(most[0], len(engine.waiting) + len(engine.running))
        return number

    monkeypatch.setattr(Engine, "submit", counted)
    found = answered(loaded, tmp_path, rows, n_loops=2)
    assert most == [14]
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr(batch, "AT_ONCE", 3)
    most[0] = 0
    assert answered(loaded, tmp_path, rows, n_loops=2) == found and most == [3]


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "AT_ONCE", 1)
    loaded, source, target = small(), written(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"

    def add(done: int, total: int) -> None:
        if done == 1:
            written(source, [*ROWS, {"prompt": "more"}])

    with pytest.raises(ValueError, match=r"in\.jsonl = 'changed or removed'"):
        run_file(loaded, source, target, observer=add, **SHORT)
    assert len(answers(target)) == 1
    assert run_file(loaded, source, target, **SHORT) == Counter(length=3)
