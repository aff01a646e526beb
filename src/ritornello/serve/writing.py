"""The texts of one request as they are written: pieces for a stream, or all of it at once."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pydantic import BaseModel

from ritornello.engine.generate import OVERFLOWED, UNFOLLOWED
from ritornello.engine.request import Event
from ritornello.engine.text import Text
from ritornello.serve.answers import End, Form, Offsets, Piece, ScoredTokens, both, joined, scored, usage
from ritornello.serve.asking import Asked
from ritornello.serve.errors import Refused
from ritornello.serve.worker import Texts, Worker
from ritornello.train.tokenizer import Tokenizer

CHUNK = 0.006  # seconds between two chunks of a stream, for each text there is: so many fit beside the engine


class Choice:
    """One text under way. With `echo` its prompt's text comes first, once the prompt's scores are there, if any are."""

    def __init__(self, place: int, asked: Asked, tokenizer: Tokenizer, *, answers: bool) -> None:
        self.place, self._asked, self._tokenizer = place, asked, tokenizer
        self.prompt = asked.prompts[place // asked.n]
        self.text = Text(tokenizer, asked.stops, begins=answers)
        self.events: list[Event] = []  # of its own tokens
        self._prompt_events: list[Event] = []
        self.echoed = tokenizer.decode(self.prompt) if asked.echo else ""
        self._begun = not asked.echo
        self._told = False  # something of its scores
        self._prompt_offsets, self._offsets = Offsets(tokenizer, 0), Offsets(tokenizer, len(self.echoed), begins=False)

    @property
    def reason(self) -> End | None:
        if self._asked.scores_only and self._begun:
            return "length"
        return None if not self.text.reason else "length" if self.text.reason == "length" else "stop"

    @property
    def all_text(self) -> str:
        return self.echoed + self.text.text

    def take(self, event: Event) -> list[Piece]:
        """What it gains by this."""
        if event.prompt:
            self._prompt_events.append(event)
            whole = len(self._prompt_events) == len(self.prompt) - 1
            return self._begin() if whole else []
        pieces = [] if self._begun else self._begin()
        if not self._asked.scores_only:
            self.events.append(event)
            pieces.append(Piece(self.place, self.text.take(event), [event], self.reason))
        return pieces

    def _begin(self) -> list[Piece]:
        self._begun = True
        return [Piece(self.place, self.echoed, self._prompt_events, self.reason)]

    def scored(self) -> ScoredTokens | None:
        """All its tokens."""
        return self._scored(self._prompt_events, self.events) if self._asked.scores else None

    def scored_piece(self, piece: Piece) -> ScoredTokens | None:
        """Those of a piece, which come in order."""
        if not self._asked.scores:
            return None
        prompts = [event for event in piece.events if event.prompt]
        return self._scored(prompts, [event for event in piece.events if not event.prompt])

    def _scored(self, prompts: Sequence[Event], events: Sequence[Event]) -> ScoredTokens:
        first = self.prompt[0] if self._asked.echo and not self._told else None
        self._told = True
        found = [scored(self._tokenizer, prompts, self._prompt_offsets, first)]
        found.append(scored(self._tokenizer, events, self._offsets))
        return both(*found)


class Writing:
    """All texts of one request. Read it once, by `pieces`, `stream` or `whole`."""

    def __init__(self, worker: Worker, texts: Texts, asked: Asked, form: Form, observer: Callable[..., object]) -> None:
        self.worker, self.texts, self.asked, self.form = worker, texts, asked, form
        self.choices = [
            Choice(place, asked, form.tokenizer, answers=form.is_chat) for place in range(len(asked.requests))
        ]
        self._observer = observer
        self._began, self._begun = time.monotonic(), set[int]()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """As they come."""
        left = set(range(len(self.choices)))
        while left:
            found: list[Piece] = []
            for place, event in await self.texts.read():
                if place not in left:  # it has ended by a stop string
                    continue
                if event.reason == "failed":
                    raise self._failed(place)
                choice = self.choices[place]
                found += choice.take(event)
                if choice.reason:
                    left.discard(place)
                    if not event.reason:
                        self.worker.end(self.texts, place)
            for piece in found:
                self._observer(piece, time.monotonic() - self._began, first=piece.place not in self._begun)
                self._begun.add(piece.place)
            if found:
                yield found

    async def whole(self) -> BaseModel:
        async for _ in self.pieces():
            pass
        return self.form.whole(self.choices, self.usage())

    async def stream(self, *, with_usage: bool, chunk_seconds: float) -> AsyncIterator[str]:
        """Each chunk as JSON. Tokens that come within `chunk_seconds` share one, unless each was asked for."""
        head = self.form.head("chat.completion.chunk" if self.form.is_chat else "text_completion")
        if self.form.is_chat:
            yield self.form.chunk(head, [self.form.opening(choice.place) for choice in self.choices])
        async for pieces in self.pieces():
            for piece in pieces if self.form.per_token else joined(pieces):
                logprobs = None if self.form.is_chat else self.choices[piece.place].scored_piece(piece)
                yield self.form.chunk(head, [self.form.piece(piece, logprobs)])
            if not self.form.per_token and not all(choice.reason for choice in self.choices):
                period = max(chunk_seconds, CHUNK * self.worker.n_texts)
                await asyncio.sleep(period - time.monotonic() % period)  # all streams write at once, and then none
        if with_usage:
            yield self.form.chunk(head, [], self.usage())

    def usage(self) -> Any:
        loops = [choice.text.loops for choice in self.choices]
        return usage(self.asked.n_prompt_tokens, loops, per_token=self.form.per_token)

    def _failed(self, place: int) -> Refused:
        constraint = self.asked.requests[place].constraint
        if constraint is not None:
            return Refused(400, UNFOLLOWED, param="response_format" if constraint.regex is None else "regex")
        return Refused(500, OVERFLOWED)
