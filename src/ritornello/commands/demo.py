"""ritornello demo"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ritornello.commands import Command, option


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Train a small model on this machine in minutes and show what depth is worth."""

    out: Annotated[Path, option("Where its runs and the plot go.", metavar="DIR")] = Path("runs/demo")

    def run(self) -> None:
        from ritornello import demo

        demo.run(out=self.out, quiet=self.common.quiet)
