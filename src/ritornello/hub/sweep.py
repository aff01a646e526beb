"""lm-eval's tasks at several depths. A text that is scored runs once, to the deepest: the state after each loop is what
coda and head of that depth get. Texts that are written are written anew at each depth.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm
from yaml import YAMLError

from ritornello.config import MAX_LOOPS, require, require_int
from ritornello.hub.harness import Harness
from ritornello.train.evaluate import hidden_by_depth

Tokens = tuple[int, ...]
Request = tuple[Any, list[int], list[int]]  # the texts, and the tokens of what is given and of what is scored
Answer = tuple[float, bool]  # log-likelihood, and whether nothing is likelier token by token


class Sweep(Harness):
    """`Harness` at each of `depths`: what is asked at one is answered for all. With an exit rule each is for itself.

    depths: default: the model's own. options: of `Harness`.
    """

    def __init__(self, pretrained: str | Path, *, depths: Sequence[int] = (), **options: Any) -> None:
        for n in depths:
            require_int("loops", n, 1, MAX_LOOPS)
        super().__init__(pretrained, **options)
        self.depths = sorted(set(depths)) or [self.opened.config.depth]
        self.answers: dict[int, dict[tuple[Tokens, Tokens], Answer]] = {n: {} for n in self.depths}
        self.sharing = False
        self.states: Iterator[Tensor] | None = None  # of the batch that is being scored, at the depths to come
        self.largest: int | None = None

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        depth = self.opened.config.depth
        if self.opened.config.exit is not None or depth not in self.answers:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # pyrefly: ignore
        known = self.answers[depth]
        new = {_key(request): request for request in requests if _key(request) not in known}
        with tqdm(total=len(new), disable=disable_tqdm, desc=f"Scoring texts at loops {self.depths}") as bar:
            for batch in self._batches(list(new.values()), override_bs):
                self._score(batch)
                bar.update(len(batch))
        return [known[_key(request)] for request in requests]

    def _batches(self, requests: list[Request], override_bs: int | None) -> Iterator[list[Request]]:
        """As lm-eval's: the longest first, and what differs in its last token only is one row."""
        requests = sorted(requests, key=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
        rows: dict[Any, list[Request]] = defaultdict(list)
        for request in requests:
            given, scored = _key(request)
            rows[given + scored[:-1] if self.logits_cache else (given, scored)].append(request)
        size: Any = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size(requests, 0) if requests else 1
        groups = list(rows.values())
        for start in range(0, len(groups), size):
            yield list(chain.from_iterable(groups[start : start + size]))

    def _score(self, batch: list[Request]) -> None:
        """One batch at all depths: lm-eval asks for its logits once at each."""
        self.sharing, self.states = True, None
        try:
            for n in self.depths:
                found = super()._loglikelihood_tokens(batch, disable_tqdm=True, override_bs=len(batch))  # pyrefly: ignore
                self.answers[n] |= zip(map(_key, batch), found, strict=True)
        finally:
            self.sharing, self.states = False, None

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        if not self.sharing:
            return super()._model_call(inps, attn_mask, labels)
        model, dtype = self.opened.native, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(inps.device.type, dtype, enabled=dtype is not None):  # pyrefly: ignore
            if self.states is None:
                self.states = hidden_by_depth(model, inps, None, self.depths)
            return model.logits(next(self.states))

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """Whole rows are tried once, not at each depth."""
        if requests:
            return super()._detect_batch_size(requests, pos)
        self.largest = self.largest or super()._detect_batch_size()
        return self.largest


def sweep(lm: Sweep, tasks: Sequence[str], *, folder: Path | None = None, **options: Any) -> dict[int, dict[str, Any]]:
    """lm-eval's results by depth. folder: of more tasks than its own. options: of its `simple_evaluate`.

    Raises:
        ValueError: no such task, or one whose data or templates are damaged.
    """
    manager, found = manager_of(tasks, folder), {}
    try:
        asked = loaded(manager, tasks)
        for n in lm.depths:
            lm.set_depth(n)
            found[n] = simple_evaluate(lm, tasks=asked, task_manager=manager, **options)
    except (DatasetsError, TemplateError, YAMLError) as error:
        raise ValueError(f"tasks {', '.join(tasks)}: {error}") from error
    return found


def loaded(manager: TaskManager, tasks: Sequence[str]) -> list[Any]:
    """The tasks, and groups of them, with their data: read once for all depths."""
    found: list[Any] = []
    for name in manager.match_tasks(list(tasks)):
        one = manager.load([name])
        found += [one["groups"][name]] if name in one["groups"] else one["tasks"].values()
    return found


def manager_of(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """What knows the tasks; lm-eval's own are looked through, which takes seconds, only where the folder has not all.

    Raises:
        ValueError: no such folder, or no such task; the nearest is named.
    """
    require(folder is None or folder.is_dir(), "tasks_path", str(folder), "a folder of lm-eval's YAML files")
    require(len(tasks) > 0, "tasks", tuple(tasks), "at least one")
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=folder)
    for name in tasks:
        near = get_close_matches(name, manager.all_tasks, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "lm-eval ls tasks names them"
        require(bool(manager.match_tasks([name])), "tasks", name, "one of lm-eval's or of your folder's", remedy)
    return manager


def _key(request: Request) -> tuple[Tokens, Tokens]:
    return tuple(request[1]), tuple(request[2])
