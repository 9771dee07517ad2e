"""Mistral's tekken.json -> a tokenizer of the `tokenizers` library: byte-pair encoding in the order of ranks.

Ids are the special tokens' first, then the vocabulary's by rank. Of a rank the two parts are those that lower ranks
would leave of it: so merges by rank are merges by number.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from sensorium.errors import CheckpointError

FILE = "tekken.json"
BOS = "<s>"


def tekken_tokenizer(file: Path) -> Tokenizer:
    """CheckpointError says what the file lacks."""
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        config, entries = stated["config"], stated["vocab"]
        num_special = int(config["default_num_special_tokens"])
        inner = [
            base64.b64decode(one["token_bytes"]) for one in entries[: int(config["default_vocab_size"]) - num_special]
        ]
        pattern, special = str(config["pattern"]), _special(stated, num_special)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{FILE} of the model cannot be read: {error!r}") from None
    ranks = {token: rank for rank, token in enumerate(inner)}
    letters = _letters()
    names = ["".join(letters[byte] for byte in token) for token in inner]
    vocab = {name: num_special + rank for rank, name in enumerate(names)}
    merges = [
        ("".join(letters[b] for b in left), "".join(letters[b] for b in right))
        for token in inner
        if len(token) > 1
        for left, right in [_parts(token, ranks)]
    ]
    vocab |= {text: number for number, text in enumerate(special)}
    made = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if BOS in special:
        bos = [(BOS, special.index(BOS))]
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=bos
        )
    return made


def _special(stated: Mapping[str, Any], count: int) -> list[str]:
    """The special tokens by number; numbers without one are fillers."""
    named = {int(one["rank"]): str(one["token_str"]) for one in stated["special_tokens"]}
    return [named.get(number, f"<SPECIAL_{number}>") for number in range(count)]


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two that a token is merged of: merged as far as ranks below its own go. ValueError if there are more."""
    parts, own = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], own), i) for i in range(len(parts) - 1))
        if rank >= own:
            raise CheckpointError(f"{FILE}: the token {token!r} is not made of others")
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
