"""ritornello convert"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ritornello.commands import Command, option


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Write a published looped model (Huginn, Ouro) as a folder that transformers reads as ours."""

    source: Annotated[Positional[Path], arg(metavar="PUBLISHED", help="Its folder: config.json and safetensors.")]
    target: Annotated[Positional[Path], arg(metavar="FOLDER", help="Where to; it must not exist yet.")]
    max_shard: Annotated[str, option("The largest file of weights.", metavar="SIZE")] = "5GB"

    def run(self) -> None:
        from ritornello.hub.converters import convert

        print(convert(self.source, self.target, max_shard=self.max_shard))
