"""ritornello convert"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ritornello.commands import TEXT, Command, option

KIND = "What to read it as: llama, mistral, huginn_raven, ouro. Default: the model_type that it names."


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Write a published model (Huginn, Ouro, Llama and its like) as a folder that transformers reads as ours."""

    source: Annotated[Positional[Path], arg(metavar="PUBLISHED", help="Its folder, or a .gguf file.")]
    target: Annotated[Positional[Path], arg(metavar="FOLDER", help="Where to; it must not exist yet.")]
    kind: Annotated[str | None, TEXT, option(KIND, metavar="KIND", name="from")] = None
    max_shard: Annotated[str, option("The largest file of weights.", metavar="SIZE")] = "5GB"

    def run(self) -> None:
        from ritornello.hub.converters import convert

        print(convert(self.source, self.target, kind=self.kind, max_shard=self.max_shard))
