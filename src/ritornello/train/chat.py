"""Conversations as token ids, and which of them a model learns to write.

A message is `<|role|>` content `<|end|>`, each mark one id that no content can produce; a prompt ends with the
`<|assistant|>` that opens the answer. The loss counts what an assistant writes: its content and the `<|end|>` after it.
A published model's tokenizer says by a template how its prompts look.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ritornello.config import require, require_choice
from ritornello.train.tokenizer import ROLES, Tokenizer

KEYS = ("role", "content")
Message = Mapping[str, str]


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, *, where: str = "messages"
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n,) int64 of a conversation that ends with an answer, and mask (n,) bool: the ids that the loss counts.

    Raises:
        ValueError: something else than such a conversation; `where` and the message are named. Or a tokenizer without
            chat ids.
    """
    check_example(messages, where=where)
    return _encoded(messages, tokenizer)


def chat_prompt(messages: Sequence[Message], tokenizer: Tokenizer, *, where: str = "messages") -> list[int]:
    """Ids of a conversation that ends with the user's message, and the mark that opens the answer. Errors as above."""
    check(messages, where=where)
    _require_last(messages, "user", where, "an answer needs a question")
    if tokenizer.template is not None:
        return tokenizer.template(messages)
    return [*_encoded(messages, tokenizer)[0].tolist(), tokenizer.chat_ids["<|assistant|>"]]


def check(messages: Any, *, where: str = "messages") -> None:
    """Raise ValueError unless this is a list of messages: a system's if any, then user and assistant in turns."""
    require(isinstance(messages, Sequence) and not isinstance(messages, str), where, messages, "a list of messages")
    require(len(messages) > 0, where, messages, "not empty")
    offset = 0
    for i, message in enumerate(messages):
        place = f"{where}[{i}]"
        _check_message(message, place)
        role = message["role"]
        if i == 0 and role == "system":
            offset = 1
            continue
        expected = ROLES[1 + (i - offset) % 2]
        allowed = f"{expected!r}: a system's message if any, then user and assistant in turns"
        require(role == expected, f"{place} 'role'", role, allowed)
    require(len(messages) > offset, where, messages, "more than a system's message")


def check_example(messages: Any, *, where: str = "messages") -> None:
    """`check`, and that it ends with an answer: a model learns from those."""
    check(messages, where=where)
    _require_last(messages, "assistant", where, "a model learns from answers")


def to_bytes(messages: Sequence[Message]) -> bytes:
    """What `from_bytes` turns back: how a conversation travels where a text would. Checked before."""
    return json.dumps([[message[key] for key in KEYS] for message in messages], ensure_ascii=False).encode()


def from_bytes(data: bytes) -> list[dict[str, str]]:
    return [dict(zip(KEYS, pair, strict=True)) for pair in json.loads(data)]


def _require_last(messages: Sequence[Message], role: str, where: str, why: str) -> None:
    last = messages[-1]["role"]
    require(last == role, f"{where}[{len(messages) - 1}] 'role'", last, f"{role!r}: {why}")


def _check_message(message: Any, place: str) -> None:
    require(isinstance(message, Mapping), place, message, "an object with 'role' and 'content'")
    for key in KEYS:
        require(key in message, place, dict(message), f"an object with the key {key!r}")
    for key, value in message.items():  # a table's row has every column: what is null was not said
        require(key in KEYS or value is None, f"{place} {str(key)!r}", value, "left out: a message is role and content")
    require_choice(f"{place} 'role'", message["role"], ROLES)
    content = message["content"]
    require(isinstance(content, str), f"{place} 'content'", content, "a string")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} 'content': must be valid Unicode; {error}") from error


def _encoded(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    remedy = "data.format = 'chat' makes one that has"
    require(bool(tokenizer.chat_ids), "tokenizer", type(tokenizer).__name__, "one with chat ids", remedy)
    contents = tokenizer.encode_batch([message["content"].encode() for message in messages])
    ids, mask = [], []
    for message, content in zip(messages, contents, strict=True):
        role, end = (tokenizer.chat_ids[f"<|{name}|>"] for name in (message["role"], "end"))
        ids += [[role], content, [end]]
        mask += [[False], np.full(len(content) + 1, message["role"] == "assistant")]
    return np.concatenate(ids).astype(np.int64), np.concatenate(mask).astype(np.bool_)
