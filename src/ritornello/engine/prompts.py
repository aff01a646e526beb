"""Requests in a file: one JSON object a line."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ritornello import recipes
from ritornello.config import ExitName, ExitRule, exit_by, require, require_choice
from ritornello.engine.constraints import Constraint
from ritornello.engine.generate import Loaded, requests
from ritornello.engine.request import Draft, Request
from ritornello.limits import LIMITS, check

MAX_LINE = recipes.MAX_BYTES
TOKEN = re.compile("0|[1-9][0-9]{0,9}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a line may hold, by the names that HTTP has for it. What it leaves out is as for the whole file."""

    prompt: str
    id: str | None = None  # the line's number
    max_tokens: int | None = None
    loops: int | None = None  # null: the model's own
    exit: ExitName | None = None  # null: never
    exit_threshold: float | None = None
    min_loops: int | None = None
    loop_budget: float | None = None  # null: no limit
    draft_loops: int | None = None  # null: no draft
    draft_tokens: int = 4
    temperature: float | None = None
    top_k: int | None = None  # null here and in the next two: no limit
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    json_schema: dict[str, Any] | None = None  # null here and in the next: any text
    regex: str | None = None
    stop: tuple[str, ...] = ()  # or one string
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] = field(default_factory=dict)  # by token id
    logprobs: int | None = None  # of each token, and so many of the likeliest; null: none

    def __post_init__(self) -> None:
        require(self.id != "", "id", self.id, "a text that is not empty")
        for name, value in vars(self).items():
            row = "n_logprobs" if name == "logprobs" else name
            if row in LIMITS and name != "logit_bias" and value is not None:
                check(row, value, name)
        for token, bias in self.logit_bias.items():
            require(bool(TOKEN.fullmatch(token)), "logit_bias", token, "the id of a token")
            check("logit_bias", bias)


KEYS = tuple(field.name for field in fields(Line))
EXIT = ("exit", "exit_threshold", "min_loops")
DRAFT = ("draft_loops", "draft_tokens")
CONSTRAINT = ("json_schema", "regex")
OTHERS = ("prompt", "id", "loops", "logit_bias", "logprobs", *EXIT, *DRAFT, *CONSTRAINT)
DEPTH = ("loops", "loop_budget", *EXIT, *DRAFT)
AS_THEY_ARE = tuple(name for name in KEYS if name not in OTHERS)


@dataclass(frozen=True)
class Asked:
    """A line's request and the strings that end its text. key: sha256 of these and of the model."""

    id: str
    key: str
    request: Request
    stop: list[str]


def read(
    path: Path, loaded: Loaded, options: Mapping[str, Any], model: str, *, depth_is_fixed: bool = False
) -> Iterator[Asked]:
    """The requests of a file, in order. options: what `requests` takes, for lines that say nothing of it; model:
    `fingerprint(loaded)`. Blank lines are left out.

    Raises:
        ValueError: not UTF-8, not JSON, an unknown key, a wrong type or value, an id that was there before, or a line
            above MAX_LINE bytes; the message begins with file:line.
    """
    ids: set[str] = set()
    for number, data in lines(path, MAX_LINE):
        if not data.strip():
            continue
        where = f"{path}:{number}"
        row = parsed(data, where)
        for name in DEPTH if depth_is_fixed else ():
            require(name not in row, f"{where}: {name}", row.get(name), "left out: a calibrated exit is for one depth")
        try:
            asked = _asked(row, str(number), loaded, options, model)
            require(asked.id not in ids, "id", asked.id, "another than those of the lines before")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
        ids.add(asked.id)
        yield asked


def lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, from 1. Raises ValueError where one is longer than `max_bytes`."""
    number = 0
    with path.open("rb") as source:
        while data := source.readline(max_bytes + 1):
            number += 1
            size = f"{len(data)} bytes or more"
            require(len(data) <= max_bytes, f"{path}:{number}", size, f"at most {max_bytes} bytes")
            yield number, data


def parsed(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError, which names `where`."""
    row = recipes.parse_json(recipes.decoded(data, where), where)
    require(isinstance(row, dict), where, row, "a JSON object")
    return row


def line(row: dict[str, Any]) -> Line:
    """The checked line of a JSON object. Raises ValueError."""
    for key in row:
        require_choice("key", key, KEYS)
    require("prompt" in row, "prompt", None, "there")
    stop = row.get("stop")
    return recipes.validated(Line, {**row, "stop": [stop]} if isinstance(stop, str) else row)


def fingerprint(loaded: Loaded) -> str:
    """sha256 of what texts depend on beside their requests: the model's shape, its weights, its tokenizer."""
    about = [asdict(loaded.model.config), loaded.tokenizer.to_json()]
    found = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in loaded.model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _asked(row: dict[str, Any], number: str, loaded: Loaded, options: Mapping[str, Any], model: str) -> Asked:
    checked = line(row)
    own: dict[str, Any] = {name: getattr(checked, name) for name in AS_THEY_ARE if name in row}
    if "loops" in row:
        own["n_loops"] = checked.loops
    if "logprobs" in row:
        own["n_logprobs"] = checked.logprobs
    if "logit_bias" in row:
        own["logit_bias"] = tuple(sorted((int(token), bias) for token, bias in checked.logit_bias.items()))
    own["exit"] = _exit(checked, row, options.get("exit"))
    require(
        "draft_loops" in row or "draft_tokens" not in row,
        "draft_tokens",
        row.get("draft_tokens"),
        "used with draft_loops",
    )
    if "draft_loops" in row:
        own["draft"] = (
            None if checked.draft_loops is None else Draft(n_loops=checked.draft_loops, n_tokens=checked.draft_tokens)
        )
    if any(name in row for name in CONSTRAINT):
        schema = None if checked.json_schema is None else json.dumps(checked.json_schema)
        free = schema is None and checked.regex is None
        own["constraint"] = None if free else Constraint(json_schema=schema, regex=checked.regex)
    (request,), stop = requests(loaded, [checked.prompt], **{**options, **own})
    request = replace(request, n_loops=request.n_loops or loaded.model.config.n_loops)
    return Asked(number if checked.id is None else checked.id, _key(request, stop, model), request, stop)


def _exit(checked: Line, row: Mapping[str, Any], usual: ExitRule | None) -> ExitRule | None:
    """The file's rule with what the line changes; another rule begins with its own threshold."""
    name = checked.exit if usual is None or "exit" in row else usual.rule
    if name is None:
        for key in EXIT[1:]:
            require(key not in row, key, row.get(key), "used with exit")
        return None
    changes: dict[str, Any] = {}
    if "exit_threshold" in row:
        changes["threshold"] = checked.exit_threshold
    if "min_loops" in row:
        changes["min_loops"] = checked.min_loops
    base = usual if usual is not None and usual.rule == name else exit_by(name)
    return replace(base, **changes)


def _key(request: Request, stop: list[str], model: str) -> str:
    """Of all that decides a text, defaults included."""
    plain = lambda value: sorted(value) if isinstance(value, frozenset) else asdict(value)  # noqa: E731
    about = json.dumps([model, stop, vars(request)], sort_keys=True, default=plain)
    return hashlib.sha256(about.encode()).hexdigest()
