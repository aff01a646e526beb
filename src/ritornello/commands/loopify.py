"""ritornello loopify"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ritornello.commands import INTEGER, REAL, Command, option
from ritornello.config import require, require_float

if TYPE_CHECKING:
    from ritornello.lab.loopify import By, Cell, Compared, Found
    from ritornello.lab.questions import Item


@dataclass(frozen=True, kw_only=True)
class Loopify(Command):
    """Search which layers of a plain model to run again, without training; other items then say what that is worth."""

    path: Annotated[
        Positional[Path],
        arg(metavar="MODEL", help="A plain one: a run, a checkpoint, or a folder of `export` or `convert`."),
    ]
    tasks: Annotated[Path, option("Texts, or questions with choices, one a line (docs/loopify.md).", metavar="JSONL")]
    test: Annotated[Path | None, option("Items for the verdict. Default: half of those given.", metavar="JSONL")] = None
    out: Annotated[Path, option("Where cells, report and model go; a search goes on there.", metavar="DIR")] = Path(
        "runs/loopify"
    )
    budget_minutes: Annotated[float, REAL, option("For the search, with what it took before.")] = 30.0
    by: Annotated[Literal["accuracy", "bits"], option("What ranks windows, where there are questions.")] = "accuracy"
    anyway: Annotated[bool, option("Write the best window's model, gain or no gain.")] = False
    seed: Annotated[int, INTEGER, option("Of the halves.")] = 0
    device: Annotated[str, option("auto, cuda, mps or cpu.", metavar="NAME")] = "auto"
    max_shard: Annotated[str, option("The largest file of weights.", metavar="SIZE")] = "5GB"

    def run(self) -> None:
        require_float("--budget-minutes", self.budget_minutes, 0)
        searched, tested = self.items()

        from ritornello.device import pick_device
        from ritornello.hub.export import free
        from ritornello.hub.loopify import opened, write
        from ritornello.lab.loopify import Search, Store, compare, exams, identity

        target = free(self.out / "model")
        wrapped, tokenizer = opened(self.path)
        model = wrapped.native.to(pick_device(self.device))
        search_exam, test_exam = exams(model, tokenizer, searched, tested)
        by = self.by if searched[0].choices else "bits"
        store = Store(self.out / "cells.jsonl", identity(model, searched))
        budget_s = 60 * self.budget_minutes
        found = Search(model, search_exam, store, by=by, budget_s=budget_s, say=self.say).run()
        windows = found.finalists(by)
        compared = compare(model, test_exam, windows)
        show(found, compared, by)
        self.record(found, compared, by, len(searched))
        gained = found.winner(by) is not None and compared[0].improves(by)
        if compared and (gained or self.anyway):
            print(write(wrapped, compared[0].window, tokenizer, target, max_shard=self.max_shard))
        else:
            print("nothing written: no gain that holds on items of the test")

    def items(self) -> tuple[list["Item"], list["Item"]]:
        """Of the search and of the test."""
        from ritornello.lab.questions import read_items, split

        given = read_items(self.tasks)
        if self.test is None:
            return split(given, seed=self.seed)
        others = read_items(self.test)
        known = set(given)
        shared = next((item for item in others if item in known), None)
        require(shared is None, "--test", shared, "without items of the search")
        same = bool(others[0].choices) == bool(given[0].choices)
        require(same, "--test", str(self.test), f"of the kind of {self.tasks}, texts or questions")
        return given, others

    def say(self, cell: "Cell") -> None:
        if not self.common.quiet:
            print(cell, flush=True)

    def record(self, found: "Found", compared: list["Compared"], by: "By", n: int) -> None:
        """report.json"""
        import json

        from ritornello.train import files

        body: dict[str, Any] = {
            "model": str(self.path),
            "tasks": str(self.tasks),
            "by": by,
            "complete": found.complete,
            "search": {"n": n, "original": asdict(found.original), "tried": len(found.cells)},
            "test": [asdict(one) for one in compared],
        }
        files.write_atomic(self.out / "report.json", json.dumps(body, indent=2).encode() + b"\n")


def show(found: "Found", compared: list["Compared"], by: "By") -> None:
    """The best windows of the search, then the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table("search", "bits", "accuracy", box=None, pad_edge=False)
    cells = {cell.window: cell for cell in found.cells}
    for cell in (found.original, *(cells[window] for window in found.best(by)[:5])):
        table.add_row(str(cell.window or "as it is"), f"{cell.bits:.4f}", _percent(cell.accuracy))
    console = Console()
    console.print(table)
    console.print(f"{len(found.cells)} windows tried{'' if found.complete else ', the budget spent'}")
    table = Table("test", "measure", "before", "after", box=None, pad_edge=False)
    for name in ("gain [95%]", "n", "compute"):
        table.add_column(name, no_wrap=True)
    for one in compared:
        for measure, gain in one.gains.items():
            before, after = one.before[measure], one.after[measure]
            interval = f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
            row = (str(one.window), measure, f"{before:.4f}", f"{after:.4f}", interval, str(gain.n))
            table.add_row(*row, f"x{one.compute:.2f}")
    console.print(table)


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.4f}"
