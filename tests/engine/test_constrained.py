"""Constrained texts through the engine and all that writes texts with it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ritornello.engine.batch import run_file
from ritornello.engine.constraints import Constraint, Grammars
from ritornello.engine.engine import EXACT, Engine
from ritornello.engine.generate import generate, stream
from ritornello.engine.request import Draft, Request
from ritornello.engine.sampling import Sampling
from tests.engine.kinds import is_empty
from tests.engine.test_generate import small

pytest.importorskip("llguidance")

REGEX = "[ab]{2,4}(-[0-9]{2}){1,2}"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}, "é": {"type": "boolean"}},
        "required": ["n", "é"],
        "additionalProperties": False,
    }
)


def test_texts_are_what_was_asked_for() -> None:
    """Through each way that writes texts; and a text without a constraint is none of these."""
    loaded = small(max_seq_len=64)
    constraint = Constraint(regex=REGEX)
    free = generate(loaded, ["a", "bb"], max_tokens=30)
    bound = generate(loaded, ["a", "bb"], max_tokens=30, constraint=constraint)
    alone = generate(loaded, "a", max_tokens=30, constraint=constraint)
    streamed = "".join(stream(loaded, "a", max_tokens=30, constraint=constraint))
    assert all(re.fullmatch(REGEX, text.text) and text.reason == "end" for text in bound)
    assert not any(re.fullmatch(REGEX, text.text) for text in free)
    assert alone == bound[0] and streamed == alone.text
    found = generate(loaded, ["x"] * 3, max_tokens=60, constraint=Constraint(json_schema=SCHEMA))
    assert all(set(json.loads(text.text)) == {"n", "é"} for text in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_and_a_full_memory_change_nothing(temperature: float) -> None:
    loaded = small(max_seq_len=64)
    tokenizer = loaded.tokenizer
    grammars = Grammars(tokenizer)
    how: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "grammars": grammars, "exact": True}

    def asked(i: int, draft: Draft | None) -> Request:
        sampling = Sampling(seed=i, temperature=temperature, frequency_penalty=0.3)
        kind = Constraint(regex=REGEX) if i % 2 else Constraint(json_schema=SCHEMA)
        ends = frozenset({tokenizer.eos_id})
        return Request(prompt=[i + 1], max_tokens=40, draft=draft, constraint=kind, sampling=sampling, stop=ends)

    def texts(engine: Engine, requests: list[Request]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {engine.submit(request): [] for request in requests}
        for event in engine.run():
            found[event.number] += [] if event.token is None else [event.token]
        return found

    n_loops = loaded.model.config.n_loops
    expected = [texts(Engine(loaded.model, tick_tokens=EXACT, chunk=8, **how), [asked(i, None)])[0] for i in range(6)]
    rows = Engine(loaded.model).layout.most_rows(50)
    engine = Engine(loaded.model, tick_tokens=EXACT, chunk=8, n_rows=rows, **how)
    found = texts(engine, [asked(i, Draft(n_loops=n_loops - 1, n_tokens=3)) for i in range(6)])
    assert list(found.values()) == expected
    assert engine.n_preempted > 0 and engine.n_agreed > 0 and is_empty(engine)
    assert re.fullmatch(REGEX, tokenizer.decode(found[1]))


def test_in_a_file(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "regex": REGEX, "max_tokens": 30},
        {"prompt": "a", "json_schema": json.loads(SCHEMA), "draft_loops": 1, "draft_tokens": 2, "max_tokens": 60},
        {"prompt": "a", "loop_budget": 1.5, "max_tokens": 8},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_file(small(max_seq_len=64), source, target)
    found = {row["id"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert re.fullmatch(REGEX, found["1"]["text"]) and set(json.loads(found["2"]["text"])) == {"n", "é"}
    assert sum(found["3"]["loops"]) <= 1.5 * 8
    for bad in ('"regex": "("', '"draft_loops": 3', '"draft_loops": 1, "draft_tokens": 99', '"loop_budget": 8'):
        source.write_text('{"prompt": "a"}\n' * 3 + '{"prompt": "a", ' + bad + "}\n")
        with pytest.raises(ValueError, match=r"in\.jsonl:4: "):
            run_file(small(), source, tmp_path / "other.jsonl")
        assert not (tmp_path / "other.jsonl").exists()
    source.write_text('{"prompt": "a", "regex": "("}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:1: regex"):
        run_file(small(), source, tmp_path / "other.jsonl")


def test_a_constraint_that_is_lost_ends_its_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small(max_seq_len=64)
    engine = Engine(loaded.model, vocab_size=loaded.tokenizer.vocab_size, grammars=Grammars(loaded.tokenizer))
    first = engine.submit(Request(prompt=[1], max_tokens=4, constraint=Constraint(regex="[ab]{9}")))
    second = engine.submit(Request(prompt=[2], max_tokens=4))
    matcher = engine.waiting[0].matcher
    assert matcher is not None

    def lost() -> None:
        raise ValueError("too complex")

    monkeypatch.setattr(matcher, "allowed", lost)
    reasons = {event.number: event.reason for event in engine.run()}
    assert reasons == {first: "failed", second: "length"}
    third = engine.submit(Request(prompt=[1], max_tokens=4, constraint=Constraint(regex="[ab]{9}")))
    monkeypatch.setattr(engine.waiting[0].matcher, "push", lambda token: lost())
    assert [(event.number, event.reason) for event in engine.run()] == [(third, "failed")]
    with pytest.raises(ValueError, match=r"constraint = .*: must be asked of an Engine"):
        Engine(loaded.model).submit(Request(prompt=[1], constraint=Constraint(regex="a")))
    with pytest.raises(ArithmeticError, match="no token may follow"):
        monkeypatch.setattr("ritornello.engine.sequence.Sequence.allowed", lambda self, place: lost())
        generate(loaded, "a", constraint=Constraint(regex="a"))
