"""ritornello eval"""

from dataclasses import dataclass

from ritornello.commands import Command


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Score a model on lm-eval's tasks, at any number of loops."""

    def run(self) -> None:
        raise NotImplementedError
