"""A chat template at work, in a process of its own: one that never ends, or fills the memory, is ended from outside.

Started as a file, without this package: Jinja's sandbox, which also lets no object be changed, is all it imports. Reads
lines of JSON, {"template", "values", "seconds"}, and answers each with one: {"text"}, {"refused"} where the template
itself raises an exception, {"error"} for any other.
"""

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY = 1 << 29  # bytes of this process
MAX_TEXT = 1 << 24  # characters of one conversation
MAX_TOLD = 300  # of an error
MISTAKES = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class RefusedError(TemplateError):
    """A template says that it does not take this conversation."""


class Generation(Extension):
    """`{% generation %}`: around what a model writes, for those who train; here it is the text inside."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Values(Namespace):
    """Jinja's `namespace`, without a way to names that the sandbox would not let through."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in (given := dict(*args[1:], **values)):
            _require_public(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}")


def refuse(message: object = "") -> None:
    raise RefusedError(str(message))


def as_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
    """As transformers writes it: for a model, not for a page."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


@cache
def compiled(source: str) -> Template:
    """What transformers would run."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = as_json
    known = {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    known |= {"dict": lambda *args, **values: dict(*args, **values), "namespace": Values}
    return sandbox.from_string(source, globals=known)


def rendered(source: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The answer to one line."""
    pieces, left = [], MAX_TEXT
    try:
        for piece in compiled(source).generate(**values):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"error": f"more than {MAX_TEXT} characters"}
        return {"text": "".join(pieces)}
    except RefusedError as error:
        return {"refused": str(error)[:MAX_TOLD]}
    except (TemplateError, *MISTAKES) as error:
        return {"error": f"{type(error).__name__}: {error}"[:MAX_TOLD]}


def confine() -> None:
    """Little memory, no file and no process of its own, where the system can see to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for who asks
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(ImportError):
        import resource

        for name, most in (("AS", MAX_MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
            with suppress(AttributeError, OSError, ValueError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def end_after(seconds: float) -> None:
    """By itself, where whoever asked is there no more to do it; 0: not at all."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    confine()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        end_after(asked["seconds"])
        sys.stdout.buffer.write(json.dumps(rendered(asked["template"], asked["values"])).encode() + b"\n")
        sys.stdout.buffer.flush()
        end_after(0)


if __name__ == "__main__":
    main()
