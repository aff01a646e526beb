"""Boolean formulas in prefix notation; the bracket that closes one asks for its value."""

import re

import numpy as np

from ritornello.config import require_int
from ritornello.lab.tasks.base import Ids, Problems, Task
from ritornello.train.data import NO_LABEL

SYMBOLS = "01&|^)"  # an operator opens a bracket of two arguments: &01) is 0 and 1
CLOSE = SYMBOLS.index(")")
TABLES = {"&": (0, 0, 0, 1), "|": (0, 1, 1, 1), "^": (0, 1, 1, 0)}  # values for PAIRS
PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1))
BUSH = 2  # the most levels that the less deep argument of a formula has
INNERMOST = re.compile(r"([&|^])\.*([01])\.*([01])\.*\)")


class Formulas(Task):
    """Hops are the depth of the formula that is asked about; a row is one formula of depth `hops`. One argument is a
    formula one level less deep, the other, first or second, of at most two levels.

    All levels are needed: where one argument is less deep, it never decides the value alone (as 0 in 0 & …), which says
    what it is: 1 in an "and", 0 in an "or". Values are drawn before arguments, so that a formula is true half the time,
    whatever its operator and depth. Guessing gets 1/2 of those of 3 hops and more, which are never the less deep ones.
    """

    name = "formulas"
    title = "value of a formula"
    shared_hops = 1
    vocab_size = len(SYMBOLS) + 1  # the last id is padding
    chance = 1 / 2

    def __init__(self, max_hops: int = 12) -> None:
        require_int("max_hops", max_hops, 5)
        self.max_hops = max_hops
        self.width = 12 * max_hops + 1  # a level has at most 4 brackets, a bracket 3 tokens

    def draw(self, rng: np.random.Generator, hops: Ids) -> Ids:
        texts = [_formula(rng, depth, int(rng.integers(2))) for depth in hops.tolist()]
        ids = [list(map(SYMBOLS.index, text)) for text in texts]
        return np.array([row + [len(SYMBOLS)] * (self.width - len(row)) for row in ids])

    def present(self, rng: np.random.Generator, drawn: Ids, hops: Ids) -> Problems:
        tokens = drawn[:, : int((drawn < len(SYMBOLS)).sum(axis=1).max())]
        answers, depths = np.full_like(tokens, NO_LABEL), np.zeros_like(tokens)
        for row, ids in enumerate(tokens.tolist()):
            stack: list[tuple[int, int]] = []  # value and depth; of an operator, its id and 0
            for pos, symbol in enumerate(ids):
                if symbol != CLOSE:
                    stack.append((symbol, 0))
                    continue
                (operator, _), (x, depth), (y, other) = stack[-3:]
                stack[-3:] = [(TABLES[SYMBOLS[operator]][2 * x + y], 1 + max(depth, other))]
                answers[row, pos], depths[row, pos] = stack[-1]
        return Problems(tokens, answers, depths)

    def keys(self, tokens: Ids, hops: Ids) -> Ids:
        divided = tokens[hops > self.shared_hops]
        missing = self.width - tokens.shape[1]
        return np.pad(divided, ((0, 0), (0, missing)), constant_values=len(SYMBOLS))

    def solve(self, tokens: Ids, hops: Ids) -> Ids:
        """By putting values for innermost formulas, all at once, until none is left."""
        answers = np.full_like(tokens, NO_LABEL)
        for row, ids in enumerate(tokens.tolist()):
            text = "".join((SYMBOLS + ".")[symbol] for symbol in ids)
            while found := list(INNERMOST.finditer(text)):
                for match in found:
                    n_true = int(match[2]) + int(match[3])
                    value = {"&": n_true == 2, "|": n_true > 0, "^": n_true == 1}[match[1]]
                    answers[row, match.end() - 1] = value
                    blank = "." * (len(match[0]) - 1) + str(int(value))
                    text = text[: match.start()] + blank + text[match.end() :]
        return answers


def _formula(rng: np.random.Generator, depth: int, value: int) -> str:
    if depth == 0:
        return str(value)
    operator, first, less = "&|^"[rng.integers(3)], rng.random() < 0.5, int(rng.integers(min(depth - 1, BUSH) + 1))
    table, alike = TABLES[operator], less == depth - 1
    pairs = [(x, y) for x, y in PAIRS if table[2 * x + y] == value and (alike or table[y] != table[2 + y])]
    x, y = pairs[rng.integers(len(pairs))]
    deep, other = _formula(rng, depth - 1, x), _formula(rng, less, y)
    return f"{operator}{deep}{other})" if first else f"{operator}{other}{deep})"
