"""Texts and pairs of texts as token ids for models that pool, truncated where the client asks for it.

A truncated text keeps the special tokens around it. Of a pair the longer text is shortened to make it fit, as
transformers and sentence-transformers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import ContextLengthError
from sensorium.prompt.tokenizer import Tokenizer

Side = Literal["left", "right"]
Ids = NDArray[np.int32]

LONG_TEXT = 1 << 16  # characters that are always looked at
CHARS_PER_TOKEN = 64  # more than any text has


@dataclass(frozen=True, slots=True)
class Truncation:
    """At most so many tokens are kept; `side` is where the others are dropped."""

    max_tokens: int
    side: Side = "right"

    def cut(self, ids: Ids) -> Ids:
        if len(ids) <= self.max_tokens:
            return ids
        return ids[: self.max_tokens] if self.side == "right" else ids[len(ids) - self.max_tokens :]

    def shorten(self, text: str) -> str:
        """The end of a very long text that the kept tokens come from: nobody tokenizes the rest."""
        chars = max(LONG_TEXT, CHARS_PER_TOKEN * self.max_tokens)
        return text[:chars] if self.side == "right" else text[-chars:]


@dataclass(frozen=True, slots=True)
class PairLimits:
    """Tokens of each part of a pair and, if `total` is set, of the pair with its special tokens. 0 is no limit."""

    max_query_tokens: int = 0
    max_document_tokens: int = 0
    total: int | None = None

    @property
    def shortens_documents(self) -> bool:
        return bool(self.max_document_tokens) or self.total is not None

    def shorten(self, query: str, document: str) -> tuple[str, str]:
        if query_tokens := self.max_query_tokens or self.total:
            query = Truncation(query_tokens).shorten(query)
        if document_tokens := self.max_document_tokens or self.total:
            document = Truncation(document_tokens).shorten(document)
        return query, document


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool, truncation: Truncation | None = None
) -> list[Ids]:
    """All texts in one go, which runs on several cores; literals of special tokens in them are tokens."""
    clean = [tokenizer.sanitize(truncation.shorten(text) if truncation else text) for text in texts]
    if truncation is None and tokenizer.frame is None:
        found = tokenizer.raw.encode_batch_fast(clean, add_special_tokens=add_special_tokens)
        return [np.array(encoding.ids, np.int32) for encoding in found]
    found = tokenizer.raw.encode_batch_fast(clean, add_special_tokens=False)
    if truncation is not None:
        room = truncation.max_tokens - (tokenizer.num_frame_tokens(is_pair=False) if add_special_tokens else 0)
        for encoding in found:
            encoding.truncate(max(0, room), direction=truncation.side)
    rows = [np.array(tokenizer.framed(one, add_special_tokens=add_special_tokens).ids, np.int32) for one in found]
    return rows if truncation is None else [truncation.cut(row) for row in rows]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], limits: PairLimits) -> list[tuple[Ids, Ids]]:
    """(token ids, token types) of each pair, as the checkpoint's own tokenizer joins two texts."""
    short = [limits.shorten(query, document) for query, document in pairs]
    texts = list(dict.fromkeys(text for pair in short for text in pair))  # a query stands in many pairs
    found = tokenizer.raw.encode_batch_fast([tokenizer.sanitize(text) for text in texts], add_special_tokens=False)
    encoded = dict(zip(texts, found, strict=True))
    num_special = tokenizer.num_frame_tokens(is_pair=True)
    return [_joined(tokenizer, encoded[query], encoded[document], limits, num_special) for query, document in short]


def _joined(tokenizer: Tokenizer, query: Any, document: Any, limits: PairLimits, num_special: int) -> tuple[Ids, Ids]:
    first = min(len(query), limits.max_query_tokens or len(query))
    second = min(len(document), limits.max_document_tokens or len(document))
    if limits.total is not None:
        room = limits.total - num_special
        if room < 0:
            raise ContextLengthError(
                f"A pair has {num_special} special tokens, which do not fit into the {limits.total} that it may have."
            )
        first, second = longest_first(first, second, room)
    joined = tokenizer.framed(_first(query, first), _first(document, second))
    return np.array(joined.ids, np.int32), np.array(joined.type_ids, np.int32)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens are kept of each of two texts: the longer one is cut, beyond half of `room` both are."""
    if first + second <= room:
        return first, second
    if first > second:
        return longest_first(second, first, room)[::-1]
    if 2 * first <= room:
        return first, room - first
    return room // 2, room - room // 2


def _first(encoding: Any, count: int) -> Any:
    """The beginning of an encoding, which itself is left as it is: several pairs share it."""
    if len(encoding) <= count:
        return encoding
    copied = type(encoding).merge([encoding])
    copied.truncate(count)
    return copied
