"""ritornello convert"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, TEXT, Command, option

MAX_TEXT = 2**26  # bytes of --text
MAX_TOKENS, ROW = 16_384, 512  # of it that are read; of one row

if TYPE_CHECKING:
    from torch import Tensor

    from ritornello.config import ModelConfig
    from ritornello.model.rdt import RecurrentDepthTransformer

Init = Literal["mean", "first", "last"]
Comeback = Literal["none", "lti"]
KIND = "What to read it as: llama, mistral, huginn_raven, ouro, ParcaeConfig. Default: what it names."


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Write a published model (Huginn, Ouro, Parcae, Llama and its like) as a folder that transformers reads."""

    source: Annotated[Positional[Path], arg(metavar="PUBLISHED", help="Its folder, or a .gguf file.")]
    target: Annotated[Positional[Path], arg(metavar="FOLDER", help="Where to; it must not exist yet.")]
    kind: Annotated[str | None, TEXT, option(KIND, metavar="KIND", name="from")] = None
    loops: Annotated[int | None, INTEGER, option("Make loops of a plain model: so many layers become one.")] = None
    prelude: Annotated[int | None, INTEGER, option("Layers before the loop. Default: an eighth.")] = None
    coda: Annotated[int | None, INTEGER, option("Layers after it. Default: an eighth, or what comes out even.")] = None
    rank: Annotated[int | None, INTEGER, option("Of what each loop has of its own; 0: nothing. Default: 64.")] = None
    init: Annotated[Init | None, option("What stands for the layers of one. Default: mean.")] = None
    injection: Annotated[Comeback | None, option("How the input may come back in each loop. Default: none.")] = None
    text: Annotated[Path | None, option("Text of the kind that it is for: much less is lost.", metavar="FILE")] = None
    max_shard: Annotated[str, option("The largest file of weights.", metavar="SIZE")] = "5GB"

    def run(self) -> None:
        from ritornello.config import require
        from ritornello.hub.converters import convert

        for name in ("prelude", "coda", "rank", "init", "injection", "text"):
            value = getattr(self, name)
            require(value is None or self.loops is not None, f"--{name}", value, "given with --loops")
        change = None if self.loops is None else self.looped
        print(convert(self.source, self.target, kind=self.kind, change=change, max_shard=self.max_shard))

    def looped(self, model: "RecurrentDepthTransformer") -> "RecurrentDepthTransformer":
        """What is made of a plain model, and a line that says so."""
        from ritornello.hub.moments import second_moments
        from ritornello.hub.upcycle import share_kept, split, upcycle

        assert self.loops is not None
        rank = 64 if self.rank is None else self.rank
        n_prelude, n_recurrent = split(model.config.n_layers, self.loops, n_prelude=self.prelude, n_coda=self.coda)
        made = upcycle(
            model,
            n_prelude=n_prelude,
            n_recurrent=n_recurrent,
            n_loops=self.loops,
            rank=rank,
            init=self.init or "mean",
            injection=self.injection or "none",
            moments=None if self.text is None else second_moments(model, self.rows(self.text, model.config)),
        )
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, made))
        layers = f"{n_prelude} + {n_recurrent} x {self.loops} + {made.config.n_coda_layers}"
        if not self.common.quiet:
            share = None if self.text else share_kept(model, made)  # says little of what is fitted to a text
            kept = f"fitted to {self.text}" if share is None else f"{share:.1%} of the tied weights' squared size kept"
            print(f"{layers} layers, rank {rank}: {before:,} parameters -> {after:,}, {kept}", file=sys.stderr)
        return made

    def rows(self, file: Path, config: "ModelConfig") -> "list[Tensor]":
        """Of its first tokens, one row after the other."""
        import torch

        from ritornello import recipes
        from ritornello.config import require
        from ritornello.hub.converters import encoded

        ids = encoded(self.source, recipes.read_text(file, max_bytes=MAX_TEXT)[: 16 * MAX_TOKENS])[:MAX_TOKENS]
        known = len(ids) > 0 and max(ids) < config.vocab_size
        require(known, f"--text {file}", f"{len(ids)} tokens", f"text in tokens of the model's {config.vocab_size}")
        return [row[None] for row in torch.tensor(ids).split(min(ROW, config.max_seq_len))]
