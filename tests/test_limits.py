"""One table of limits: each row holds in Python, in a file of requests and on the command line."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ritornello import cli
from ritornello.commands.generate import Generate
from ritornello.config import ExitRule
from ritornello.engine.prompts import line
from ritornello.engine.request import Draft, Request
from ritornello.engine.sampling import Sampling
from ritornello.limits import LIMITS, Limit, check

NEEDS = {"exit_threshold": ["--exit=delta"], "min_loops": ["--exit=delta"], "draft_tokens": ["--draft-loops=1"]}
PYTHON: dict[str, Any] = {
    "loops": None,  # depends on the model: tests of the engine
    "min_loops": lambda value: ExitRule("delta", 0.1, value),
    "loop_budget": lambda value: Request(prompt=[1], loop_budget=value),
    "exit_threshold": lambda value: ExitRule("delta", value),
    "draft_loops": lambda value: Draft(n_loops=value),
    "draft_tokens": lambda value: Draft(n_loops=1, n_tokens=value),
    "max_tokens": lambda value: Request(prompt=[1], max_tokens=value),
    "n": None,  # HTTP alone
    "n_logprobs": lambda value: Request(prompt=[1], n_logprobs=value),
    "logit_bias": lambda value: Sampling(logit_bias=((1, value),)),
}
LINE = {"n_logprobs": "logprobs", "n": None}  # names in a file, where they are others


def edges(row: Limit) -> tuple[list[Any], list[Any]]:
    """The outermost values that are good, and those just outside."""
    if row.kind is int:
        assert isinstance(row.low, int) and isinstance(row.high, int)
        return [row.low, row.high], [row.low - 1, row.high + 1]
    low, high = float(row.low), 1e300 if row.high is None else float(row.high)
    good = [math.nextafter(low, math.inf) if row.open_low else low, high]
    bad = [low if row.open_low else math.nextafter(low, -math.inf)]
    return good, bad + ([] if row.high is None else [math.nextafter(high, math.inf)])


@pytest.mark.parametrize("name", LIMITS)
def test_a_row_holds_in_python(name: str) -> None:
    good, bad = edges(LIMITS[name])
    ways = [lambda value: check(name, value)]
    if (way := PYTHON.get(name, lambda value: Sampling(**{name: value}))) is not None:
        ways.append(way)
    if (key := LINE.get(name, name)) is not None:
        ways.append(lambda value: line({"prompt": "", key: {"1": value} if name == "logit_bias" else value}))
    for way in ways:
        for value in good:
            way(value)
        for value in (*bad, math.nan, math.inf, True, "1"):
            with pytest.raises(ValueError, match=rf"{value!r}|threshold|{name}"):
                way(value)


def test_a_field_is_named_as_the_user_wrote_it() -> None:
    with pytest.raises(ValueError, match=r"^top_k = 0: must be an integer in \[1, 1048576\]$"):
        check("top_k", 0)
    with pytest.raises(ValueError, match=r"^--top-p = 0: must be a finite number in \(0, 1\]$"):
        check("top_p", 0, "--top-p")
    with pytest.raises(ValueError, match=r"^exit = -1: must be a finite number in \[0, inf\)$"):
        check("exit_threshold", -1, "exit")


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command line asks for, each time."""
    calls: list[dict[str, Any]] = []

    def stream(loaded: Any, prompt: str, **options: Any) -> list[str]:
        calls.append(options)
        return []

    engine = SimpleNamespace(load=lambda path, device: None, stream=stream)
    monkeypatch.setitem(sys.modules, "ritornello.engine.generate", engine)
    return calls


@pytest.mark.parametrize("name", [name for name in LIMITS if name in Generate.__dataclass_fields__])
def test_a_row_holds_on_the_command_line(
    name: str, answered: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = edges(LIMITS[name])
    flag = f"--{name.replace('_', '-')}"
    call = ["generate", "run", "--prompt=x", *NEEDS.get(name, ())]
    for n, value in enumerate(good, start=1):
        assert cli.main([*call, f"{flag}={value!r}"]) == 0 and len(answered) == n
    asked = {**answered[-1], "loops": answered[-1]["n_loops"]}
    assert name in NEEDS or name == "draft_loops" or asked[name] == good[-1]
    for value in bad:
        capsys.readouterr()
        assert cli.main([*call, f"{flag}={value!r}"]) == 2 and len(answered) == len(good)
        assert capsys.readouterr().err.startswith(f"ritornello: error: {flag} = {value!r}: must be ")


def test_one_row_changes_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Sampling(top_k=8)
    monkeypatch.setitem(LIMITS, "top_k", Limit(int, 1, 7))
    for way in (lambda: Sampling(top_k=8), lambda: line({"prompt": "", "top_k": 8})):
        with pytest.raises(ValueError, match=r"top_k = 8: must be an integer in \[1, 7\]"):
            way()
    assert cli.main(["generate", "run", "--prompt=x", "--top-k=8"]) == 2
    assert "--top-k = 8: must be an integer in [1, 7]" in capsys.readouterr().err
