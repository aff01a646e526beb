"""A file of requests in, a file of answers out. Run again, it goes on where it ended."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from ritornello.config import require, shown
from ritornello.engine.engine import Engine
from ritornello.engine.generate import Loaded, Wishes, engine_for, requests
from ritornello.engine.prompts import Asked, fingerprint, lines, parsed, read
from ritornello.engine.request import Event
from ritornello.engine.text import Text
from ritornello.train import files
from ritornello.train.corpus import require_unchanged, stamp

AT_ONCE = 256  # requests that the engine knows of: memory for a file of any length
MAX_ANSWER = 1 << 30  # bytes of a line: 20 log-probabilities for each of 2**20 tokens fit
BEGINNING = b'{"id": "'  # of every answer
PIECE = 1 << 20  # bytes copied at a time
OTHER = "choose another output"


class FileWishes(Wishes, total=False):
    """What `run_file` takes by keyword, for lines that say nothing of it."""

    n_logprobs: int | None  # 0 … 20; None: no log-probabilities


def run_file(
    loaded: Loaded,
    input: str | Path,
    output: str | Path,
    *,
    observer: Callable[[int, int], object] = lambda done, total: None,
    depth_is_fixed: bool = False,
    **options: Unpack[FileWishes],
) -> Counter[str]:
    """Answer every line of `input` (see `prompts.Line`) by a line of `output`, written once it is complete. Returns how
    many texts were written now, by the reason why they ended.

    Each text is what `generate` gives for its prompt and seed alone, up to rounding. A line that says nothing of its
    seed has the one given here. Where logits are not numbers a text ends with the reason `failed`; others go on.
    What `output` holds already is not done again, and a line that was cut short is taken away first.

    Args:
        observer: is told how many lines are answered, and of how many.
        depth_is_fixed: no line may ask for another depth, as where `exit` was calibrated.
    Raises:
        ValueError: a line that is no request, before anything is computed; an output that another process writes to,
            or with answers to other requests or of another model.
        OSError: an answer cannot be written; those before it are.
    """
    source, target = Path(input), Path(output).resolve()
    _check(source, target)
    requests(loaded, [""], **options)  # a mistake in what all lines share is no line's
    model, before = fingerprint(loaded), stamp(source)
    keys: dict[str, str] = {}
    limit, n_tokens, deepest, constrained = loaded.model.config.max_seq_len, 0, 1, False
    for asked in read(source, loaded, options, model, depth_is_fixed=depth_is_fixed):
        keys[asked.id] = asked.key
        n_tokens, deepest = n_tokens + asked.request.room(limit), max(deepest, asked.request.n_loops or 1)
        constrained = constrained or asked.request.constraint is not None
    require(bool(keys), "input", str(source), "a file with at least one request")
    reasons: Counter[str] = Counter()
    with files.lock_file(target):
        done = resumed(target, keys)
        observer(len(done), len(keys))
        if len(done) == len(keys):
            return reasons
        engine = engine_for(loaded, n_loops=deepest, n_tokens=n_tokens, constrained=constrained)
        again = _unchanged(source, before, read(source, loaded, options, model, depth_is_fixed=depth_is_fixed))
        for answer in _answers(loaded, engine, (asked for asked in again if asked.id not in done)):
            files.append(target, answer.line())
            reasons[answer.text.reason] += 1
            observer(len(done) + reasons.total(), len(keys))
    return reasons


def _check(source: Path, target: Path) -> None:
    require(source.is_file(), "input", str(source), "a file that exists")
    require(target.parent.is_dir(), "output", str(target), "in a folder that exists")
    require(target.is_file() or not target.exists(), "output", str(target), "a regular file or a new name")
    same = target.exists() and target.samefile(source)
    require(not same, "output", str(target), "another file than the input")


def _unchanged(source: Path, before: tuple[int, int, int], rows: Iterator[Asked]) -> Iterator[Asked]:
    """What is read twice has to be the same twice."""
    for row in rows:
        require_unchanged(source, before)
        yield row


def resumed(path: Path, keys: Mapping[str, str]) -> set[str]:
    """The ids that `path` answers, each with its key; from then on it holds whole lines only.

    Raises:
        ValueError: a line that is not of these; the file is then as it was.
    """
    done: set[str] = set()
    size = 0
    for number, data in lines(path, MAX_ANSWER) if path.exists() else ():
        where, whole = f"{path}:{number}", data.endswith(b"\n")
        if not whole and not _is_json(data):  # a kill in the middle of it
            ours = data[: len(BEGINNING)] == BEGINNING[: len(data)]
            require(ours, where, data[:80], "the beginning of an answer", OTHER)
            break
        name = _answered(parsed(data, where), where, keys)
        require(name not in done, where, name, "answered once", OTHER)
        if whole:
            done.add(name)
            size += len(data)
    if path.exists() and size < path.stat().st_size:
        _keep(path, size)
    return done


def _answered(row: Mapping[str, Any], where: str, keys: Mapping[str, str]) -> str:
    """The id of the request that this answers."""
    match row:
        case {"id": str(name), "key": str(key)}:
            require(name in keys, where, name, "an id of the input", OTHER)
            same = keys[name] == key
            require(same, where, name, "answered with the same prompt, settings and model", OTHER)
            return name
    raise ValueError(f"{where}: {shown(row)} is not an answer; {OTHER}")


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _keep(path: Path, size: int) -> None:
    """The first `size` bytes of a file, all at once."""
    with path.open("rb") as source, files.create(path) as out:
        while piece := source.read(min(size, PIECE)):
            size -= out.write(piece)


@dataclass
class _Answer:
    """A text under way."""

    asked: Asked
    text: Text
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def take(self, event: Event) -> None:
        self.text.take(event)
        if event.logprob is not None and event.token is not None:
            likeliest = [[token, _number(share)] for token, share in event.likeliest]
            own = {"token": event.token, "logprob": _number(event.logprob)}
            self.logprobs.append({**own, "likeliest": likeliest})

    def line(self) -> bytes:
        text, request = self.text, self.asked.request
        told: dict[str, Any] = {
            "id": self.asked.id,
            "text": text.text,
            "reason": text.reason,
            "n_prompt_tokens": len(request.prompt),
            "n_tokens": len(text.tokens),
            "loops_mean": sum(text.loops) / len(text.loops) if text.loops else None,
            "loops": text.loops,
        }
        if request.n_logprobs is not None:
            told["logprobs"] = self.logprobs
        return json.dumps({**told, "key": self.asked.key}, allow_nan=False).encode() + b"\n"


def _number(share: float) -> float | None:
    """JSON has no infinity, which is the logarithm of a share of 0."""
    return share if math.isfinite(share) else None


def _answers(loaded: Loaded, engine: Engine, rows: Iterator[Asked]) -> Iterator[_Answer]:
    """Each when it is complete. The engine gets new requests as old ones leave."""
    under_way: dict[int, _Answer] = {}
    while True:
        while len(under_way) < AT_ONCE and (asked := next(rows, None)):
            answer = _Answer(asked, Text(loaded.tokenizer, asked.stop))
            if len(asked.request.prompt) < loaded.model.config.max_seq_len:
                under_way[engine.submit(asked.request)] = answer
            else:  # no room for a token
                answer.text.finish("length")
                yield answer
        if not under_way:
            return
        for event in engine.step():
            if answer := under_way.get(event.number):
                answer.take(event)
                if answer.text.reason:
                    engine.cancel(event.number)
                    yield under_way.pop(event.number)
