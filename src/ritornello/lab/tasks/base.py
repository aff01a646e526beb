"""What a model is trained on. What every task gives beside: problems of a wanted difficulty, an oracle, and a training
split apart from the test split.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ritornello.config import require, require_choice
from ritornello.ops.noise import fold

Ids = NDArray[np.int64]
Split = Literal["train", "test"]
TEST_SHARE = 8  # one problem in so many is kept for the test
MAX_ROUNDS = 200  # of 8 tries: (7/8)^1600 < 1e-92, so whoever is still without a problem then has none


@dataclass(frozen=True)
class Problems:
    """n problems; T positions, each of C ids where the task has several token tables."""

    tokens: Ids  # (n, T) or (n, T, C)
    answers: Ids  # (n, T); NO_LABEL where nothing is asked
    hops: Ids  # (n, T): difficulty of each question; 0 where nothing is asked


class Material(ABC):
    """What a model can be trained on. Instances hold sizes and tables, nothing that sampling changes."""

    name: str
    title: str  # for figures and tables
    loops_say_hops: bool = False  # how many hops are meant is said by the number of loops alone
    train_hops: int = 5
    max_hops: int
    vocab_size: int  # of every token table
    n_token_tables: int = 1

    @abstractmethod
    def sample(self, rng: np.random.Generator, hops: Ids, *, split: Split) -> Problems:
        """One problem for each entry of `hops` (n,): the hops of its hardest question."""

    def tell(self, problems: Problems) -> Ids:
        """The tokens with the number of hops written in, for models without loops."""
        return problems.tokens


class Task(Material):
    """A family of problems with an oracle, divided by what a problem is."""

    chance: float  # the share of right answers that guessing among the possible ones gets
    shared_hops: int = 0  # problems of so few hops are too few to divide: both splits draw from all of them

    def sample(self, rng: np.random.Generator, hops: Ids, *, split: Split) -> Problems:
        self.check(hops, split)
        drawn = draw_split(self.draw, rng, hops, split, shared_hops=self.shared_hops)
        return self.present(rng, drawn, hops)

    @abstractmethod
    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        """(n, m): what identifies one random problem for each entry of `hops`."""

    @abstractmethod
    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        """The problems that `draw` identified, as tokens."""

    @abstractmethod
    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        """(n, m): what `draw` gave, read back from tokens; problems that both splits share are left out."""

    @abstractmethod
    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """The answers (n, T), another way than the generator's. `hops` (n,) matters only where loops say it."""

    def guessing(self, hops: int) -> float:
        """The share of questions of `hops` hops that guessing among the answers left open by the problem gets right."""
        return self.chance

    def check(self, hops: Ids, split: Split) -> None:
        """Raise ValueError unless `sample` can serve these arguments."""
        require_choice("split", split, ("train", "test"))
        whole = hops.ndim == 1 and hops.size > 0 and hops.dtype.kind in "iu"
        require(whole, "hops", hops.shape, "one integer for each of at least one problem")
        low, high = int(hops.min()), int(hops.max())
        require(low >= 1, "hops", low, f"in [1, {self.max_hops}] for {self.name}")
        require(high <= self.max_hops, "hops", high, f"in [1, {self.max_hops}] for {self.name}")


def is_test(keys: Ids) -> NDArray[np.bool_]:
    """Whether each problem is kept for the test: a hash of its key, `keys` (n, m)."""
    state = torch.full((len(keys),), keys.shape[1], dtype=torch.int64)
    for column in torch.from_numpy(np.ascontiguousarray(keys.T)):
        state = fold(state, column)
    return (state % TEST_SHARE == 0).numpy()


def draw_split(
    make: Callable[[np.random.Generator, Ids], Ids],
    rng: np.random.Generator,
    hops: Ids,
    split: Split,
    *,
    shared_hops: int = 0,
) -> Ids:
    """`make(rng, hops)` (n, m), with the rows on the wrong side of the split redrawn until none is left."""

    def misplaced(keys: Ids, hops: Ids) -> NDArray[np.bool_]:
        return (is_test(keys) != (split == "test")) & (hops > shared_hops)

    keys = make(rng, hops)
    wrong = np.flatnonzero(misplaced(keys, hops))
    for _ in range(MAX_ROUNDS):
        if len(wrong) == 0:
            return keys
        wanted = np.repeat(hops[wrong], TEST_SHARE)  # several tries at once: about as many as one hit takes
        tries = make(rng, wanted)
        good = ~misplaced(tries, wanted).reshape(len(wrong), TEST_SHARE)
        keys[wrong] = tries.reshape(*good.shape, -1)[np.arange(len(wrong)), good.argmax(axis=1)]
        wrong = wrong[~good.any(axis=1)]
    raise ValueError(f"hops = {hops[wrong[0]]}: must have problems in the split {split!r}; take a larger task")
