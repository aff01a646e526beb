"""Text to token ids and back, without loss.

A tokenizer of ours knows one id that no text can produce: the end of a document; in its chat form four more, which mark
who speaks and where a message ends. Nothing else is special, so text that looks like a special token stays text. Those
of published models (`hub.foreign`) have special ids of their own, anywhere, which no text can produce either.
"""

import codecs
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, final

import numpy as np
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from ritornello.config import require, require_int

MAX_BYTES = 100_000_000  # of a tokenizer or a list of files, far beyond any real one
LONG_WORD = re.compile(r"(\S{1000})")
ROLES = ("system", "user", "assistant")
END = "<|endoftext|>"
CHAT_TOKENS = (*(f"<|{role}|>" for role in ROLES), "<|end|>")  # as other programs spell them; here they have no text


Template = Callable[[Sequence[Mapping[str, str]]], list[int]]


class Tokenizer(ABC):
    """What an id stands for: `token_bytes` of UTF-8, or a name in `special` and no text.

    eos_id: ends a document; stop_ids, that one among them: end a text that is written.
    chat_ids: the marks of a conversation by name, where they are ours (see `train.chat`).
    template: the ids of a checked conversation up to where the answer begins, where its form is somebody else's.
    lead: what decoding takes from the beginning of a whole text, for encoding puts it there.
    """

    chat_ids: Mapping[str, int] = {}
    template: Template | None = None
    lead = ""

    def __init__(
        self, token_bytes: Sequence[bytes], special: Mapping[int, str], *, eos_id: int, stop_ids: Iterable[int]
    ) -> None:
        self.eos_id, self.stop_ids, self.special = eos_id, frozenset(stop_ids), special
        self.token_bytes = tuple(token_bytes)
        self.vocab_size = len(self.token_bytes)
        self.byte_lengths = np.array([len(text) for text in self.token_bytes], dtype=np.int64)  # (vocab_size,)

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text, one unsigned integer array (n,) apiece. The texts are UTF-8; bytes take anything."""

    @abstractmethod
    def to_json(self) -> str:
        """All that it is: of one of ours, what `from_json` turns into an equal tokenizer."""

    @property
    def is_chat(self) -> bool:
        return bool(self.chat_ids) or self.template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, none of them special. Raises ValueError on a lone surrogate, which no UTF-8 can hold."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            require(False, "text", text[error.start : error.end], f"valid Unicode (character {error.start})")
            raise
        return self.encode_batch([data])[0].tolist()

    def prompt(self, text: str) -> list[int]:
        """Ids to continue, at least one: of no text, the end of the document before."""
        return self.encode(text) or [self.eos_id]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; special ones have none. Raises ValueError on an id outside the vocabulary."""
        known = [operator.index(i) for i in ids]
        bad = next((i for i in known if not 0 <= i < self.vocab_size), None)
        require(bad is None, "token id", bad, f"in [0, {self.vocab_size - 1}]")
        return b"".join([self.token_bytes[i] for i in known])

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The whole text that `ids` stand for."""
        return self.decode_bytes(ids).decode("utf-8", errors).removeprefix(self.lead)


class OwnTokenizer(Tokenizer, ABC):
    """Ids 0 … `eos_id` − 1 stand for bytes of UTF-8. Those from `eos_id` on have no text: it ends a document, and those
    of CHAT_TOKENS follow in the chat form, `chat_ids` by name. So a text's ids are the same in either form."""

    def __init__(self, token_bytes: Sequence[bytes], *, chat: bool = False) -> None:
        special = dict(enumerate((END, *(CHAT_TOKENS if chat else ())), len(token_bytes)))
        no_text = [b""] * len(special)
        super().__init__([*token_bytes, *no_text], special, eos_id=len(token_bytes), stop_ids=special)
        self.chat_ids = {name: i for i, name in special.items() if i != self.eos_id}


@final
class ByteTokenizer(OwnTokenizer):
    """One id per byte: 256 and the end of a document."""

    def __init__(self, *, chat: bool = False) -> None:
        super().__init__([bytes([i]) for i in range(256)], chat=chat)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def to_json(self) -> str:
        return json.dumps({"type": "bytes"} | ({"chat": True} if self.is_chat else {}))


@final
class BpeTokenizer(OwnTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al., 1508.07909; bytes as in GPT-2), run by `tokenizers`."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], *, chat: bool = False) -> None:
        """`vocab`: piece to id, in GPT-2's spelling of bytes; `merges`: pairs in the order of their learning."""
        byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        pieces = sorted(vocab, key=vocab.__getitem__)
        super().__init__([bytes(map(byte_of.__getitem__, piece)) for piece in pieces], chat=chat)
        self._hf = _byte_level(models.BPE(vocab=dict(vocab), merges=list(merges)))

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8") for text in texts]
        return [np.array(found.ids, dtype=np.uint32) for found in self._hf.encode_batch_fast(decoded)]

    def to_json(self) -> str:
        text = self._hf.to_str()
        return json.dumps({**json.loads(text), "chat": True}, ensure_ascii=False) if self.is_chat else text


@final
class StreamDecoder:
    """Decodes ids as they come, holding a character back until its last byte is there.

    begins: whether they are a text's first ones, or continue one.
    """

    def __init__(self, tokenizer: Tokenizer, *, begins: bool = True) -> None:
        self._tokenizer, self._lead = tokenizer, tokenizer.lead if begins else ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. All pushes and `finish` of a text's first ids joined equal `decode` of all."""
        text = self._decoder.decode(self._tokenizer.decode_bytes(ids))
        if text and self._lead:
            text, self._lead = text.removeprefix(self._lead), ""
        return text

    def finish(self) -> str:
        """What is left: a replacement character if the last character never completed."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int, *, chat: bool = False) -> BpeTokenizer:
    """Learn a BPE of at most `vocab_size` ids, those without text included; fewer where the text has fewer pairs.

    Equal texts give an equal tokenizer, whatever the number of threads.
    """
    n_special = 1 + chat * len(CHAT_TOKENS)
    require_int("vocab_size", vocab_size, 256 + n_special)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - n_special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    hf = _byte_level(models.BPE())
    hf.train_from_iterator(chain.from_iterable(map(_short_words, texts)), trainer)
    return _bpe_from(json.loads(hf.to_str()), chat=chat)


def extends(tokenizer_json: str, other_json: str) -> bool:
    """Whether the first tokenizer gives every id of the second the same meaning: it is the same, or its chat form."""
    one, other = (json.loads(from_json(text).to_json()) for text in (tokenizer_json, other_json))
    return one == other or one == {**other, "chat": True}


def _short_words(text: str) -> list[str]:
    """Learning takes time quadratic in the longest word: a line of 1 MB without a space would take minutes."""
    longest = max(map(len, text.split()), default=0)
    return LONG_WORD.split(text) if longest > 1000 else [text]


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote. Raises ValueError on anything else: a file may come from anywhere."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer.json: must be JSON; {error}") from error
    require(isinstance(found, dict), "tokenizer.json", found, "an object")
    chat = "chat" in found
    require(found.pop("chat", True) is True, "tokenizer.json chat", json.loads(text).get("chat"), "true, or left out")
    if found == {"type": "bytes"}:
        return ByteTokenizer(chat=chat)
    kind = found.get("model", {}).get("type") if isinstance(found.get("model"), dict) else found.get("type")
    require(kind == "BPE", "tokenizer.json type", kind, "'bytes' or a 'BPE' model")
    return _bpe_from(found, chat=chat)


def _bpe_from(found: dict[str, Any], *, chat: bool) -> BpeTokenizer:
    """Everything but vocabulary and merges is fixed: a normalizer would lose text, an added token would be special."""
    for name in ("added_tokens", "normalizer", "post_processor"):
        require(not found.get(name), f"tokenizer.json {name}", found.get(name), "empty")
    split = found.get("pre_tokenizer")
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    same = isinstance(split, dict) and all(split.get(key) == value for key, value in expected.items())
    require(same, "tokenizer.json pre_tokenizer", split, f"{expected}")
    vocab, merges = found["model"].get("vocab"), found["model"].get("merges")
    _check_vocab(vocab)
    require(isinstance(merges, list), "tokenizer.json merges", merges, "a list of pairs")
    return BpeTokenizer(vocab, [_merge(pair, vocab) for pair in merges], chat=chat)


def _check_vocab(vocab: Any) -> None:
    name = "tokenizer.json vocab"
    require(isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()), name, vocab, "pieces with ids")
    require(sorted(vocab.values()) == list(range(len(vocab))), name, len(vocab), "numbered 0, 1, 2 … without a gap")
    symbols = set(_byte_symbols())
    missing = sorted(symbols - vocab.keys())
    require(not missing, name, missing, "complete: every byte needs an id")
    strange = next((piece for piece in vocab if not piece or not symbols.issuperset(piece)), None)
    require(strange is None, name, strange, "spelt in byte symbols")


def _merge(pair: Any, vocab: Mapping[str, int]) -> tuple[str, str]:
    ok = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part in vocab for part in pair)
    require(
        ok and "".join(pair) in vocab, "tokenizer.json merge", pair, "two pieces of the vocabulary that make a third"
    )
    return pair[0], pair[1]


def _byte_level(model: models.BPE) -> HfTokenizer:
    hf = HfTokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    return hf


def _byte_symbols() -> Iterator[str]:
    """GPT-2's spelling of bytes 0 … 255: a printable Latin-1 character is itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    following = iter(range(256, 512))
    return (chr(byte) if byte in printable else chr(next(following)) for byte in range(256))
