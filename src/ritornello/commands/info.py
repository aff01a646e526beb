"""ritornello info"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ritornello.commands import Command, option
from ritornello.config import Attention


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """What a preset costs: parameters, FLOPs by loops, cache bytes. Builds no weights."""

    name: Annotated[Positional[str], arg(metavar="NAME", help="A preset, such as 1b.")]
    attention: Annotated[Attention, option("Which attention the preset is built with.")] = "gqa"
    json: Annotated[bool, option("Print JSON instead of a table.")] = False

    def run(self) -> None:
        from ritornello.presets import preset

        config = preset(self.name, attention=self.attention)

        from ritornello.accounting import describe

        facts = describe(config)
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            print_facts(f"{self.name}, {self.attention}", facts)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A table of two columns; a mapping inside becomes rows below its name."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        if isinstance(value, Mapping):
            table.add_section()
            table.add_row(name, "", style="bold")
            for inner, number in value.items():
                table.add_row(f"  {inner}", readable(number))
            table.add_section()
        else:
            table.add_row(name, readable(value))
    Console().print(table)


def readable(value: object) -> str:
    """1003000000 as "1.003 B"; anything but a large number as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
            if abs(value) >= limit:
                return f"{value / limit:.4g}{unit}"
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    return str(value)
