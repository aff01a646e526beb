"""One file for each verb of the command line. Importing one is cheap: torch comes when the verb runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg
from tyro.constructors import PrimitiveConstructorSpec

from ritornello.config import shown


def option(help: str, *, metavar: str | None = None, alias: str | None = None, name: str | None = None) -> object:
    """How an option reads in the help: its default is shown only where it tells something."""
    hint = lambda default: "" if default in ("None", "False") else f"(default: {default})"  # noqa: E731
    return arg(name=name, help=help, metavar=metavar, aliases=[alias] if alias else None, help_behavior_hint=hint)


def _number(kind: Callable[[str], float], name: str) -> PrimitiveConstructorSpec[Any]:
    def parse(tokens: list[str]) -> float:
        try:
            value = kind(tokens[0])
        except ValueError:
            value = float("nan")
        if not isfinite(value):
            raise ValueError(f"{shown(tokens[0])} is not {name}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=parse,
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


INTEGER = _number(int, "an integer")
REAL = _number(float, "a finite number")
TEXT = PrimitiveConstructorSpec[Any](  # where a plain `str | None` would take the word None for nothing
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda tokens: tokens[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True, kw_only=True)
class Common:  # no docstring: the help would print it
    quiet: Annotated[bool, option("Say nothing but results and errors.", alias="-q")] = False
    verbose: Annotated[bool, option("Show where in the program an error arose.", alias="-v")] = False
    offline: Annotated[bool, option("Never download: use only what is on this machine.")] = False


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """The arguments of one verb; a subclass's docstring is the verb's help."""

    common: OmitArgPrefixes[Common] = Common()

    @abstractmethod
    def run(self) -> None:
        """Do it. `ValueError` and `OSError` become one line for the user."""
