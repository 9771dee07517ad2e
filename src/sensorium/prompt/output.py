"""One answer's tokens -> typed deltas: plain text, or what a model's format makes of it (reasoning, tool calls)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sensorium.prompt.detokenize import Detokenizer
from sensorium.prompt.formats.base import Delta, Scanner, Text
from sensorium.prompt.stop_strings import StopStrings
from sensorium.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. `continues`: the answer goes on in the middle of the prompt's text, so that a space at
    its start counts. `min_tokens`: stop strings are looked for after so many tokens."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    continues: bool = False
    min_tokens: int = 0


class OutputText(Protocol):
    """What one answer says, delta by delta. Never gives out half a character or the beginning of a stop string."""

    def push(self, token_ids: Sequence[int]) -> Sequence[Delta]:
        """What new tokens add. Nothing more once there is a `stop_reason`."""

    def finish(self, *, complete: bool) -> Sequence[Delta]:
        """What was held back. `complete`: the model ended the answer, it was not cut."""

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text."""

    @property
    def shows_stop(self) -> bool:
        """Is what ended the text, a stop string or an end token, part of it?"""

    @property
    def reasons(self) -> bool:
        """Are tokens that come now part of the model's reasoning?"""


class PlainOutput:
    """The text as it is."""

    __slots__ = ("_detokenizer", "_push", "shows_stop")

    reasons = False

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.shows_stop = options.include_stop
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            stop=options.stop,
            include_stop=options.include_stop,
            min_tokens=options.min_tokens,
            keep_leading_space=options.continues,
        )
        self._push = self._detokenizer.push

    def push(self, token_ids: Sequence[int]) -> Sequence[Delta]:
        text = self._push(token_ids)
        return (Text(text),) if text else ()

    def finish(self, *, complete: bool) -> Sequence[Delta]:
        text = self._detokenizer.flush() if self.stop_reason is None else ""
        return (Text(text),) if text else ()

    @property
    def stop_reason(self) -> str | None:
        return self._detokenizer.stop_reason


class ScannedOutput:
    """The text as a format's scanner reads it. Stop strings are looked for in what is neither reasoning nor a call:
    there they are part of something that must come whole."""

    __slots__ = ("_detokenizer", "_free_tokens", "_scanner", "_stops", "shows_stop")

    def __init__(
        self, tokenizer: Tokenizer, options: TextOptions, scanner: Scanner, markers: frozenset[int] = frozenset()
    ) -> None:
        """`markers` are special tokens that the scanner has to see."""
        self.shows_stop = options.include_stop
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            keep_leading_space=options.continues,
            kept=markers,
        )
        self._scanner = scanner
        self._stops = StopStrings(options.stop, options.include_stop) if options.stop else None
        self._free_tokens = options.min_tokens

    def push(self, token_ids: Sequence[int]) -> Sequence[Delta]:
        if self.stop_reason is not None:
            return ()
        self._free_tokens -= len(token_ids)
        text = self._detokenizer.push(token_ids)
        return self._checked(self._scanner.push(text)) if text else ()

    def finish(self, *, complete: bool) -> Sequence[Delta]:
        if self.stop_reason is not None:
            return ()
        rest = self._detokenizer.flush()
        deltas = [*(self._scanner.push(rest) if rest else ()), *self._scanner.finish(complete=complete)]
        checked = list(self._checked(deltas))
        if self._stops is not None and (held := self._stops.release()):
            checked.append(Text(held))
        return checked

    @property
    def stop_reason(self) -> str | None:
        return self._stops.found if self._stops is not None else None

    @property
    def reasons(self) -> bool:
        return self._scanner.in_reasoning

    def _checked(self, deltas: Sequence[Delta]) -> Sequence[Delta]:
        """Up to the first stop string in the text among them."""
        stops = self._stops
        if stops is None or self._free_tokens >= 0:
            return deltas
        checked: list[Delta] = []
        for delta in deltas:
            if not isinstance(delta, Text):
                if held := stops.release():
                    checked.append(Text(held))
                checked.append(delta)
                continue
            if text := stops.pass_on(delta.text):
                checked.append(Text(text))
            if stops.found is not None:
                break
        return checked
