"""ritornello export"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ritornello.commands import Command, option


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a run's model as a folder that transformers reads, with this package installed or without."""

    run_path: Annotated[Positional[Path], arg(metavar="RUN", help="A run or one of its checkpoints.")]
    target: Annotated[Positional[Path], arg(metavar="FOLDER", help="Where to; it must not exist yet.")]
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], option("Of the weights.")] = "auto"
    max_shard: Annotated[str, option("The largest file of weights.", metavar="SIZE")] = "5GB"

    def run(self) -> None:
        import torch

        from ritornello.hub.export import export
        from ritornello.recipes import find_model

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        print(export(find_model(self.run_path), self.target, dtype=dtype, max_shard=self.max_shard))
