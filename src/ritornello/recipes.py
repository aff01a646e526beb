"""Recipes as files: TOML to write by hand, JSON beside every checkpoint. Reading one runs nothing, imports no torch."""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ritornello import presets
from ritornello.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
    require,
    require_choice,
    shown,
)

Kind = TypeVar("Kind")
MAX_BYTES = 10_000_000
MAX_NESTING = 16
TO_FOLDER = "ritornello convert makes one of it"
_FIELDS = {
    "": ["name", "model", "data", "train", "parallel"],
    "model": ["preset", *(field.name for field in fields(ModelConfig))],
    "data": [field.name for field in fields(DataConfig)],
    "train": [field.name for field in fields(TrainConfig)],
    "parallel": [field.name for field in fields(ParallelConfig)],
}
_NAMES = [f"{table}.{name}".removeprefix(".") for table, names in _FIELDS.items() for name in names]


def find(name_or_path: str) -> Path:
    """The file of a shipped recipe's name, or of a path that ends in `.toml`."""
    if name_or_path.endswith(".toml"):
        return Path(name_or_path)
    folder = Path(str(resources.files("ritornello") / "shipped"))
    shipped = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    require_choice("recipe", name_or_path, (*shipped, "a path that ends in .toml"))
    return shipped[name_or_path]


def find_model(name_or_path: str | Path) -> Path:
    """The directory of a shipped model's name, or of a path; one that exists comes first."""
    path = Path(name_or_path)
    require(path.suffix != ".gguf", "model", str(path), "a folder", TO_FOLDER)
    folder = Path(str(resources.files("ritornello") / "shipped" / "models"))
    shipped = {found.name: found for found in sorted(folder.iterdir()) if found.is_dir()}
    return path if path.exists() or path.name != str(name_or_path) else shipped.get(path.name, path)


def model_type(path: Path) -> str | None:
    """What the folder's config.json calls its model, as transformers or as Parcae names it; None: it does not, or is
    damaged."""
    try:
        body = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found = body.get("model_type", body.get("_class_name"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def is_exported(path: Path) -> bool:
    """Whether a folder's model is one of this package, in transformers' form; else it is a run's or a checkpoint's.

    Raises:
        ValueError: somebody else's model, as it was published.
    """
    kind = model_type(path)
    require(kind in (None, "ritornello"), f"{path}: model_type", kind, "'ritornello'", TO_FOLDER)
    return kind is not None


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a recipe file, unchecked: `from_mapping` does that after `apply_sets`."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def apply_sets(mapping: Mapping[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """`mapping` with settings replaced: each of `sets` is "table.name=value", a TOML literal, else a string."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}
    for item in sets:
        name, equals, text = item.partition("=")
        require(bool(equals), "--set", item, "key=value", "for example train.lr=1e-3")
        table, _, key = name.strip().rpartition(".")
        _check_name(table, key)
        target = result.setdefault(table, {}) if table else result
        require(isinstance(target, dict), table, target, "a table of settings")
        target[key] = _literal(text.strip())
    _check(result)
    return result


def from_mapping(mapping: Mapping[str, Any]) -> Recipe:
    """The recipe of tables [model] (a `preset` and what differs from it), [data], [train] and [parallel], and a `name`.

    Raises:
        ValueError: an unknown key (the nearest is named), a wrong type, or a value out of range; one line.
    """
    _check(mapping)
    model = dict(mapping.get("model", {}))
    if "preset" in model:
        name = model.pop("preset")
        require_choice("model.preset", name, tuple(presets.PRESETS))
        model = asdict(presets.PRESETS[name]) | model
    return validated(Recipe, {**mapping, "model": model})


def to_json(recipe: Recipe) -> str:
    return json.dumps(asdict(recipe), indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Recipe:
    """The recipe that `to_json` wrote, bit for bit; errors as in `from_mapping`."""
    mapping = parse_json(text, "config.json")
    require(isinstance(mapping, dict), "config.json", mapping, "a JSON object")
    return from_mapping(mapping)


def read_json(path: Path) -> Recipe:
    """`from_json` of a file, which its errors name."""
    try:
        return from_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def validated(kind: type[Kind], mapping: Mapping[str, Any]) -> Kind:
    """A dataclass from plain data: no coercion, nested dataclasses too; an error is one line with the dotted name."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(mapping, default=str), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # a check of ours: its message begins with the field
        raise ValueError(f"{place}.{first['ctx']['error']}" if place else str(first["ctx"]["error"]))
    problem = first["msg"].replace("Input should be", "must be")
    raise ValueError(f"{place} = {shown(first['input'])}: {problem}" if place else problem)


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES) -> str:
    """A small UTF-8 file; `ValueError` if it is missing, not a regular file, unreadable or above `max_bytes`."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
        with path.open("rb") as source:
            raw = source.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise ValueError(f"{path}: more than {max_bytes} bytes")
    return decoded(raw, path)


def decoded(raw: bytes, source: object) -> str:
    """UTF-8, or a `ValueError` that names `source`."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}") from None


def parse_json(text: str, source: object) -> Any:
    """JSON without what the standard library lets pass: duplicate keys, NaN, infinity. Errors name `source`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {shown(next(key for key in keys if keys.count(key) > 1))}")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds; `ValueError`, which names it, for anything else."""
    body = parse_json(read_text(path, max_bytes=max_bytes), path)
    require(isinstance(body, dict), str(path), body, "an object")
    return body


@cache
def _adapter(kind: type[Any]) -> Any:
    """Built once, in about 10 ms; pydantic itself takes longer to import, so only who reads a recipe waits for it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _literal(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _check(mapping: Mapping[str, Any], table: str = "") -> None:
    """Names and numbers only: types and ranges are checked once the defaults are in."""
    for key, value in mapping.items():
        _check_name(table, key)
        if not table and key in _FIELDS:
            require(isinstance(value, Mapping), key, value, "a table of settings")
            _check(value, key)
        else:
            _check_value(f"{table}.{key}".removeprefix("."), value)


def _check_name(table: str, key: str) -> None:
    known = _FIELDS.get(table, [])
    if key in known:
        return
    name = f"{table}.{key}".removeprefix(".")
    elsewhere = [other for other in _NAMES if other.endswith(f".{key}")]
    near = elsewhere or [f"{table}.{other}".removeprefix(".") for other in get_close_matches(key, known, n=1)]
    near = near or get_close_matches(name, _NAMES, n=1)
    raise ValueError(f"{shown(name)}: no such setting" + (f"; did you mean {near[0]!r}?" if near else ""))


def _check_value(name: str, value: object, depth: int = 0) -> None:
    if depth > MAX_NESTING:
        raise ValueError(f"{name}: nested more than {MAX_NESTING} deep")
    require(not isinstance(value, float) or math.isfinite(value), name, value, "a finite number")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _check_value(name, inner, depth + 1)
