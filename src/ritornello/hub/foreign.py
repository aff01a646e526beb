"""Somebody else's tokenizer: a published model's tokenizer.json and what lies beside it. Nothing in it is trusted.

Text gets the ids that transformers gives it, but for one thing: text that spells a special token stays text. A prompt
begins with what their post-processor puts before a text; what it would put after one is left out, for one goes on.
"""

import json
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, final

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ritornello import recipes
from ritornello.config import require
from ritornello.hub.spelling import speller
from ritornello.hub.templates import Conversations, Mark, Renderer
from ritornello.train.tokenizer import MAX_BYTES, Tokenizer

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FILE, TEMPLATE = "tokenizer.json", "chat_template.jinja"
MAX_GROWTH = 1000  # of a text by what is done to it before it is cut into tokens
ABOUT, NAMES = "tokenizer_config.json", "special_tokens_map.json"


@final
class PublishedTokenizer(Tokenizer):
    """A tokenizer.json, run by `tokenizers`.

    Args:
        body: the file's object; its texts may come from anywhere.
        source: its name, for errors.
        room: ids that the model has.
        names: special tokens that the file may not mark as such.
        end: the token that ends a document; None: the first of `ends`.
        ends: ids that end a text that is written.
    Raises:
        ValueError: what `tokenizers` cannot read, pieces without bytes of their own, ids that the model does not have.
    """

    def __init__(
        self,
        body: Mapping[str, Any],
        *,
        source: str,
        room: int,
        names: Iterable[str] = (),
        end: str | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        self._source, self._names = source, sorted(names)
        for part in ("normalizer", "pre_tokenizer"):  # before names of special tokens go through them
            with _named(source):
                growth = _growth(body.get(part))
            require(growth <= MAX_GROWTH, f"{source}: {part}", growth, f"at most {MAX_GROWTH} times longer texts")
        self._marked = self._backend(body)
        self._plain = self._backend(_of_text(body))
        self._plain.encode_special_tokens = True
        self._inner = self._plain
        if (inside := _inside(body)) != body:
            self._inner = self._backend(_of_text(inside))
            self._inner.encode_special_tokens = True
        vocab = self._marked.get_vocab(with_added_tokens=True)
        most = max(vocab.values(), default=-1)
        require(0 <= most < room, f"{source}: token id", most, f"in [0, {room - 1}]: the model has no other")
        special = {i: token.content for i, token in self._marked.get_added_tokens_decoder().items() if token.special}
        with _named(source):
            spelt, self.lead = speller(body.get("decoder"))
        token_bytes = [b""] * (most + 1)
        for piece, i in vocab.items():
            token_bytes[i] = b"" if i in special else spelt(piece)
        known = [i for i in [self._marked.token_to_id(end or ""), *ends] if i is not None]
        require(bool(known), f"{source}: the token that ends a text", end, "there, by eos_token or eos_token_id")
        wrong = next((i for i in known if i > most), None)
        require(wrong is None, f"{source}: eos_token_id", wrong, f"in [0, {most}]")
        super().__init__(token_bytes, special, eos_id=known[0], stop_ids=known)
        model = body["model"]  # an unknown character's id is special, and made by text
        self._unknown = model.get("unk_id", self._marked.token_to_id(model.get("unk_token") or ""))
        self._before = self._begins()
        self._json = json.dumps([body, self._names, known])

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8") for text in texts]
        return [np.array(self.without_marks(text, begins=True), dtype=np.uint32) for text in decoded]

    def prompt(self, text: str) -> list[int]:
        return [*self._before, *self.encode(text)] or [self.eos_id]

    def to_json(self) -> str:
        return self._json

    def with_marks(self, text: str) -> tuple[list[int], list[Mark]]:
        """Ids of a text whose special tokens are meant, as transformers gives them, and which of them are special."""
        with _named(self._source):
            found = self._marked.encode(text, add_special_tokens=False)
        spelt = lambda start, end, i: i != self._unknown or text[start:end].strip() == self.special[i]  # noqa: E731
        marks = [(*place, i) for i, place in zip(found.ids, found.offsets, strict=True) if i in self.special]
        return found.ids, [mark for mark in marks if spelt(*mark)]

    def without_marks(self, text: str, *, begins: bool) -> list[int]:
        """Ids of text in which nothing is meant as a special token.

        Raises:
            ValueError: this tokenizer has no other ids for it: a piece of its vocabulary is a special token's text.
        """
        with _named(self._source):
            found = (self._plain if begins else self._inner).encode(text, add_special_tokens=False).ids
        bad = next((i for i in found if i in self.special and i != self._unknown), None)
        require(bad is None, "text", self.special.get(bad or 0), "without it: this tokenizer cannot write it as text")
        return found

    def _begins(self) -> list[int]:
        """What their post-processor puts before a text."""
        with _named(self._source):
            found = self._marked.encode("a", add_special_tokens=True)
        text = next((at for at, added in enumerate(found.special_tokens_mask) if not added), 0)
        return found.ids[:text]

    def _backend(self, body: Mapping[str, Any]) -> Backend:
        with _named(self._source):
            found = Backend.from_str(json.dumps(body))
        found.no_truncation()
        found.no_padding()
        known = [name for name in self._names if found.token_to_id(name) is not None]
        found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in known])
        return found


def read_tokenizer(folder: Path, room: int) -> PublishedTokenizer:
    """The tokenizer of a folder, with its chat template, if there is one.

    room: ids that the model has.

    Raises:
        ValueError: the file at fault is named.
    """
    about = _about(folder)
    names = {name: text for name in NAMED if (text := _content(about.get(name), f"{folder / ABOUT}: {name}"))}
    found = PublishedTokenizer(
        recipes.read_object(folder / FILE, max_bytes=MAX_BYTES),
        source=str(folder / FILE),
        room=room,
        names=names.values(),
        end=names.get("eos_token"),
        ends=_ends(folder),
    )
    text, source = _template(folder, about)
    if text is not None:
        found.template = conversations = Conversations(Renderer(text, names, source), found)
        if (end := conversations.turn_end()) is not None:
            found.stop_ids |= {end}
    return found


def _about(folder: Path) -> dict[str, Any]:
    """What lies beside a tokenizer.json; of older folders in two files."""
    both = [folder / name for name in (ABOUT, NAMES)]
    about, names = (recipes.read_object(path, max_bytes=MAX_BYTES) if path.exists() else {} for path in both)
    return about if "added_tokens_decoder" in about else about | names


def _content(token: Any, name: str) -> str | None:
    """A token's text, in either form."""
    found = token.get("content") if isinstance(token, dict) else token
    require(found is None or isinstance(found, str), name, token, "the text of a token")
    return found


def _ends(folder: Path) -> list[int]:
    """Ids after which the model's configurations say that nothing comes, one or several in each."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).exists():
            given = recipes.read_object(path, max_bytes=MAX_BYTES).get("eos_token_id")
            ids = given if isinstance(given, list) else [] if given is None else [given]
            require(all(type(i) is int and i >= 0 for i in ids), f"{path}: eos_token_id", given, "ids of tokens")
            found += ids
    return found


def _template(folder: Path, about: Mapping[str, Any]) -> tuple[str | None, str]:
    """A chat template and its file; of several, the default."""
    if (path := folder / TEMPLATE).exists():
        return recipes.read_text(path), str(path)
    given, source = about.get("chat_template"), f"{folder / ABOUT}: chat_template"
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    require(given is None or isinstance(given, str), source, given, "a text, or a list with one named 'default'")
    return given, source


def _growth(step: Any) -> int:
    """How many times as long a text may become, in characters, by chains of what each makes it longer.

    Unicode's forms make 18 of one, but of what grows again, by whatever replaces it between, 4 at most for each time
    that the replacements count.
    """
    match step:
        case {"type": "Sequence", "normalizers": [*parts]} | {"type": "Sequence", "pretokenizers": [*parts]}:
            return reduce(lambda product, part: min(product * _growth(part), 2 * MAX_GROWTH), parts, 1)
        case {"type": "Replace", "content": str(text)}:
            return 1 + len(text)
        case {"type": "Precompiled", "precompiled_charsmap": str(table)}:
            return _longest(b64decode(table))
        case {"type": "ByteLevel" | "BertNormalizer" | "NFC" | "NFD" | "NFKC" | "NFKD"}:
            return 4
        case _:
            return 1


def _longest(table: bytes) -> int:
    """Of what SentencePiece's table of characters puts in the place of one: they follow a trie, a zero after each."""
    begin = 4 + int.from_bytes(table[:4], "little")
    return max(len(text.decode("utf-8", "replace")) for text in table[begin:].split(b"\0")) or 1


def _of_text(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without the merges that make a special token out of ordinary text, which SentencePiece's files come with."""
    special = {token.get("content") for token in body.get("added_tokens") or [] if token.get("special")}
    model, merges = body["model"], body["model"].get("merges")
    if not isinstance(merges, list):
        return {**body}
    return {**body, "model": {**model, "merges": [pair for pair in merges if _joined(pair) not in special]}}


def _joined(pair: Any) -> str:
    return "".join(map(str, pair)) if isinstance(pair, list) else str(pair).replace(" ", "", 1)


def _inside(body: Any) -> Any:
    """As it is for what comes later in a text, where only the first word gets a space before it."""
    if isinstance(body, dict) and body.get("type") == "Metaspace" and body.get("prepend_scheme") == "first":
        return {**body, "prepend_scheme": "never"}
    if isinstance(body, dict) and "pre_tokenizer" in body:
        return {**body, "pre_tokenizer": _inside(body["pre_tokenizer"])}
    if isinstance(body, dict) and isinstance(body.get("pretokenizers"), list):
        return {**body, "pretokenizers": [_inside(part) for part in body["pretokenizers"]]}
    return body


@contextmanager
def _named(source: str) -> Iterator[None]:
    """`tokenizers` raises bare exceptions, and panics, which are none: either becomes an error that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{source}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{source}: tokenizers cannot work with it; {error}") from error
