"""Token ids as they are sampled -> text that can be sent at once, up to the first stop string.

Never gives out half a character or the beginning of a stop string. All pushed text plus `flush` equals decoding all
ids at once, up to the stop; time is linear in the number of tokens. (One difference: where sentencepiece byte tokens
are not valid UTF-8, decoding at once turns valid neighbours into U+FFFD too, which a stream may have sent already.)
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from sensorium.prompt.pieces import TokenBytes
from sensorium.prompt.stop_strings import StopStrings
from sensorium.prompt.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_MAX_PENDING = 16  # tokens of which no text came, after which a window ends: all of it is decoded for every token


class Detokenizer:
    """One answer's text. A stop string counts once it is complete, so the result does not depend on token boundaries:
    of several, the one that is complete first wins, and of these the longest.

    Stop strings are looked for in the text after the first `min_tokens` tokens. `keep_leading_space` is for text that
    continues a prompt: sentencepiece writes the space before a word into the word's token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        keep_leading_space: bool = False,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        """`kept` are special tokens that are text all the same."""
        skipped = tokenizer.special_ids - kept if skip_special_tokens else frozenset[int]()
        table = tokenizer.token_bytes
        self._text: _TableText | _WindowText
        if table is not None:
            self._text = _TableText(table, skipped, 0 if keep_leading_space else table.lead)
        else:
            self._text = _WindowText(tokenizer, skipped)
        self._stops = StopStrings(stop, include_stop) if stop else None
        self._free_tokens = min_tokens
        # One call per token is spared where there is nothing to look for.
        self.push: Callable[[Sequence[int]], str] = self._push_checked if stop else self._text.push

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found if self._stops is not None else None

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        rest = self._text.flush()
        return rest if self._stops is None else self._stops.pass_on(rest) + self._stops.release()

    def _push_checked(self, token_ids: Sequence[int]) -> str:
        """`push` with stop strings: new text that can be part of no stop string."""
        if self._stops is None or self._stops.found is not None:
            return ""
        if self._free_tokens <= 0:
            return self._stops.pass_on(self._text.push(token_ids))
        unchecked = self._text.push(token_ids[: self._free_tokens])
        checked = token_ids[self._free_tokens :]
        self._free_tokens -= len(token_ids) - len(checked)
        return unchecked + self._stops.pass_on(self._text.push(checked))


class _TableText:
    """Text of tokens that have bytes."""

    __slots__ = ("_decode", "_lead", "_skipped", "_table")

    def __init__(self, table: TokenBytes, skipped: frozenset[int], lead: int) -> None:
        self._table = table
        self._skipped = skipped
        self._lead = lead
        self._decode = _Utf8Decoder("replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        table, skipped = self._table, self._skipped
        text = self._decode(b"".join([table[token_id] for token_id in token_ids if token_id not in skipped]))
        return self._without_lead(text) if self._lead and text else text

    def flush(self) -> str:
        return self._decode(b"", True)

    def _without_lead(self, text: str) -> str:
        spaces = min(self._lead, len(text) - len(text.lstrip(" ")))
        # A text that begins with anything else has no more spaces to lose.
        self._lead = self._lead - spaces if spaces == len(text) else 0
        return text[spaces:]


class _WindowText:
    """Text of tokens whose spacing depends on their neighbours: a short window is decoded again for every token."""

    __slots__ = ("_before", "_context", "_decode", "_pending", "_skipped")

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._decode = tokenizer.raw.decode
        self._skipped = skipped
        self._context: list[int] = []  # the tokens that gave the last piece of text
        self._before = ""  # their text
        self._pending: list[int] = []  # tokens since

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step(token_id) for token_id in token_ids if token_id not in self._skipped])

    def flush(self) -> str:
        return self._take(self._window()) if self._pending else ""

    def _step(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._window()
        unfinished = text.endswith("\ufffd") or len(text) <= len(self._before)
        return "" if unfinished and len(self._pending) < _MAX_PENDING else self._take(text)

    def _window(self) -> str:
        return self._decode(self._context + self._pending, skip_special_tokens=False)

    def _take(self, text: str) -> str:
        """The part of the window's text that is new; the window then goes on from here."""
        self._context, self._pending = self._pending, []
        alone = self._decode(self._context, skip_special_tokens=False)
        new = text[len(self._before) :] if text.startswith(self._before) else alone
        self._before = alone
        return new
