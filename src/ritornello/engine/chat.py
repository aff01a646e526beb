"""A conversation with a model that was trained on conversations."""

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Unpack

from ritornello import limits
from ritornello.config import require
from ritornello.engine.engine import Engine
from ritornello.engine.generate import OVERFLOWED, Loaded, Wishes, engine_for, requests_of, stop_texts
from ritornello.engine.request import Request
from ritornello.engine.text import Generation, Text
from ritornello.train.chat import Message, chat_prompt, check


@dataclass(frozen=True)
class Answer:
    """pieces: of its text, as they come, to be read once; n_dropped: turns that were forgotten to make room for it."""

    pieces: Generator[str]
    n_dropped: int
    _text: Text

    @property
    def generation(self) -> Generation:
        """All of it so far."""
        return self._text.generation


class Conversation:
    """What was said so far, and who answers. `messages` hold an answer once its pieces are read, or what there is of it
    when nobody reads on.

    One engine writes all answers: of a prompt, what the one before it began with is not computed again; the last answer
    is, as part of a prompt.

    Args:
        system: a message that every prompt begins with.
        wishes: as `generate` takes them; the i-th answer, from 0, samples with seed + i.
    Raises:
        ValueError: a model that was not trained on conversations, or an argument out of range.
    """

    def __init__(self, loaded: Loaded, *, system: str | None = None, **wishes: Unpack[Wishes]) -> None:
        remedy = "train one with data.format = 'chat', or continue texts with `generate`"
        name = "RUN" if loaded.path is None else str(loaded.path)
        require(loaded.tokenizer.is_chat, "chat with", name, "a run trained on conversations", remedy)
        self._stops = stop_texts(wishes.pop("stop", ()))
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        check([*self._system, {"role": "user", "content": ""}], where="system")
        self.loaded, self._wishes = loaded, dict[str, Any](wishes)
        self._request([0], self._wishes)
        self._engine: Engine | None = None
        self._n_answers = 0
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages: list[Message] = [*self._system]

    @property
    def n_loops(self) -> int:
        """The depth of the next answer; with an exit rule the most that a token may reach."""
        return self._wishes.get("n_loops") or self.loaded.model.config.n_loops

    @n_loops.setter
    def n_loops(self, n: int) -> None:
        limits.check("loops", n)
        changed = self._wishes | {"n_loops": n}
        self._request([0], changed)
        self._wishes = changed

    def ask(self, text: str) -> Answer:
        """The answer to a user's message. Where the conversation no longer fits, its oldest turns are forgotten.

        Raises:
            ValueError: a message longer than max_seq_len, or one that is no text; nothing is changed.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt, n_dropped = self._fitting(messages)
        seed = self._wishes.get("seed", 0) + self._n_answers
        request = self._request(prompt, self._wishes | {"seed": seed})
        answer = Text(self.loaded.tokenizer, self._stops, begins=True)
        return Answer(self._written(request, answer, messages), n_dropped, answer)

    def _fitting(self, messages: list[Message]) -> tuple[list[int], int]:
        """Forget turns of `messages` until an answer has room after them: max_tokens, or a quarter of max_seq_len."""
        limit, first, n_dropped = self.loaded.model.config.max_seq_len, len(self._system), 0
        room = min(self._wishes.get("max_tokens", 256), limit // 4)
        prompt = chat_prompt(messages, self.loaded.tokenizer)
        while len(prompt) + room > limit and len(messages) > first + 1:
            del messages[first : first + 2]
            n_dropped += 1
            prompt = chat_prompt(messages, self.loaded.tokenizer)
        require(len(prompt) < limit, "message", f"{len(prompt)} tokens", f"fewer than max_seq_len = {limit}")
        return prompt, n_dropped

    def _request(self, prompt: list[int], wishes: dict[str, Any]) -> Request:
        return requests_of(self.loaded, [prompt], **wishes)[0]

    def _written(self, request: Request, answer: Text, messages: list[Message]) -> Generator[str]:
        engine = self._engine_for(request)
        number = engine.submit(request)
        with suppress(GeneratorExit):  # what was said until then stays said
            try:
                while not answer.reason:
                    for event in engine.step():
                        if event.reason == "failed":
                            raise ArithmeticError(OVERFLOWED)
                        if event.number == number and not answer.reason and (piece := answer.take(event)):
                            yield piece
            except KeyboardInterrupt:
                self._keep(messages, answer)
                raise
            finally:
                engine.cancel(number)
        self._keep(messages, answer)

    def _keep(self, messages: list[Message], answer: Text) -> None:
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._n_answers += 1

    def _engine_for(self, request: Request) -> Engine:
        """The one there is, with what it has computed, unless it can't go so deep."""
        n_loops = request.n_loops or self.loaded.model.config.n_loops
        if self._engine is None or self._engine.layout.n_loops < n_loops:
            n_tokens, constrained = self.loaded.model.config.max_seq_len, request.constraint is not None
            self._engine = engine_for(self.loaded, n_loops=n_loops, n_tokens=n_tokens, constrained=constrained)
        return self._engine
