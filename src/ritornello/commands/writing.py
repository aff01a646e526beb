"""What the verbs that write have in common: the model, its depth, how it chooses tokens."""

import sys
from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, REAL, Command, option
from ritornello.commands.exits import exit_rule, no_exit
from ritornello.config import ExitRule, require
from ritornello.limits import LIMITS, check

CALIBRATED = "calibrated"


@dataclass(frozen=True, kw_only=True)
class Writing(Command, ABC):
    path: Annotated[
        Positional[Path],
        arg(metavar="RUN", help="A run, a checkpoint, an exported, converted or published folder, or `python`."),
    ]
    loops: Annotated[int | None, INTEGER, option("Depth; with --exit the most it may reach.")] = None
    exit: Annotated[
        str | None,
        option("Stop early: hazard, cumulative, kl, delta, entropy; or calibrated, as was found.", metavar="RULE"),
    ] = None
    exit_threshold: Annotated[float | None, REAL, option("When --exit stops; each rule has its own.")] = None
    min_loops: Annotated[int, INTEGER, option("With --exit: no token leaves before.")] = 1
    loop_budget: Annotated[float | None, REAL, option("Loops of a written token in the mean, at most.")] = None
    draft_loops: Annotated[int | None, INTEGER, option("So many loops guess, full depth decides: the same text.")] = (
        None
    )
    draft_tokens: Annotated[int | None, INTEGER, option("Tokens to guess at a time; 4 if not given.")] = None
    max_tokens: Annotated[int, INTEGER, option("Tokens to write at most.")] = 256
    temperature: Annotated[float, REAL, option("0 always takes the likeliest token.")] = 0.8
    top_k: Annotated[int | None, INTEGER, option("Sample from the N likeliest tokens.")] = None
    top_p: Annotated[float | None, REAL, option("Sample from the likeliest tokens that sum to N.")] = None
    min_p: Annotated[float | None, REAL, option("Drop tokens below N times the likeliest.")] = None
    seed: Annotated[int, INTEGER, option("The same seed writes the same text.")] = 0
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"

    @property
    def is_calibrated(self) -> bool:
        return self.exit == CALIBRATED

    def check_depth(self) -> None:
        """What can be told before the model is read."""
        for name, value in vars(self).items():
            if name in LIMITS and value is not None:
                check(name, value, "--" + name.replace("_", "-"))
        self.exit_rule()
        ok = self.draft_tokens is None or self.draft_loops is not None
        require(ok, "--draft-tokens", self.draft_tokens, "used with --draft-loops")

    def load(self) -> Any:
        from ritornello.commands.loading import open_model

        return open_model(self.path, device=self.device)

    def wishes(self, loaded: Any) -> dict[str, Any]:
        """What is asked of the engine, but for the text."""
        exit_rule, n_loops = self.exit_rule(), self.loops
        if self.is_calibrated:
            from ritornello.engine.calibration import calibration_of

            found = calibration_of(loaded)
            exit_rule, n_loops = found.exit, found.goal.n_loops
            found.check_loops(self.loops, "--loops")
            if not self.common.quiet:
                print(found, file=sys.stderr)
        named = ("max_tokens", "loop_budget", "temperature", "top_k", "top_p", "min_p", "seed")
        wishes = {"n_loops": n_loops, "exit": exit_rule} | {name: getattr(self, name) for name in named}
        if self.draft_loops is not None:
            from ritornello.engine.request import Draft

            given = {} if self.draft_tokens is None else {"n_tokens": self.draft_tokens}
            wishes["draft"] = Draft(n_loops=self.draft_loops, **given)
        return wishes

    def exit_rule(self) -> ExitRule | None:
        """None forces the depth, or leaves the rule to a calibration."""
        if self.is_calibrated:
            return no_exit(self.exit_threshold, self.min_loops, "left out: what is calibrated has its own")
        return exit_rule(self.exit, self.exit_threshold, self.min_loops, (CALIBRATED,))
