"""A run's tokenizer as transformers knows it: the same ids for the same text.

One difference is transformers' own: text that spells a special token becomes that token, where a run's own tokenizer
keeps it text.
"""

import json
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ritornello import recipes
from ritornello.config import require
from ritornello.train.tokenizer import CHAT_TOKENS, END, ByteTokenizer, OwnTokenizer, Tokenizer

PADDING = "<|padding|>"
STOP = CHAT_TOKENS[-1]
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""  # as train/chat.py encodes, loss and all


def to_transformers(tokenizer: Tokenizer, *, max_length: int, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """max_length: tokens that the model reads at most. A tokenizer of conversations gets its chat template.

    vocab_size: ids that the model knows. One to spare becomes padding: where the end of a text pads too, collators take
    it out of what is learnt, and a model that is tuned never learns to stop.

    Raises:
        ValueError: somebody else's tokenizer, which transformers reads from its own folder.
    """
    kind, remedy = type(tokenizer).__name__, "AutoTokenizer.from_pretrained(FOLDER) reads another"
    require(isinstance(tokenizer, OwnTokenizer), "tokenizer", kind, "one that a run was trained with", remedy)
    backend = _bytes() if isinstance(tokenizer, ByteTokenizer) else _pieces(tokenizer)
    spare = padding_id(tokenizer, vocab_size) != tokenizer.eos_id
    backend.add_special_tokens([END, *tokenizer.chat_ids, *([PADDING] if spare else [])])
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PADDING if spare else END,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if tokenizer.is_chat else None,
    )
    assert found.eos_token_id == tokenizer.eos_id, "the end of a document comes after all text"
    return found


def padding_id(tokenizer: Tokenizer, vocab_size: int | None) -> int:
    """An id of its own if the model knows one to spare, else that of the end of a text."""
    spare = vocab_size is not None and vocab_size > tokenizer.vocab_size
    return tokenizer.vocab_size if spare else tokenizer.eos_id


def _bytes() -> Backend:
    """One id a byte, as a byte-level BPE that has learnt no pair."""
    backend = Backend(models.BPE(vocab={symbol: byte for byte, symbol in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(tokenizer: Tokenizer) -> Backend:
    found = json.loads(tokenizer.to_json())
    return Backend.from_str(json.dumps({name: value for name, value in found.items() if name != "chat"}))


def ends(tokenizer: Tokenizer) -> int | list[int]:
    """Ids after which nothing is written: of a document, or of a message."""
    stop = {tokenizer.eos_id, tokenizer.chat_ids[STOP]} if tokenizer.chat_ids else tokenizer.stop_ids
    return sorted(stop) if len(stop) > 1 else tokenizer.eos_id


def is_own(tokenizer_json: Any) -> bool:
    """Whether this object is one that `to_transformers` led to: its special tokens come after all pieces of text."""
    if not isinstance(tokenizer_json, dict) or not isinstance(model := tokenizer_json.get("model"), dict):
        return False
    added = tokenizer_json.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    names = [token.get("content") for token in tokens]
    known = [END, *CHAT_TOKENS]
    ids = range(len(model.get("vocab") or ()), len(model.get("vocab") or ()) + len(tokens))
    ours = [name for name in names if name != PADDING] in (known[:1], known)
    return ours and [token.get("id") for token in tokens] == [*ids]


def without_specials(tokenizer_json: str) -> str:
    """A tokenizer.json that `to_transformers` led to, as a run has it: special tokens are none of its text's."""
    found = recipes.parse_json(tokenizer_json, "tokenizer.json")
    require(isinstance(found, dict), "tokenizer.json", found, "an object")
    processor = found.get("post_processor") or {}
    added = processor.get("special_tokens") if isinstance(processor, dict) else processor
    require(not added, "tokenizer.json post_processor", added, "without tokens of its own")
    specials = [token.get("content") for token in found.get("added_tokens") or [] if isinstance(token, dict)]
    specials = [name for name in specials if name != PADDING]
    known = [END, *CHAT_TOKENS]
    require(specials in (known[:1], known), "tokenizer.json added_tokens", specials, f"{known[:1]} or {known}")
    plain: dict[str, Any] = {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
    return json.dumps(found | plain | ({"chat": True} if specials == known else {}))
