"""tokenizer.json -> the library's tokenizer, in little more memory than it uses.

The library keeps a file's words twice over while it reads it, and what it keeps then lies scattered between what it has
freed: half as much again for 150,000 tokens. Here Python reads the file, and the library gets the words alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as RawTokenizer

_IS_BPE = re.compile(rb'"type"\s*:\s*"BPE"')
LARGE_BYTES = 1 << 20  # of a file; a smaller one is not worth it
_NAMES = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")


class SharedWords:
    """A BPE, for as long as somebody holds this."""

    __slots__ = ("__weakref__", "model")

    def __init__(self, model: models.BPE) -> None:
        self.model = model


_READ: WeakValueDictionary[bytes, SharedWords] = WeakValueDictionary()
"""By what a file says of them: models of one family often differ in what stands around the words alone."""


def read_tokenizer(file: Path) -> tuple[RawTokenizer, SharedWords | None]:
    """As `from_file` reads it, and what to hold so that other files with these words share them. Raises whatever the
    library does."""
    if file.stat().st_size >= LARGE_BYTES and _IS_BPE.search(text := file.read_bytes()):
        stated = _parts_of(text)
        del text
        stored = stated.pop("model", None)
        words = None if stored is None else _words_of(bytes(stored))
        if words is not None:
            return _built({name: json.loads(bytes(one)) for name, one in stated.items()}, words.model), words
    return RawTokenizer.from_file(str(file)), None


def _parts_of(text: bytes) -> dict[str, msgspec.Raw]:
    """Not read yet; none of what is not a JSON object."""
    try:
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return {}


def _words_of(stored: bytes) -> SharedWords | None:
    key = hashlib.sha256(stored).digest()
    found = _READ.get(key)
    if found is None:
        model = _model_of(json.loads(stored))
        if model is None:
            return None
        found = _READ[key] = SharedWords(model)
    return found


def _model_of(stated: Any) -> models.BPE | None:
    """The BPE that a file states; None for other kinds, which leave little, and for what the library has to judge."""
    if not isinstance(stated, dict) or stated.get("type") != "BPE" or stated.get("dropout") is not None:
        return None
    vocab, merges = stated.get("vocab"), stated.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return None
    # Older files have "a b" for ["a", "b"].
    pairs = [tuple(one.split(" ") if isinstance(one, str) else one) for one in merges]
    if any(len(pair) != 2 for pair in pairs):
        return None
    return models.BPE(vocab, pairs, **{name: stated[name] for name in _NAMES if stated.get(name) is not None})


def _built(stated: dict[str, Any], model: models.BPE) -> RawTokenizer:
    """With this model, and all that the file says beside it."""
    added = stated.get("added_tokens") or []
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    raw = RawTokenizer.from_str(json.dumps({**stated, "model": empty, "added_tokens": []}))
    raw.model = model
    raw.add_tokens([AddedToken(**{name: value for name, value in one.items() if name != "id"}) for one in added])
    return raw
