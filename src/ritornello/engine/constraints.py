"""Texts that a JSON schema or a regular expression describes: which ids may come next. `llguidance` reads both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ritornello.config import require, require_int, shown
from ritornello.recipes import parse_json
from ritornello.train.tokenizer import Tokenizer

SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
FUEL = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}  # a fifth of a second
LONGEST = 1000  # bytes; llguidance's tree of tokens is at most 1024 deep


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What a whole text is: JSON that `json_schema`, itself JSON text, describes, or one that `regex` matches.

    JSON comes on one line, a space at most after `,` and `:`, properties in the schema's order; "x-guidance" in the
    schema asks for other spacing. Regular expressions are written as Rust's `regex` reads them: no look-around, no
    back-references. The text ends only where it is whole: one cut by `max_tokens` is a beginning.

    Raises:
        ValueError: neither or both; a schema or expression that is wrong or has a part that cannot be kept; the package
            `llguidance` is not there.
    """

    json_schema: str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        given = {name: text for name in ("json_schema", "regex") if (text := getattr(self, name)) is not None}
        require(len(given) == 1, "constraint", sorted(given), "exactly one of json_schema and regex")
        ((name, text),) = given.items()
        require(isinstance(text, str) and text != "", name, text, "text, not empty")
        if name == "regex":
            slashes = len(text) - len(text.rstrip("\\"))
            require(slashes % 2 == 0, name, text, "without a lone backslash at its end")  # it would be passed over
        else:
            schema = parse_json(text, name)
            require(isinstance(schema, dict), name, schema, "an object")
        _require_sound(name, text, self._problem())

    @property
    def grammar(self) -> str:
        """As llguidance reads it."""
        matcher = _library().LLMatcher
        if self.regex is not None:
            return matcher.grammar_from_regex(self.regex)
        return matcher.grammar_from_json_schema(self.json_schema, defaults=SPACING)

    def _problem(self) -> str:
        """What llguidance says when it begins a text, of bytes for now."""
        library = _library()
        try:
            matcher = _matcher(library.LLTokenizer("byte"), self)
        except ValueError as error:  # from its reader of JSON, or a lone surrogate
            return str(error)
        matcher.compute_bitmask()
        return matcher.get_error()


@final
class Grammars:
    """The ids of a tokenizer as llguidance sees them, laid out once for all constraints.

    vocab_size: of the model, if it has more ids than the tokenizer; those stand for nothing and are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int | None = None) -> None:
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        require_int("vocab_size", self.vocab_size, tokenizer.vocab_size)
        vocabulary = _Vocabulary(tokenizer, self.vocab_size)
        self.stop_ids, self.token_bytes = tokenizer.stop_ids, vocabulary.tokens
        self.ends = torch.tensor(sorted(self.stop_ids))
        self._library = _library()
        self._tokens = self._library.LLTokenizer(vocabulary)

    def start(self, constraint: Constraint) -> "Matcher":
        """At the beginning of a text. Takes about a millisecond, more for large schemas."""
        return Matcher(self, constraint, _matcher(self._tokens, constraint), [])


@final
class Matcher:
    """One text as it grows: `allowed` says what may come, `push` takes what came.

    `allowed` is never empty where every byte is a token. Where there is no choice of bytes it is only the token that
    the tokenizer itself would write.
    """

    def __init__(self, grammars: Grammars, constraint: Constraint, matcher: Any, tokens: list[int]) -> None:
        self.tokens = tokens  # so far
        self._grammars, self._constraint, self._matcher = grammars, constraint, matcher

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._grammars.stop_ids

    def allowed(self) -> Tensor:
        """(V,) bool, on the CPU: the ids that may come next. Those that end a text are where it is whole, and no others
        where nothing may follow, or after one of themselves.

        Raises:
            ValueError: the constraint has become too complex to follow.
        """
        vocab_size, ends = self._grammars.vocab_size, self._grammars.ends
        if self.ended:
            return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ends, True)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_alive()
        found = torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_))
        return found.index_fill_(0, ends, bool(found[ends].any()))  # llguidance knows one of them

    def push(self, token: int) -> None:
        """Raises ValueError, and changes nothing, if `token` may not come next."""
        require_int("token", token, 0, self._grammars.vocab_size - 1)
        if token in self._grammars.stop_ids:
            ok = self.ended or self._matcher.is_accepting()
        else:
            empty = self.ended or not self._grammars.token_bytes[token]
            ok = not empty and self._matcher.try_consume_tokens([token]) == 1
        self._require_alive()
        require(ok, "token", token, "allowed by the constraint")
        self.tokens.append(token)

    def rollback(self, n: int) -> None:
        """Forget the last n tokens."""
        require_int("n", n, 0, len(self.tokens))
        kept = len(self.tokens) - n
        ends = self._grammars.stop_ids  # which llguidance never saw
        taken = sum(token not in ends for token in self.tokens[kept:])
        self._matcher.rollback(taken)
        self._require_alive()
        del self.tokens[kept:]

    def copy(self) -> "Matcher":
        """One that goes on from here on its own."""
        return Matcher(self._grammars, self._constraint, self._matcher.deep_copy(), self.tokens.copy())

    def _require_alive(self) -> None:
        """Where llguidance gives up it allows the end, as if the text were whole."""
        name = "regex" if self._constraint.json_schema is None else "json_schema"
        _require_sound(name, getattr(self._constraint, name), self._matcher.get_error())


class _Vocabulary:
    """What llguidance asks of a tokenizer. Ids without bytes are never allowed; the end of the document is apart."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.eos_id
        padding = [b""] * (vocab_size - tokenizer.vocab_size)
        self.tokens = [text if len(text) <= LONGEST else b"" for text in tokenizer.token_bytes] + padding
        self._encode, self._ids = tokenizer.encode, {text: i for i, text in enumerate(self.tokens) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Asked where there is no choice of bytes: then they are written as the model knows them."""
        ids, data = self._encode(text), text.encode()
        return ids if b"".join([self.tokens[i] for i in ids]) == data else self._spelt(data)

    def _spelt(self, data: bytes) -> list[int]:
        """By the longest tokens there are, for a tokenizer that adds to a text; up to a byte that none has."""
        found, at = list[int](), 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            if (end := next((end for end in ends if data[at:end] in self._ids), None)) is None:
                break
            found.append(self._ids[data[at:end]])
            at = end
        return found


def _matcher(tokens: Any, constraint: Constraint) -> Any:
    """With bounds on what a short expression may cost: `((a{100}){100}){100}` would take seconds and 200 MB."""
    library = _library()
    return library.LLMatcher(tokens, constraint.grammar, log_level=0, limits=library.LLParserLimits(**FUEL))


def _require_sound(name: str, text: object, problem: str) -> None:
    said = " ".join(problem.partition("\n<")[0].split())  # what follows is the parser's state
    if said:
        said = said.replace("NoExtensionBias", "no text is one")
        raise ValueError(f"{name} = {shown(text)}: must be one that can be kept; {said[:300]}")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        remedy = "pip install 'ritornello[constrain]'"
        raise ValueError(f"constraint: needs the package llguidance; {remedy}") from error
    return llguidance
