"""A run's tokenizer as transformers knows it: the same ids for the same text.

One difference is transformers' own: text that spells a special token becomes that token, where a run's own tokenizer
keeps it text.
"""

import json

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ritornello import recipes
from ritornello.config import require
from ritornello.train.tokenizer import ByteTokenizer, Tokenizer

END = "<|endoftext|>"


def to_transformers(tokenizer: Tokenizer, *, max_length: int) -> PreTrainedTokenizerFast:
    """max_length: tokens that the model reads at most."""
    backend = _bytes() if isinstance(tokenizer, ByteTokenizer) else Backend.from_str(tokenizer.to_json())
    backend.add_special_tokens([END])
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    assert found.eos_token_id == tokenizer.eos_id, "the end of a document comes after all text"
    return found


def _bytes() -> Backend:
    """One id a byte, as a byte-level BPE that has learnt no pair."""
    backend = Backend(models.BPE(vocab={symbol: byte for byte, symbol in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def without_specials(tokenizer_json: str) -> str:
    """A tokenizer.json that `to_transformers` led to, as a run has it: special tokens are none of its text's."""
    found = recipes.parse_json(tokenizer_json, "tokenizer.json")
    require(isinstance(found, dict), "tokenizer.json", found, "an object")
    processor = found.get("post_processor") or {}
    added = processor.get("special_tokens") if isinstance(processor, dict) else processor
    require(not added, "tokenizer.json post_processor", added, "without tokens of its own")
    return json.dumps(found | {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None})
