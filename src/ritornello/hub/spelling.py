"""Which bytes a piece of somebody's vocabulary stands for, by what its tokenizer.json says of decoding."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ritornello.config import require

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # as SentencePiece spells a byte that is in no piece
BYTE_OF = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
KNOWN = "ByteLevel, or a sign for the space, ByteFallback, Fuse and Strip"


def speller(decoder: Any) -> tuple[Callable[[str], bytes], str]:
    """The bytes of a piece, wherever it stands, and what decoding takes off the beginning of a whole text.

    decoder: as tokenizer.json has it.

    Raises:
        ValueError: pieces that have no bytes of their own.
    """
    whole: Any = (
        decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    )
    known = isinstance(whole, list) and all(isinstance(part, dict) for part in whole)
    require(known, "decoder", decoder, KNOWN)
    parts = [part for part in whole if part.get("type") != "Fuse"]
    if [part.get("type") for part in parts] == ["ByteLevel"]:
        return byte_level, ""
    space, lead, has_bytes = "", "", False
    for part in parts:
        match part:
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Replace", "pattern": {"String": str(sign)}, "content": " "} if _is_sign(sign):
                space = sign
            case {"type": "Metaspace", "replacement": str(sign)} if _is_sign(sign):
                space, lead = sign, " " if _prepends(part) else ""
            case {"type": "Strip", "content": " ", "start": 0 | 1 as n, "stop": 0} if part is parts[-1]:
                lead = " " * n
            case _:
                require(False, "decoder", part, KNOWN)
    return _with_sign(space, has_bytes=has_bytes), lead


def byte_level(piece: str) -> bytes:
    """In GPT-2's spelling of bytes; anything else is its own text."""
    known = [BYTE_OF.get(symbol, -1) for symbol in piece]
    return piece.encode() if -1 in known else bytes(known)


def _with_sign(space: str, *, has_bytes: bool) -> Callable[[str], bytes]:
    def spelt(piece: str) -> bytes:
        byte = BYTE.fullmatch(piece) if has_bytes else None
        return (piece.replace(space, " ") if space else piece).encode() if byte is None else bytes.fromhex(byte[1])

    return spelt


def _is_sign(sign: str) -> bool:
    return len(sign) == 1 and not sign.isascii()


def _prepends(metaspace: Mapping[str, Any]) -> bool:
    """Under its name of now, or of before."""
    scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
    return scheme != "never"
