"""ritornello generate"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from ritornello.commands import TEXT, option
from ritornello.commands.writing import Writing
from ritornello.config import require
from ritornello.progress import Progress

if TYPE_CHECKING:
    from ritornello.engine.constraints import Constraint


@dataclass(frozen=True, kw_only=True)
class Generate(Writing):
    """Continue a text with a trained model, or every text of a file, at any number of loops."""

    prompt: Annotated[str | None, TEXT, option("What to continue.")] = None
    input: Annotated[Path | None, option("Or many requests, one JSON object a line.", metavar="FILE")] = None
    output: Annotated[Path | None, option("Gets a line for each of them; begun, it goes on.", metavar="FILE")] = None
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help="End before this text.")] = ()
    json_schema: Annotated[Path | None, option("Write JSON that this JSON schema describes.", metavar="FILE")] = None
    regex: Annotated[str | None, option("Write a text that this pattern matches.", metavar="PATTERN")] = None
    no_stream: Annotated[bool, option("Print when all is written, not as it is.")] = False

    def run(self) -> None:
        self.check_depth()
        self.check_files()
        constraint = self.constraint()
        loaded = self.load()
        options = self.wishes(loaded) | {"stop": self.stop, "constraint": constraint}
        if self.prompt is None:
            self.answer(loaded, options | ({"depth_is_fixed": True} if self.is_calibrated else {}))
            return

        from ritornello.engine.generate import stream

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
