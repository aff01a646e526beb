"""The task that docs/lab.md shows how to add is one."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ritornello.train.data import NO_LABEL

PAGE = Path(__file__).parents[2] / "docs/lab.md"


@pytest.fixture
def task() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["SumModulo"]()


@pytest.mark.parametrize("split", ["train", "test"])
def test_shown_task_keeps_the_protocol(task: Any, split: Any) -> None:
    hops = np.array([1, 5, 24, 10])
    found, again = (task.sample(np.random.default_rng(0), hops, split=split) for _ in range(2))
    assert (found.tokens == again.tokens).all()
    assert (found.answers == task.solve(found.tokens, hops)).all()
    assert (found.hops.max(axis=1) == hops).all()
    asked = found.answers != NO_LABEL
    assert (asked == (found.hops > 0)).all() and found.answers[asked].max() < 10
    wrong = found.answers + asked
    assert not (wrong == task.solve(found.tokens, hops)).all()


def test_every_task_and_verdict_is_described() -> None:
    from typing import get_args

    from ritornello.lab.report import Outcome
    from ritornello.lab.tasks import TASKS

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in TASKS)
    assert all(outcome in text for outcome in get_args(Outcome))
