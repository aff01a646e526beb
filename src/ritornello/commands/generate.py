"""ritornello generate"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from ritornello.commands import INTEGER, REAL, TEXT, Command, option
from ritornello.commands.exits import exit_rule, no_exit
from ritornello.config import MAX_LOOPS, ExitRule, require, require_int
from ritornello.progress import Progress

if TYPE_CHECKING:
    from ritornello.engine.constraints import Constraint

CALIBRATED = "calibrated"


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a text with a trained model, or every text of a file, at any number of loops."""

    path: Annotated[
        Positional[Path],
        arg(metavar="RUN", help="A run, one of its checkpoints, or `python`, a model that comes along."),
    ]
    prompt: Annotated[str | None, TEXT, option("What to continue.")] = None
    input: Annotated[Path | None, option("Or many requests, one JSON object a line.", metavar="FILE")] = None
    output: Annotated[Path | None, option("Gets a line for each of them; begun, it goes on.", metavar="FILE")] = None
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
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help="End before this text.")] = ()
    json_schema: Annotated[Path | None, option("Write JSON that this JSON schema describes.", metavar="FILE")] = None
    regex: Annotated[str | None, option("Write a text that this pattern matches.", metavar="PATTERN")] = None
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"
    no_stream: Annotated[bool, option("Print when all is written, not as it is.")] = False

    def run(self) -> None:
        rule = self.exit_rule()
        if self.loops is not None:
            require_int("--loops", self.loops, 1, MAX_LOOPS)
        self.check_files()
        ok = self.draft_tokens is None or self.draft_loops is not None
        require(ok, "--draft-tokens", self.draft_tokens, "used with --draft-loops")
        constraint = self.constraint()

        from ritornello.commands.loading import open_model
        from ritornello.engine.generate import stream

        loaded, n_loops = open_model(self.path, device=self.device), self.loops
        if self.exit == CALIBRATED:
            from ritornello.engine.calibration import calibration_of

            found = calibration_of(loaded)
            rule, n_loops = found.exit, found.goal.n_loops
            require(self.loops in (None, n_loops), "--loops", self.loops, f"{n_loops}, which the calibration is for")
            if not self.common.quiet:
                print(found, file=sys.stderr)
        options: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "n_loops": n_loops,
            "exit": rule,
            "loop_budget": self.loop_budget,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": self.stop,
            "constraint": constraint,
        }
        if self.draft_loops is not None:
            from ritornello.engine.request import Draft

            given = {} if self.draft_tokens is None else {"n_tokens": self.draft_tokens}
            options["draft"] = Draft(n_loops=self.draft_loops, **given)
        if self.prompt is None:
            self.answer(loaded, options | ({"depth_is_fixed": True} if self.exit == CALIBRATED else {}))
            return
        texts: list[Any] = []
        if constraint is not None:
            options["observer"] = texts.append
        pieces = stream(loaded, self.prompt, **options)
        for piece in ["".join(pieces)] if self.no_stream else pieces:
            print(piece, end="", flush=True)
        print()
        if texts and texts[0].reason == "length":
            print(f"cut after {len(texts[0].tokens)} tokens: only the beginning of what was asked for", file=sys.stderr)

    def constraint(self) -> "Constraint | None":
        """What the text is; None: anything."""
        if self.json_schema is None and self.regex is None:
            return None
        require(self.json_schema is None or self.regex is None, "--regex", self.regex, "used without --json-schema")

        from ritornello.engine.constraints import Constraint
        from ritornello.recipes import read_text

        schema = None if self.json_schema is None else read_text(self.json_schema)
        return Constraint(json_schema=schema, regex=self.regex)

    def answer(self, loaded: Any, options: dict[str, Any]) -> None:
        """Every line of the file; then say where the answers are."""
        from ritornello.engine.batch import run_file

        assert self.input is not None and self.output is not None
        with Progress(0, quiet=self.common.quiet) as progress:
            try:
                reasons = run_file(loaded, self.input, self.output, observer=progress.count, **options)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; the same command goes on where {self.output} ends") from None
            if reasons["failed"]:
                progress.note(f"{reasons['failed']} failed: logits that are not numbers; fewer loops may do")
        print(self.output)

    def check_files(self) -> None:
        """One text, or a file and where its answers go."""
        if self.input is None:
            require(self.prompt is not None, "--prompt", None, "a text", "or --input FILE answers a whole file")
            require(self.output is None, "--output", str(self.output), "used with --input FILE")
            return
        require(self.prompt is None, "--input", str(self.input), "used without --prompt", "leave one of them out")
        require(self.output is not None, "--output", None, "given with --input", "--output FILE gets the answers")

    def exit_rule(self) -> ExitRule | None:
        """None forces the depth, or leaves the rule to a calibration."""
        if self.exit == CALIBRATED:
            return no_exit(self.exit_threshold, self.min_loops, "left out: what is calibrated has its own")
        return exit_rule(self.exit, self.exit_threshold, self.min_loops, (CALIBRATED,))
