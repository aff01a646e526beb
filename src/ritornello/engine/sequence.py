"""A request under way: its tokens, where each of them is, and what it holds."""

import math

import numpy as np
from torch import Tensor

from ritornello.engine.constraints import Matcher
from ritornello.engine.pages import Rows, Table
from ritornello.engine.prefixes import Prefixes
from ritornello.engine.request import Request


class Flight:
    """Tokens of one sequence that run together: their places in it, their lanes, the loop that is next."""

    def __init__(self, places: Rows, lanes: Rows, loop: int = 0) -> None:
        self.places, self.lanes, self.loop = places, lanes, loop

    def cut(self, n: int) -> "Flight":
        """All but the first n, which stay."""
        rest = Flight(self.places[n:], self.lanes[n:], self.loop)
        self.places, self.lanes = self.places[:n], self.lanes[:n]
        return rest


class Sequence:
    """Its tokens have entered the loop up to `entered`, passed the coda up to `left`. The first `n_sure` are known, the
    others are a draft: guessed, and not yet agreed with."""

    def __init__(self, number: int, request: Request, n_loops: int, room: int, matcher: Matcher | None = None) -> None:
        self.number, self.request, self.n_loops, self.room = number, request, n_loops, room
        self.tokens = list(request.prompt)
        self.n_sure = len(self.tokens)
        self.keys = Prefixes.keys(request.prompt, (n_loops, request.exit))
        self.loops = np.zeros(room, np.int64)  # that each token took
        self.depths = np.full(room, n_loops)  # that each may take
        self.matcher = matcher  # of what is sure
        self.start_over()

    def start_over(self) -> None:
        """As before anything was computed, but for the tokens found so far."""
        self.table: Table | None = None
        self.flights: list[Flight] = []
        self.entered = self.left = 0
        self.lanes = np.full(self.room, -1, np.int64)  # of tokens that have left the loop
        self.cut_short = False  # the draft, which guesses no more
        del self.tokens[self.n_sure :]

    @property
    def decodes(self) -> bool:
        return self.left >= len(self.request.prompt)

    @property
    def n_drafted(self) -> int:
        return len(self.tokens) - self.n_sure

    def enter(self, lanes: Rows) -> Flight:
        """The next tokens, as many as there are lanes."""
        flight = Flight(np.arange(self.entered, self.entered + len(lanes)), lanes)
        self.entered += len(lanes)
        self.flights.append(flight)
        begin, budget = len(self.request.prompt), self.request.loop_budget
        newest = self.n_sure - 1  # how many loops those before it took is known
        if budget is not None and newest >= begin and newest in flight.places:
            left = math.floor(budget * (newest - begin + 1)) - self.loops[begin:newest].sum()
            self.depths[newest] = min(max(left, self.request.min_loops), self.n_loops)
        return flight

    @property
    def drafts(self) -> bool:
        """Whether all tokens but the newest one that is sure are through, so that what follows may be guessed."""
        return self.request.draft is not None and self.left == self.n_sure - 1 and bool(self.flights)

    @property
    def _n_missing(self) -> int:
        """How many more tokens this draft guesses."""
        assert self.request.draft is not None
        most = min(self.request.draft.n_tokens, self.room - self.n_sure)
        return 0 if self.cut_short else most - self.n_drafted

    @property
    def _is_complete(self) -> bool:
        """Whether a draft has all its tokens, each with its few loops done."""
        assert self.request.draft is not None
        last = self.flights[-1]
        return (
            not self._n_missing and last.places[-1] == len(self.tokens) - 1 and last.loop >= self.request.draft.n_loops
        )

    def guesses(self) -> Flight | None:
        """The token that the next one of a draft is guessed from, where its few loops are done."""
        draft = self.request.draft
        if draft is None or not self.drafts or not self._n_missing:
            return None
        last = self.flights[-1]
        ready = last.loop == draft.n_loops and last.places[-1] == len(self.tokens) - 1
        return Flight(last.places[-1:], last.lanes[-1:]) if ready else None

    def waits(self, flight: Flight) -> bool:
        """Whether these tokens of a draft stay where they are until it is complete."""
        draft = self.request.draft
        return draft is not None and self.drafts and flight.loop == draft.n_loops and not self._is_complete

    def cut_draft(self) -> None:
        """There is no lane for a token of it: it goes on with those that have one, or nothing would move where all
        lanes are held by drafts that wait."""
        del self.tokens[max(self.entered, self.n_sure) :]
        self.cut_short = True

    def join(self) -> None:
        """A draft that is complete runs on as one."""
        if self.drafts and self._is_complete and len(self.flights) > 1:
            places, lanes = (np.concatenate([getattr(f, name) for f in self.flights]) for name in ("places", "lanes"))
            self.flights = [Flight(places, lanes, self.flights[0].loop)]

    def arrived(self, most: int) -> Flight:
        """Tokens whose predecessors have all left the loop, at most so many; a draft's all or none."""
        there = self.lanes[self.left : self.entered] >= 0
        n = len(there) if there.all() else int(there.argmin())
        n = min(n, most) if n <= most or not self.n_drafted else 0
        places = np.arange(self.left, self.left + n)
        return Flight(places, self.lanes[places])

    def allowed(self, place: int) -> Tensor | None:
        """(V,) bool: which ids may follow the token at this place; None: any. Raises ValueError where the constraint
        can't be followed any more."""
        matcher, guessed = self.matcher, self.tokens[self.n_sure : place + 1]
        if matcher is not None and guessed:
            matcher = matcher.copy()
            try:
                for token in guessed:
                    matcher.push(token)
            except ValueError:  # a text never gets here
                return None
        return None if matcher is None else matcher.allowed()

    def learn(self, token: int) -> None:
        """The next token that is sure. If a draft guessed another, nothing computed from there on counts."""
        if self.n_drafted and self.tokens[self.n_sure] != token:
            assert self.table is not None
            self.table.forget(self.n_sure)
            self.entered = self.left = self.n_sure
        if self.tokens[self.n_sure : self.n_sure + 1] != [token]:
            self.tokens[self.n_sure :] = [token]
        if self.matcher is not None:
            self.matcher.push(token)
        self.n_sure += 1
        self.cut_short = self.cut_short and self.n_drafted > 0
