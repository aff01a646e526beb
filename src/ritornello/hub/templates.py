"""Conversations in the form that a published model was trained on: its chat template, rendered and made ids.

A template makes one text of marks and contents. What of it is a mark is known from a second rendering, with something
unguessable in the place of every content: special tokens there are the template's own. Where the first has the same
ones, it is encoded whole, as transformers does; where a content spells more, they are cut out before, and all between
is encoded as text. Marks that are ordinary text ("[INST]") can be spelt by anyone; no tokenizer tells who did.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from ritornello.config import require

PROGRAM = Path(__file__).with_name("template_process.py")
SECONDS = 10.0  # for one conversation, and for the process to start
Message = Mapping[str, str]
Mark = tuple[int, int, int]  # where a special token begins and ends, in characters, and its id


class Marking(Protocol):
    """What a template needs of its tokenizer."""

    def with_marks(self, text: str) -> tuple[list[int], list[Mark]]:
        """Ids, special tokens found wherever they are spelt, and these."""
        ...

    def without_marks(self, text: str, *, begins: bool) -> list[int]:
        """Ids, none of them special; begins: of the text's beginning, or of what comes later."""
        ...


class RefusedError(ValueError):
    """The template itself says that it does not take a conversation."""


class Renderer:
    """A template and its process, which starts when it is first wanted and ends with this. For any number of threads.

    values: what the template may read beside the messages. source: the file, for errors.
    """

    def __init__(self, template: str, values: Mapping[str, str], source: str, *, seconds: float = SECONDS) -> None:
        self._template, self._values, self._source, self._seconds = template, dict(values), source, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def __call__(self, messages: Sequence[Message], *, opens: bool = True) -> str:
        """The text of a conversation; opens: up to where the answer begins.

        Raises:
            RefusedError: the template raises an exception of its own.
            ValueError: it is none, or took too long or too much.
        """
        told = {**self._values, "messages": [dict(message) for message in messages], "add_generation_prompt": opens}
        told |= {"tools": None, "documents": None}
        asked = {"template": self._template, "values": told, "seconds": self._seconds + 1}
        with self._lock:
            answer = self._answer(json.dumps(asked).encode())
        if "refused" in answer:
            said = "messages: must be a conversation as the model's template takes it"
            raise RefusedError(f"{said}; {answer['refused']}")
        if "text" not in answer:
            raise ValueError(f"{self._source}: must be a chat template that can be rendered; {answer['error']}")
        return answer["text"]

    def _answer(self, line: bytes) -> dict[str, str]:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            found = process.stdout.readline()
        except BrokenPipeError:
            found = b""
        except BaseException:  # Ctrl-C: what is still to come would be taken for the next answer
            self._end()
            raise
        finally:
            timer.cancel()
        if not found.endswith(b"\n"):
            self._end()
            return {"error": f"it took more than {self._seconds:g} s, or ended its process"}
        return json.loads(found)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        env = {name: os.environ[name] for name in ("SYSTEMROOT", "TZ") if name in os.environ}  # and nobody's secrets
        run = f"import runpy, sys; sys.path += {_libraries()}; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
        pipe, command = subprocess.PIPE, [sys.executable, "-I", "-c", run]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env)
        self._end = weakref.finalize(self, _end, self._process)
        return self._process


def _libraries() -> list[str]:
    """Where what the process imports lies: by itself it looks in the folders of its installation alone."""
    found = [find_spec(name) for name in ("jinja2", "markupsafe")]
    return sorted({str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin})


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # of what it did not read
            if pipe is not None:
                pipe.close()
    process.wait()


class Hidden:
    """Messages with unguessable words for their contents; white space around stays, for templates that trim."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._secret, self._cores = secrets.token_hex(16), [message["content"].strip() for message in messages]
        self.messages = [
            {**message, "content": message["content"].replace(core, self.word(i), 1) if core else message["content"]}
            for i, (message, core) in enumerate(zip(messages, self._cores, strict=True))
        ]

    def word(self, i: int) -> str:
        return f"{self._secret}{i:08x}"

    def restored(self, text: str) -> str:
        """With the contents in their places."""
        return re.sub(f"{self._secret}([0-9a-f]{{8}})", lambda found: self._cores[int(found[1], 16)], text)


class Conversations:
    """A tokenizer's `template`."""

    def __init__(self, render: Renderer, tokenizer: Marking) -> None:
        self._render, self._tokenizer = render, tokenizer

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, and what opens the answer.

        Raises:
            ValueError: the template does not take it, or fails; or contents spell special tokens, and it rewrites them.
        """
        hidden, tokenizer = Hidden(messages), self._tokenizer
        text, frame = self._render(messages), self._render(hidden.messages)
        (ids, spelt), (_, marks) = tokenizer.with_marks(text), tokenizer.with_marks(frame)
        if [mark for _, _, mark in spelt] == [mark for _, _, mark in marks]:
            return ids
        said = "without the special tokens of the model: its template rewrites contents"
        require(hidden.restored(frame) == text, "messages", [message["content"] for message in messages], said)
        found, at = list[int](), 0
        for start, end, mark in marks:
            found += [*tokenizer.without_marks(hidden.restored(frame[at:start]), begins=at == 0), mark]
            at = end
        return found + tokenizer.without_marks(hidden.restored(frame[at:]), begins=at == 0)

    def turn_end(self) -> int | None:
        """The special token that comes after an answer, if one does."""
        hidden = Hidden([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        try:
            frame = self._render(hidden.messages, opens=False)
        except RefusedError:
            return None
        before, _, after = frame.rpartition(hidden.word(1))
        at = len(frame) - len(after)
        first = next((found for found in self._tokenizer.with_marks(frame)[1] if found[0] >= at), None)
        return first[2] if before and first is not None and not frame[at : first[0]].strip() else None
