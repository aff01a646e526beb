"""A text as it grows: its tokens decoded, its stop strings, why it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from ritornello.engine.request import Event
from ritornello.train.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Generation:
    """The continuation; its tokens; the loops each took; why it ended: `stop`, `end` (of the document) or `length`."""

    text: str
    tokens: list[int]
    loops: list[int]
    reason: str


class Text:
    """One growing continuation: decodes, watches for stop strings, holds back what may become one.

    begins: it is a text of its own, as an answer in a conversation is.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, begins: bool = False) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = StreamDecoder(tokenizer, begins=begins)
        self.tokens: list[int] = []
        self.loops: list[int] = []
        self.text = self.held = ""
        self.reason = ""

    @property
    def generation(self) -> Generation:
        return Generation(self.text, self.tokens, self.loops, self.reason)

    def take(self, event: Event) -> str:
        """Take what the engine tells of it; return the text that is now certain. The prompt is not part of it."""
        if event.prompt:
            return ""
        if event.reason == "failed":
            piece = self.finish("failed")
            self.reason = "failed"  # whatever the end has completed
            return piece
        if event.token is None:
            return self.finish("end")
        piece = self.push(event.token, event.loops)
        return piece + self.finish(event.reason) if event.reason and not self.reason else piece

    def push(self, token: int, loops: int) -> str:
        """Take a token; return the text that is now certain."""
        if token in self.tokenizer.stop_ids:
            return self.finish("end")
        self.tokens.append(token)
        self.loops.append(loops)
        return self._grow(self.decoder.push([token]), "")

    def finish(self, reason: str) -> str:
        return self._grow(self.decoder.finish(), reason)

    def _grow(self, new: str, reason: str) -> str:
        """Of several stop strings the one complete first ends the text, however tokens cut it."""
        self.held += new
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, reason = self.held[: min(found)[1]], "stop"
        certain = len(self.held) - (0 if reason else self._unsure())
        piece, self.held, self.reason = self.held[:certain], self.held[certain:], reason
        self.text += piece
        return piece

    def _unsure(self) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        most = min(len(self.held), max(map(len, self.stop), default=1) - 1)
        begins = lambda n: any(len(s) > n and s.startswith(self.held[-n:]) for s in self.stop)  # noqa: E731
        return next(filter(begins, range(most, 0, -1)), 0)
