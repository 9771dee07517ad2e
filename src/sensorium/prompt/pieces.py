"""Token id -> the bytes it adds to text, for the two decoders that nearly every checkpoint has: byte-level BPE and
sentencepiece with byte fallback.

Joining these bytes equals `Tokenizer.decode`, in linear time and one token at a time. `TokenBytes.of` is None for
other decoders (WordPiece and the like), whose tokens have no bytes of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(dict[int, bytes]):
    """Filled as ids come up, because making a table of 150,000 entries would cost a quarter of a second at start.

    `lead` is how many spaces the decoder takes from the beginning of a text.
    """

    def __init__(self, name_of: Callable[[int], str | None], to_bytes: Callable[[str], bytes], lead: int) -> None:
        super().__init__()
        self._name_of = name_of
        self._to_bytes = to_bytes
        self.lead = lead

    def __missing__(self, token_id: int) -> bytes:
        name = self._name_of(token_id)
        self[token_id] = found = b"" if name is None else self._to_bytes(name)
        return found

    @classmethod
    def of(cls, raw: RawTokenizer) -> TokenBytes | None:
        decoder = json.loads(raw.decoder.__getstate__()) if raw.decoder is not None else {}
        if decoder.get("type") == "ByteLevel":
            return cls(raw.id_to_token, _byte_level_bytes(), 0)
        lead = _sentencepiece_lead(decoder)
        return None if lead is None else cls(raw.id_to_token, _sentencepiece_bytes, lead)


def _byte_level_bytes() -> Callable[[str], bytes]:
    byte_of = {character: bytes([value]) for value, character in enumerate(_byte_level_alphabet())}

    def to_bytes(name: str) -> bytes:
        try:
            return b"".join([byte_of[character] for character in name])
        except KeyError:  # an added token that is ordinary text
            return name.encode()

    return to_bytes


def _byte_level_alphabet() -> list[str]:
    """GPT-2's stand-ins for the 256 bytes: one that prints is itself, the others are counted from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(value if value in printable else next(others)) for value in range(256)]


def _sentencepiece_bytes(name: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()


def _sentencepiece_lead(decoder: dict[str, Any]) -> int | None:
    """Spaces that [Replace ▁, ByteFallback, Fuse, Strip?] takes from the beginning; None for another decoder."""
    if decoder.get("type") != "Sequence":
        return None
    steps = list(decoder["decoders"])
    lead = 0
    if steps and steps[-1] == {"type": "Strip", "content": " ", "start": steps[-1].get("start"), "stop": 0}:
        lead = int(steps.pop()["start"])
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    plain = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return lead if steps == plain else None
