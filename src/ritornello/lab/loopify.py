"""Which layers of a plain transformer to run again, without training it: a search on some items, a verdict on others.

Many windows are tried, so the best of them looks better on what it was chosen by than it is: it is compared with the
model as it was on items that took no part, once, item by item.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ritornello import recipes
from ritornello.accounting import flops_per_token
from ritornello.config import require
from ritornello.hub.loopify import Window, assembled, loopify
from ritornello.lab.questions import Exam, Item, Scores, fingerprint
from ritornello.lab.statistics import Summary, paired
from ritornello.model.cache import Passing
from ritornello.model.layers import Pass
from ritornello.model.rdt import RecurrentDepthTransformer
from ritornello.train import files

By = Literal["accuracy", "bits"]
Step = tuple[int, tuple[float, float]]
COARSE: Step = (2, (1.0, 0.5))
OTHERS: tuple[Step, ...] = ((2, (1.0, 1.0)), (2, (0.5, 0.5)))
FINE: tuple[Step, ...] = (
    *((n, (1.0, scale)) for n in (2, 3) for scale in (0.1, 0.25, 0.5, 1.0)),
    *((n, (1 / n, 1 / n)) for n in (2, 3, 4)),
)
KEPT = 3  # spans that are looked at closely; of three times as many it is seen what other steps do
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1))


@dataclass(frozen=True)
class Cell:
    """What a window scored on the items of the search, None: the model as it is. seconds: since the cell before."""

    window: Window | None
    bits: float
    accuracy: float | None
    seconds: float

    def __str__(self) -> str:
        right = "" if self.accuracy is None else f"  accuracy {self.accuracy:.4f}"
        return f"{self.window or 'as it is'}: {self.bits:.4f} bits{right}  ({self.seconds:.1f} s)"

    def loss(self, by: By) -> tuple[float, ...]:
        """The smaller, the better."""
        return (self.bits,) if by == "bits" or self.accuracy is None else (-self.accuracy, self.bits)


@dataclass(frozen=True)
class Found:
    """original: of the search's items; cells in the order of the search; whether it came to its end."""

    original: Cell
    cells: list[Cell]
    complete: bool

    def best(self, by: By) -> list[Window]:
        """The best first; of equals, the one tried first."""
        ordered = sorted(self.cells, key=lambda cell: cell.loss(by))
        return [cell.window for cell in ordered if cell.window is not None]

    def finalists(self, by: By) -> list[Window]:
        """The best window, and its layers simply repeated, which is what usually hurts."""
        best = self.best(by)[:1]
        return list(dict.fromkeys((*best, *(replace(window, scale=(1.0, 1.0)) for window in best))))

    def winner(self, by: By) -> Window | None:
        """The best, if it is better than the original on the items of the search."""
        best = min(self.cells, key=lambda cell: cell.loss(by), default=self.original)
        return best.window if best.loss(by)[0] < self.original.loss(by)[0] else None


def identity(model: RecurrentDepthTransformer, items: Sequence[Item]) -> dict[str, Any]:
    """What a search belongs to: weights and items."""
    weights = sha256()
    for name, x in model.state_dict().items():
        weights.update(name.encode())
        weights.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {"weights_sha256": weights.hexdigest(), "items_sha256": fingerprint(items)}


def exams(model: RecurrentDepthTransformer, tokenizer: Any, *halves: Sequence[Item]) -> tuple[Exam, ...]:
    """Items as this model reads them. tokenizer: of transformers.

    Raises:
        ValueError: layers read tokens too, whose states a search keeps alone; or no token begins a text.
    """
    require(not model.config.value_embeddings, "value_embeddings", model.config.value_embeddings, "() for a search")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    require(start is not None, "tokenizer", "no bos_token, no eos_token", "one with a token that begins a text")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return tuple(Exam(half, encode, start=start, max_len=model.config.max_seq_len) for half in halves)


class Store:
    """cells.jsonl: first what the cells belong to, then each as it was found. A search that was interrupted, or is
    given more time, goes on from it."""

    def __init__(self, path: Path, belongs: dict[str, Any]) -> None:
        self.path = path
        self.cells: dict[Window | None, Cell] = {}
        if not path.exists():
            files.make_directory(path.parent)
            files.write_atomic(path, _line(belongs))
            return
        first, *rest = recipes.read_text(path).splitlines() or [""]
        same = recipes.parse_json(first, path) == belongs
        require(same, str(path), "of another search", f"of {belongs}", "give another --out")
        for i, line in enumerate(rest, 2):
            cell = _cell(recipes.parse_json(line, f"{path} line {i}"), f"{path} line {i}")
            self.cells[cell.window] = cell

    def add(self, cell: Cell) -> None:
        files.append(self.path, _line(asdict(cell)))
        self.cells[cell.window] = cell


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode() + b"\n"


def _cell(body: Any, place: str) -> Cell:
    require(isinstance(body, dict), place, body, "an object")
    try:
        return recipes.validated(Cell, body)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def spans(n_layers: int) -> list[tuple[int, int]]:
    """Windows of an eighth, a quarter and half of the layers, each half a window after the one before."""
    found = []
    for width in dict.fromkeys(max(1, round(n_layers / parts)) for parts in (8, 4, 2)):
        found += [(first, first + width) for first in range(0, n_layers - width + 1, max(1, width // 2))]
    return found


def stages(n_layers: int, best: Callable[[], list[Window]]) -> Iterator[list[Window]]:
    """What to try: spans, then the best of them more closely. `best`: of all stages before, the best first."""
    yield [Window(*span, *COARSE) for span in spans(n_layers)]
    yield [Window(*span, *step) for span in _leading(best(), 3 * KEPT) for step in OTHERS]
    for _ in range(2):
        yield [Window(*span, *step) for span in _leading(best(), KEPT) for step in FINE]
        yield [moved for window in _distinct(best(), KEPT) for moved in _moves(window, n_layers)]
    yield [Window(*span, *step) for span in _leading(best(), 1) for step in FINE]


def _leading(windows: list[Window], n: int) -> list[tuple[int, int]]:
    return list(dict.fromkeys((window.first, window.last) for window in windows))[:n]


def _distinct(windows: list[Window], n: int) -> list[Window]:
    """The best of each of the leading spans."""
    by_span = {(window.first, window.last): window for window in reversed(windows)}
    return [by_span[span] for span in _leading(windows, n)]


def _moves(window: Window, n_layers: int) -> list[Window]:
    moved = [(window.first + first, window.last + last) for first, last in MOVES]
    return [Window(*span, window.n_loops, window.scale) for span in moved if 0 <= span[0] < span[1] <= n_layers]


@dataclass
class Search:
    """Windows of a plain model, tried in a fixed order until the cells, those stored too, have taken `budget_s`."""

    model: RecurrentDepthTransformer
    exam: Exam
    store: Store
    by: By
    budget_s: float
    say: Callable[[Cell], None] = lambda _: None

    def run(self) -> Found:
        self.begun = time.monotonic()
        if None not in self.store.cells:
            self._note(None, self.exam.grade(self.model))
        found = Found(self.store.cells[None], [], complete=True)
        tried: set[Window] = set()
        for stage in stages(self.model.config.n_layers, lambda: found.best(self.by)):
            new = [window for window in dict.fromkeys(stage) if window not in tried]
            self._try([window for window in new if window not in self.store.cells])
            found.cells.extend(self.store.cells[window] for window in new if window in self.store.cells)
            tried |= set(new)
            if len(found.cells) < len(tried):
                return Found(found.original, found.cells, complete=False)
        return found

    def _try(self, windows: list[Window]) -> None:
        for window, scores in grade_all(self.model, self.exam, windows, lambda: self.spent < self.budget_s):
            self._note(window, scores)

    @property
    def spent(self) -> float:
        return sum(cell.seconds for cell in self.store.cells.values())

    def _note(self, window: Window | None, scores: Scores) -> None:
        now = time.monotonic()
        self.store.add(cell := Cell(window, scores.mean_bits, scores.accuracy, now - self.begun))
        self.begun = now
        self.say(cell)


def entered(window: Window) -> int:
    """The layer below which a window changes nothing: what is there is run once for all windows. A whole first pass is
    the model's own."""
    return window.last if window.scale[0] == 1 and window.n_loops > 1 else window.first


def grade_all(
    model: RecurrentDepthTransformer, exam: Exam, windows: list[Window], may: Callable[[], bool] = lambda: True
) -> Iterator[tuple[Window, Scores]]:
    """Windows and their scores, by where they are `entered`, while there `may` be another."""
    states: list[Tensor] = []
    at, n = 0, model.config.n_layers
    for window in sorted(windows, key=entered):
        if not may():
            return
        with torch.inference_mode():
            states = states or [model.embed(batch.tokens.to(model.head_weight.device)) for batch in exam.batches]
            states = [run_layers(model, range(at, entered(window)), x) for x in states]
        at = entered(window)
        whole, scale = at > window.first, window.scale
        rest = assembled(
            model,
            range(0),
            range(window.first, window.last),
            range(window.last, n),
            n_loops=window.n_loops - whole,
            loop_scale=(scale[1], scale[1]) if whole else scale,
        )
        yield window, _grade(exam, rest, states)


def _grade(exam: Exam, rest: RecurrentDepthTransformer, states: list[Tensor]) -> Scores:
    return exam.grade(rest, lambda i, _: rest(inputs_embeds=states[i], return_logits=False).hidden)


def run_layers(model: RecurrentDepthTransformer, numbers: range, x: Tensor) -> Tensor:
    """Some layers of a plain model, on x (B, T, D)."""
    layers: list[nn.Module] = [*model.prelude_layers, *model.coda_layers]
    now = Pass(0, 0, model.context(x), Passing())
    for i in numbers:
        x, _ = layers[i](x, now)
    return x


@dataclass(frozen=True)
class Compared:
    """A window beside the model as it is, on the same items. `compute`: its FLOPs per token, relative to that one's.
    gains: before − after in bits, after − before in accuracy, so that positive is better; in all, and by task."""

    window: Window
    before: dict[str, float]
    after: dict[str, float]
    gains: dict[str, Summary]
    by_task: dict[str, dict[str, Summary]]
    compute: float

    def improves(self, by: By) -> bool:
        """Whether the interval of the gain lies above 0."""
        return self.gains[by].low > 0


def compare(model: RecurrentDepthTransformer, exam: Exam, windows: list[Window]) -> list[Compared]:
    """Each window against the model as it is."""
    before, names = exam.grade(model), [item.task for item in exam.items]
    found = []
    for window in windows:
        looped = loopify(model, window)
        after = exam.grade(looped)
        some = {task: np.array([name == task for name in names]) for task in dict.fromkeys(names)}
        found.append(
            Compared(
                window,
                _means(before),
                _means(after),
                _gains(before, after),
                {task: _gains(before.where(chosen), after.where(chosen)) for task, chosen in some.items()},
                _flops(looped, exam, window.n_loops) / _flops(model, exam, 1),
            )
        )
    return found


def _means(scores: Scores) -> dict[str, float]:
    return {"bits": scores.mean_bits} | ({} if scores.accuracy is None else {"accuracy": scores.accuracy})


def _gains(before: Scores, after: Scores) -> dict[str, Summary]:
    gains = {"bits": paired(before.bits - after.bits, before.weight)}
    if before.right is not None and after.right is not None:
        gains["accuracy"] = paired(after.right - before.right, before.weight)
    return gains


def _flops(model: RecurrentDepthTransformer, exam: Exam, n_loops: int) -> int:
    return flops_per_token(model.config, seq_len=exam.longest, n_loops=n_loops, training=False, convention="causal")
