"""A request under way: its tokens, and how far each of them is."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
from torch import Tensor

from ritornello.config import ExitName
from ritornello.engine.constraints import Matcher
from ritornello.engine.pages import Rows
from ritornello.engine.prefixes import BLOCK, Prefixes
from ritornello.engine.request import Request

RULES: tuple[ExitName, ...] = get_args(ExitName)


class Sequence:
    """Its tokens have entered the loop up to `entered`, passed the coda up to `left`. The first `n_sure` are known, the
    others are a draft: guessed, and not yet agreed with. slot: where the engine keeps what it holds, while it does."""

    def __init__(
        self, number: int, request: Request, prompt: Rows, n_loops: int, room: int, matcher: Matcher | None = None
    ) -> None:
        self.number, self.request, self.n_loops, self.room = number, request, n_loops, room
        self._prompt = prompt  # (n,), or (n, C) of several token tables
        self.tokens = list(request.prompt)
        self.n_prompt = self.n_sure = len(self.tokens)
        shared = prompt if request.loop_budget is None else prompt[:-1]  # whose depth is its own
        self.n_prefix = self.n_prompt if request.prefix else 0
        whole = (prompt.tobytes(), request.loop_budget) if request.prefix else ()  # all of which each of its tokens saw
        self.keys = Prefixes.keys(shared, (n_loops, request.exit, *whole))
        self.n_scored = 1 if request.scores_prompt else self.n_prompt  # of the prompt: the others are yet to be told
        self.loops = np.zeros(room, np.int64)  # that each token took
        self.matcher = matcher  # of what is sure
        sampling = request.sampling
        self.kind = replace(sampling, seed=0) if sampling.seed else sampling  # those that sample alike do so together
        rule = request.exit
        self.rule = (-1, 0.0, 1) if rule is None else (RULES.index(rule.rule), rule.threshold, rule.min_loops)
        self._depths: dict[int, int] = {}  # that tokens with a budget may take
        self.start_over()

    def start_over(self) -> None:
        """As before anything was computed, but for the tokens found so far."""
        self.slot: int | None = None
        self.entered = self.left = 0
        self.cut_short = False  # the draft, which guesses no more
        del self.tokens[self.n_sure :]

    @property
    def decodes(self) -> bool:
        """Whether it writes: a draft may begin with the prompt's last token."""
        return self.left >= self.n_prompt or self.n_guessed > 0

    @property
    def known_keys(self) -> list[bytes]:
        """Of blocks that need not run where others have: the last token has to, and those that score another."""
        last = len(self.tokens) if self.n_scored == self.n_prompt else self.n_scored
        return self.keys[: (last - 1) // BLOCK]

    @property
    def n_guessed(self) -> int:
        return len(self.tokens) - self.n_sure

    def ids(self, n: int) -> Rows:
        """Of the next n tokens, (n,) or (n, C)."""
        end = self.entered + n
        return self._prompt[self.entered : end] if end <= self.n_prompt else np.array(self.tokens[self.entered : end])

    @property
    def n_together(self) -> int:
        """How many tokens see each other that have not entered."""
        return max(self.n_prefix - self.entered, 0)

    def enter(self, n: int) -> tuple[Rows, Rows | int]:
        """The places of the next n tokens, and how many loops each may take."""
        places = np.arange(self.entered, self.entered + n)
        self.entered += n
        budget, newest = self.request.loop_budget, self.n_sure - 1
        if budget is None:
            return places, self.n_loops
        first = self.n_prompt - 1  # the text's first token comes from the prompt's last
        if newest in places and newest not in self._depths:
            left = math.floor(budget * (newest - first + 1)) - self.loops[first:newest].sum()
            self._depths[newest] = min(max(int(left), self.request.min_loops), self.n_loops)
        return places, np.array([self._depths.get(place, self.n_loops) for place in places.tolist()])

    @property
    def drafts(self) -> bool:
        """Whether all tokens but the newest one that is sure are through, so that what follows may be guessed."""
        return self.request.draft is not None and self.left == self.n_sure - 1 and self.entered > self.left

    @property
    def n_missing(self) -> int:
        """How many more tokens this draft guesses."""
        assert self.request.draft is not None
        most = min(self.request.draft.n_tokens, self.room - self.n_sure)
        return 0 if self.cut_short else most - self.n_guessed

    def cut_draft(self) -> None:
        """There is no room for a token of it: it goes on with those that have some, or nothing would move where all is
        taken by drafts that wait."""
        del self.tokens[max(self.entered, self.n_sure) :]
        self.cut_short = True

    def allowed(self, place: int) -> Tensor | None:
        """(V,) bool: which ids may follow the token at this place; None: any. Raises ValueError where the constraint
        can't be followed any more."""
        if self.matcher is None:
            return None
        guessed = self.tokens[self.n_sure : place + 1]
        matcher = self.matcher.copy() if guessed else self.matcher
        for token in guessed:
            matcher.push(token)
        return matcher.allowed()

    def learn(self, token: int) -> bool:
        """The next token that is sure; whether a draft guessed another, so that nothing from there on counts. Raises
        ValueError, and changes nothing, where the constraint can't be followed any more."""
        if self.matcher is not None:
            self.matcher.push(token)
        wrong = self.n_guessed > 0 and self.tokens[self.n_sure] != token
        if wrong:
            self.entered = self.left = self.n_sure
        if self.tokens[self.n_sure : self.n_sure + 1] != [token]:
            self.tokens[self.n_sure :] = [token]
        self.n_sure += 1
        self.cut_short = self.cut_short and self.n_guessed > 0
        return wrong
