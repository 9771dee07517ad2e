"""Where in a text its tokens begin, counted in characters of the text as it is sent.

A token that goes on with a character which an earlier one began stands where that character does; one that adds no
text, such as a special token, stands where the text after it begins.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from sensorium.prompt.detokenize import Detokenizer
from sensorium.prompt.tokenizer import Tokenizer, encoded

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_CONTINUATIONS = frozenset(bytes([value]) for value in range(0x80, 0xC0))  # bytes that go on with a character


class TextOffsets:
    """Offsets of tokens one by one. The settings are those of the `Detokenizer` whose text it counts."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, keep_leading_space: bool) -> None:
        self._text = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, keep_leading_space=keep_leading_space
        )
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._table = tokenizer.token_bytes
        self._begun = b""  # of a character whose end is still to come
        self._count = 0  # characters that are complete

    def begin(self, token_id: int) -> int:
        """The offset of the next token."""
        start = self._count
        if self._table is not None and token_id not in self._skipped:
            start += self._follows_broken_character(self._table[token_id])
        self._count += len(self._text.push((token_id,)))
        return start

    def _follows_broken_character(self, added: bytes) -> bool:
        """Does this end a character that was begun without completing it? It then shows as one U+FFFD."""
        broken, decoder = False, _Utf8Decoder()
        try:
            decoder.decode(self._begun + added[:1])
        except UnicodeDecodeError:
            broken = self._begun != b""
        decoder = _Utf8Decoder("replace")
        decoder.decode(self._begun + added)
        self._begun = decoder.getstate()[0]
        return broken


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Offsets of a prompt's tokens in its text, which was tokenized or is what the ids decode to."""
    found = _walked(tokenizer, token_ids, text.encode())
    if found is None:
        found = _told_by_tokenizer(tokenizer, token_ids, text)
    if found is None:
        offsets = TextOffsets(tokenizer, skip_special_tokens=False, keep_leading_space=False)
        found = [offsets.begin(token_id) for token_id in token_ids]
    return [min(offset, len(text)) for offset in found]


def _walked(tokenizer: Tokenizer, token_ids: Sequence[int], text: bytes) -> list[int] | None:
    """Of tokens whose bytes are the text; None where they are not, since a normalizer has changed it."""
    table = tokenizer.token_bytes
    if table is None:
        return None
    starts: list[int] = []
    chars = at = 0
    for token_id in token_ids:
        added = table[token_id]
        if at == 0 and not text.startswith(added) and added.startswith(b" "):
            added = added[1:]  # sentencepiece's, which the text did not have
        if not text.startswith(added, at):
            if token_id not in tokenizer.special_ids:
                return None
            added = b""
        starts.append(chars - (text[at : at + 1] in _CONTINUATIONS))
        chars += sum(value & 0xC0 != 0x80 for value in added)
        at += len(added)
    return starts if at == len(text) else None


def _told_by_tokenizer(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int] | None:
    """As the tokenizer tells them, which knows what its normalizer did; None if it makes other ids of the text."""
    for add_special_tokens in (True, False):
        encoding = encoded(tokenizer.raw, text, add_special_tokens, with_offsets=True)
        if encoding.ids == token_ids:
            return _starts(text, encoding.offsets, encoding.special_tokens_mask)
    return None


def _starts(text: str, spans: Sequence[tuple[int, int]], added: Sequence[int]) -> list[int]:
    """Where spans begin, with the space before them, which some tokenizers leave out of what they tell."""
    starts: list[int] = []
    end = 0
    for (own_start, own_end), is_added in zip(spans, added, strict=True):
        starts.append(end if is_added or text[end:own_start].isspace() else own_start)
        end = end if is_added else max(end, own_end)
    return starts
