"""OpenAI's answers, whole or piece by piece, with the loops that tokens took beside them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from uuid import uuid4

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice as WholeChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from ritornello.engine.request import Event
from ritornello.engine.trace import TokenTrace
from ritornello.train.tokenizer import StreamDecoder, Tokenizer

Kind = TypeVar("Kind", bound=BaseModel)
LEAST = -9999.0  # JSON has no infinity; OpenAI's own server says this too
End = Literal["stop", "length"]


class LoopsUsed(BaseModel):
    """Of the tokens that were written; per_token by choice, if it was asked for."""

    mean: float | None
    per_token: list[list[int]] | None = None


class Usage(CompletionUsage):
    loops: LoopsUsed


class ScoredTokens(Logprobs):
    """Of the prompt's first token nothing is known."""

    token_logprobs: list[float | None] | None = None  # pyrefly: ignore
    top_logprobs: list[dict[str, float] | None] | None = None  # pyrefly: ignore


class TextChoice(CompletionChoice):
    """loops, token_ids: of a stream with `loops_per_token`, whose chunks are one token each."""

    finish_reason: End | None = None  # pyrefly: ignore
    logprobs: ScoredTokens | None = None  # pyrefly: ignore
    loops: list[int] | None = None
    token_ids: list[int] | None = None


class TextAnswer(Completion):
    choices: list[TextChoice]  # pyrefly: ignore
    usage: Usage | None = None  # pyrefly: ignore


class ChatAnswer(ChatCompletion):
    usage: Usage | None = None  # pyrefly: ignore


class ChatChoice(ChunkChoice):
    loops: list[int] | None = None
    token_ids: list[int] | None = None


class ChatChunk(ChatCompletionChunk):
    choices: list[ChatChoice]  # pyrefly: ignore
    usage: Usage | None = None  # pyrefly: ignore


class Candidate(BaseModel):
    id: int
    text: str
    logprob: float


class Reading(BaseModel):
    """After one loop. entropy: in nats."""

    entropy: float | None
    top: list[Candidate]


class TracedToken(BaseModel):
    """A token, and what each loop of the state that led to it would have answered."""

    id: int
    text: str
    loops: int
    by_loop: list[Reading]


class TraceAnswer(BaseModel):
    object: Literal["trace"]
    model: str
    tokens: list[TracedToken]


@dataclass(frozen=True)
class Piece:
    """What a choice gained: text, the events that led to it, and why it ends, if it does."""

    place: int
    text: str
    events: Sequence[Event]
    reason: End | None = None

    @property
    def written(self) -> list[Event]:
        return [event for event in self.events if event.token is not None and not event.prompt]


def made(kind: type[Kind], **fields: Any) -> Kind:
    """Of fields that are right already: OpenAI's own `model_construct` looks at each once more, which takes longer than
    all the rest of a chunk."""
    return BaseModel.model_construct.__func__(kind, **fields)  # pyrefly: ignore


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One for each choice, in the order of their beginnings."""
    places = dict.fromkeys(piece.place for piece in pieces)
    mine = {place: [piece for piece in pieces if piece.place == place] for place in places}
    return [
        Piece(place, "".join(p.text for p in some), [e for p in some for e in p.events], some[-1].reason)
        for place, some in mine.items()
    ]


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; as OpenAI does where its bytes are none, and by name where it has none."""
    if token in tokenizer.special:
        return tokenizer.special[token]
    data = tokenizer.token_bytes[token]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Where each token's text begins, in characters: of a character in several tokens, all where it begins."""

    def __init__(self, tokenizer: Tokenizer, at: int, *, begins: bool = True) -> None:
        self.at, self._decoder = at, StreamDecoder(tokenizer, begins=begins)

    def of(self, token: int) -> int:
        at = self.at
        self.at += len(self._decoder.push([token]))
        return at


def scored(tokenizer: Tokenizer, events: Sequence[Event], offsets: Offsets, first: int | None = None) -> ScoredTokens:
    """Of these tokens. first: the prompt's first one."""
    tokens = [event.token for event in events if event.token is not None]
    logprobs: list[float | None] = [event.logprob for event in events if event.token is not None]
    likely: list[Any] = [event.likeliest for event in events if event.token is not None]
    if first is not None:
        tokens, logprobs, likely = [first, *tokens], [None, *logprobs], [None, *likely]
    words = [spelled(tokenizer, token) for token in tokens]
    places = [offsets.of(token) for token in tokens]
    tops = [None if some is None else {spelled(tokenizer, i): max(x, LEAST) for i, x in some} for some in likely]
    values = [None if x is None else max(x, LEAST) for x in logprobs]
    return made(ScoredTokens, text_offset=places, token_logprobs=values, tokens=words, top_logprobs=tops)


def both(one: ScoredTokens, other: ScoredTokens) -> ScoredTokens:
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return made(ScoredTokens, **{name: getattr(one, name) + getattr(other, name) for name in names})


def chat_scored(tokenizer: Tokenizer, events: Sequence[Event]) -> ChoiceLogprobs:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        data = list(tokenizer.token_bytes[token])
        return {"token": spelled(tokenizer, token), "bytes": data, "logprob": max(logprob or 0.0, LEAST)}

    content = [
        made(
            ChatCompletionTokenLogprob,
            **one(event.token, event.logprob),
            top_logprobs=[made(TopLogprob, **one(*pair)) for pair in event.likeliest],
        )
        for event in events
        if event.token is not None
    ]
    return made(ChoiceLogprobs, content=content, refusal=None)


def traced(tokenizer: Tokenizer, found: TokenTrace) -> TracedToken:
    readings = [
        made(
            Reading,
            entropy=reading.entropy if math.isfinite(reading.entropy) else None,
            top=[
                made(Candidate, id=i, text=spelled(tokenizer, i), logprob=max(x, LEAST)) for i, x in reading.likeliest
            ],
        )
        for reading in found.by_loop
    ]
    text = spelled(tokenizer, found.token)
    return made(TracedToken, id=found.token, text=text, loops=found.loops, by_loop=readings)


def usage(n_prompt_tokens: int, loops: Sequence[Sequence[int]], *, per_token: bool) -> Usage:
    used = [n for each in loops for n in each]
    mean = sum(used) / len(used) if used else None
    told = LoopsUsed(mean=mean, per_token=[list(each) for each in loops] if per_token else None)
    n = len(used)
    return Usage(prompt_tokens=n_prompt_tokens, completion_tokens=n, total_tokens=n_prompt_tokens + n, loops=told)


@dataclass(frozen=True)
class Form:
    """How answers to one request look: of texts, or of a conversation."""

    model: str
    fingerprint: str | None
    tokenizer: Tokenizer
    is_chat: bool
    scores: bool  # log-probabilities were asked for
    per_token: bool  # loops_per_token was

    def head(self, kind: str) -> dict[str, Any]:
        """What all chunks of an answer begin with."""
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def whole(self, choices: Sequence[Any], told: Usage) -> BaseModel:
        """choices: `Choice`s that have ended."""
        if self.is_chat:
            return made(
                ChatAnswer,
                **self.head("chat.completion"),
                choices=[self._message(choice) for choice in choices],
                usage=told,
            )
        texts = [
            made(
                TextChoice,
                index=choice.place,
                text=choice.all_text,
                logprobs=choice.scored(),
                finish_reason=choice.reason,
            )
            for choice in choices
        ]
        return made(TextAnswer, **self.head("text_completion"), choices=texts, usage=told)

    def _message(self, choice: Any) -> WholeChoice:
        message = made(ChatCompletionMessage, role="assistant", content=choice.all_text, refusal=None)
        logprobs = chat_scored(self.tokenizer, choice.events) if self.scores else None
        return made(WholeChoice, index=choice.place, message=message, logprobs=logprobs, finish_reason=choice.reason)

    def chunk(self, head: dict[str, Any], choices: Sequence[Any], told: Usage | None = None) -> str:
        """As JSON."""
        kind = ChatChunk if self.is_chat else TextAnswer
        more: dict[str, Any] = {} if told is None else {"usage": told}
        return made(kind, **head, choices=list(choices), **more).model_dump_json(exclude_unset=True)

    def opening(self, place: int) -> ChatChoice:
        """Of a conversation's stream: who speaks."""
        delta = made(ChoiceDelta, role="assistant", content="")
        return made(ChatChoice, index=place, delta=delta, logprobs=None, finish_reason=None)

    def piece(self, piece: Piece, logprobs: ScoredTokens | None) -> BaseModel:
        """A stream's choice."""
        more: dict[str, Any] = {"index": piece.place, "finish_reason": piece.reason}
        if self.per_token:
            more |= {"loops": [e.loops for e in piece.written], "token_ids": [e.token for e in piece.written]}
        if not self.is_chat:
            return made(TextChoice, text=piece.text, logprobs=logprobs, **more)
        chat_logprobs = chat_scored(self.tokenizer, piece.written) if self.scores and piece.written else None
        delta = made(ChoiceDelta, content=piece.text)
        return made(ChatChoice, delta=delta, logprobs=chat_logprobs, **more)
