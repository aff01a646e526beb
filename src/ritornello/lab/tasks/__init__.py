"""The tasks by name: a new one is a file beside these and a line here."""

from collections.abc import Mapping
from typing import Any

from ritornello.config import pick
from ritornello.lab.tasks.addition import Addition
from ritornello.lab.tasks.base import Material, Problems, Split, Task
from ritornello.lab.tasks.chains import Chains
from ritornello.lab.tasks.cyclic import Cyclic
from ritornello.lab.tasks.facts import Facts
from ritornello.lab.tasks.formulas import Formulas
from ritornello.lab.tasks.induction import Induction
from ritornello.lab.tasks.parity import Parity
from ritornello.lab.tasks.reachability import Reachability
from ritornello.lab.tasks.s5 import S5WordProblem
from ritornello.lab.tasks.text import Text
from ritornello.lab.tasks.trees import Trees
from ritornello.lab.tasks.walks import Walks
from ritornello.lab.tasks.written import WrittenChains

__all__ = ["MATERIALS", "TASKS", "Material", "Problems", "Split", "Task", "build_task"]

TASKS: dict[str, Task] = {
    "cyclic": Cyclic(),
    "chains": Chains(),
    "written-chains": WrittenChains(),
    "trees": Trees(),
    "parity": Parity(),
    "s5": S5WordProblem(),
    "facts": Facts(),
    "walks": Walks(),
    "induction": Induction(),
    "addition": Addition(),
    "reachability": Reachability(),
    "formulas": Formulas(),
}
# Text has no oracle and is divided by package, so it stands outside the contracts that every task keeps.
MATERIALS: dict[str, Material] = {**TASKS, "text": Text()}


def build_task(name: str, sizes: Mapping[str, int]) -> Material:
    """The material called `name` in other sizes than its usual ones."""
    kind: Any = type(pick(MATERIALS, name, "task"))
    return kind(**sizes)
