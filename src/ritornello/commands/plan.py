"""ritornello plan"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ritornello.commands import INTEGER, REAL, Command, option
from ritornello.commands.info import print_facts
from ritornello.config import Attention, require, require_float, require_int

if TYPE_CHECKING:
    from ritornello.config import Recipe

BATCH_TOKENS = 2**22
CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """What a training run needs: memory of a GPU by part, a layout of processes and why, FLOPs, time. Builds nothing.

    A preset is planned in bfloat16, at half of its loops in the mean and a quarter of them with a gradient, with 4 M
    tokens a batch; a recipe as it says. What neither says (micro-batch, recomputation) is chosen.
    """

    name: Annotated[Positional[str], arg(metavar="NAME", help="A preset such as 1b, a shipped recipe, or a TOML file.")]
    gpus: Annotated[int, INTEGER, option("How many.")] = 8
    gpu: Annotated[str, option("a100, h100, h200 or b200.", metavar="NAME")] = "h100"
    context: Annotated[int | None, INTEGER, option("Tokens of a sequence. Default: 4096, or the recipe's.")] = None
    batch: Annotated[float | None, REAL, option("Tokens of a global batch, for example 4e6.")] = None
    loops: Annotated[float | None, REAL, option("Mean loops in training.")] = None
    backprop_loops: Annotated[int | None, INTEGER, option("Loops with a gradient; 0: all.")] = None
    optimizer: Annotated[Literal["adamw", "muon"] | None, option("Default: adamw, or the recipe's.")] = None
    precision: Annotated[Literal["fp32", "bf16"] | None, option("Default: bf16, or the recipe's.")] = None
    attention: Annotated[Attention | None, option("gqa or mla. Default: gqa, or the recipe's.")] = None
    tokens: Annotated[float | None, REAL, option("A budget to give days and GPU hours for, for example 20e9.")] = None
    set: Annotated[
        UseAppendAction[tuple[tuple[str, ...], ...]],
        arg(metavar="KEY=VALUE", help="Replace a setting, for example train.checkpoint_activations=true."),
    ] = ()
    json: Annotated[bool, option("Print JSON instead of a table.")] = False

    def run(self) -> None:
        from ritornello.config import pick
        from ritornello.planning.hardware import GPUS
        from ritornello.planning.plan import Asked, plan
        from ritornello.planning.report import facts, rows

        gpu, (recipe, settled) = pick(GPUS, self.gpu, "--gpu"), self.recipe()
        if self.tokens is not None:
            require_float("--tokens", self.tokens, 1)
        free = frozenset({"checkpoint_activations", "microbatch_size"}) - settled
        asked = Asked(recipe, gpu, self.gpus, free, rounds="batch_size" not in settled)
        found = facts(plan(asked), tokens=self.tokens)
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            print_facts(f"{self.name}, {recipe.model.attention}, {self.gpus} × {self.gpu}", rows(found))

    def recipe(self) -> "tuple[Recipe, frozenset[str]]":
        """What is planned, and the names of the [train] settings that somebody chose."""
        from ritornello import recipes
        from ritornello.presets import PRESETS

        preset = self.name in PRESETS
        mapping = {"model": {"preset": self.name}} if preset else recipes.read_toml(recipes.find(self.name))
        mapping = recipes.apply_sets(mapping, [item for group in self.set for item in group])
        settled = frozenset(mapping.get("train", {}))
        model, data, train = (dict(mapping.get(table, {})) for table in ("model", "data", "train"))
        if preset:
            n_loops = model.get("n_loops", PRESETS[self.name].n_loops)
            train = {"precision": "bf16", "mean_loops": n_loops / 2, "backprop_loops": n_loops // 4} | train
            data = {"seq_len": CONTEXT} | data
            model["max_seq_len"] = max(model.get("max_seq_len", 0), data["seq_len"], self.context or 0, CONTEXT)
        self.change(model, data, train)
        recipe = recipes.from_mapping({**mapping, "model": model, "data": data, "train": train})
        if self.batch is None and (not preset or "batch_size" in settled):
            return recipe, settled | {"batch_size"}
        return with_batch(recipe, BATCH_TOKENS if self.batch is None else self.batch), settled - {"batch_size"}

    def change(self, model: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> None:
        """Put the options into a recipe's tables."""
        given = {"optimizer": self.optimizer, "precision": self.precision, "backprop_loops": self.backprop_loops}
        train |= {name: value for name, value in given.items() if value is not None}
        if self.attention is not None:
            model["attention"] = self.attention
        if self.context is not None:
            require_int("--context", self.context, 1)
            data["seq_len"] = self.context
        loops = train.get("mean_loops", 0) if self.loops is None else self.loops
        if loops:
            require_float("--loops", loops, 1)
            train |= {"mean_loops": float(loops), "max_loops": max(train.get("max_loops", 16), math.ceil(loops))}


def with_batch(recipe: "Recipe", n_tokens: float) -> "Recipe":
    """The recipe with a batch of about so many tokens."""
    from dataclasses import replace

    seq_len = recipe.data.seq_len
    require(n_tokens >= seq_len, "--batch", n_tokens, f">= {seq_len} tokens, one sequence")
    train = replace(recipe.train, batch_size=round(n_tokens / seq_len), microbatch_size=0)
    return replace(recipe, train=train)
