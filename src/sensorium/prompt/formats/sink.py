"""Where a format's program puts what it found: typed deltas, with the white space that is markup left out."""

from __future__ import annotations

from msgspec.structs import replace

from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text
from sensorium.prompt.formats.reader import SPACE

MAX_HELD_SPACE = 16  # characters before a marker that may be dropped; what is longer is text


class Sink:
    """Deltas since the last `take`. Content and reasoning lose white space beside markers, but only there."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._content = _Trimmed()
        self._thoughts = _Trimmed()
        self._calls = 0
        self._has_arguments = True  # of the call that is open
        self.in_call = False
        self.in_reasoning = False

    def take(self) -> list[Delta]:
        """What was put here since, neighbours of one kind joined."""
        taken, self._deltas = self._deltas, []
        return _joined(taken)

    def text(self, piece: str) -> None:
        if piece := self._content.push(piece):
            self._deltas.append(Text(piece))

    def thought(self, piece: str) -> None:
        if piece := self._thoughts.push(piece):
            self._deltas.append(Reasoning(piece))

    def begin_reasoning(self) -> None:
        self._content.drop()
        self._thoughts.begin_block()
        self.in_reasoning = True

    def end_reasoning(self) -> None:
        """Content that follows begins with its first letter."""
        self._thoughts.drop()
        self._content.drop()
        self._content.is_fresh = True
        self.in_reasoning = False

    def begin_message(self) -> None:
        """Another block of content begins, which has lines of its own."""
        self._content.begin_block()

    def begin_call(self) -> None:
        """A call's marker was seen."""
        self._content.drop()
        self.in_call = True

    def call(self, name: str) -> None:
        self.close_arguments()
        self.begin_call()
        self._deltas.append(Call(self._calls, name))
        self._calls += 1
        self._has_arguments = False

    def arguments(self, piece: str) -> None:
        if piece:
            self._deltas.append(Arguments(self._calls - 1, piece))
            self._has_arguments = True

    def close_arguments(self) -> None:
        """The open call got all that it gets: one without arguments has `{}`."""
        if not self._has_arguments:
            self.arguments("{}")

    def end_call(self) -> None:
        """White space is dropped until text follows."""
        self.in_call = False
        self._content.after_call()

    def end_alone(self) -> None:
        """A marker that ends what nothing began. Between calls the white space before it goes with it."""
        self._content.drop_owed()

    def finish(self, *, complete: bool) -> None:
        """The end of the answer."""
        if complete:
            self.close_arguments()
        if rest := self._content.rest():
            self._deltas.append(Text(rest))

    @property
    def num_calls(self) -> int:
        return self._calls


class _Trimmed:
    """Passes text on, but for white space at its end that may turn out to stand before a marker."""

    __slots__ = ("_held", "_line", "_owed", "_written", "is_fresh")

    def __init__(self) -> None:
        self.is_fresh = False  # white space at the beginning is dropped
        self._line = ""  # written before the next letter
        self._held = ""
        self._owed = False  # what is held follows a call: it counts only between two texts
        self._written = False

    def push(self, piece: str) -> str:
        if self.is_fresh:
            piece = piece.lstrip(SPACE)
            if not piece:
                return ""
            piece, self._line = self._line + piece, ""
            self.is_fresh = False
        text = self._held + piece
        letters = text.rstrip(SPACE)
        if self._owed and not letters:
            self._held = text[:MAX_HELD_SPACE]
            return ""
        if self._owed:
            self._owed = False
            text = self._with_what_is_owed(text)
            letters = text.rstrip(SPACE)
        end = max(len(letters), len(text) - MAX_HELD_SPACE)
        self._held = text[end:]
        self._written = self._written or bool(letters)
        return text[:end]

    def _with_what_is_owed(self, text: str) -> str:
        """Text that follows a call: the space between them counts if there was text before."""
        letters = text.lstrip(SPACE)
        space = text[: len(text) - len(letters)][:MAX_HELD_SPACE] or "\n"
        return space + letters if self._written else letters

    def begin_block(self) -> None:
        """White space around what follows is markup; a line of its own is enough."""
        self._held = ""
        self._line = "\n" if self._written else ""
        self.is_fresh = True

    def drop(self) -> None:
        """A marker follows."""
        self._held = ""

    def drop_owed(self) -> None:
        """A marker follows a call."""
        if self._owed:
            self._held = ""

    def after_call(self) -> None:
        self._held = ""
        self._owed = True

    def rest(self) -> str:
        """What is held at the end."""
        return "" if self._owed else self._held


def _joined(deltas: list[Delta]) -> list[Delta]:
    joined: list[Delta] = []
    pieces: list[str] = []
    for delta in deltas:
        if joined and _continues(joined[-1], delta):
            pieces.append(_text_of(delta))
            continue
        _close(joined, pieces)
        joined.append(delta)
        pieces = [_text_of(delta)]
    _close(joined, pieces)
    return joined


def _continues(last: Delta, delta: Delta) -> bool:
    if isinstance(delta, Call) or type(last) is not type(delta):
        return False
    return not isinstance(delta, Arguments) or not isinstance(last, Arguments) or last.index == delta.index


def _text_of(delta: Delta) -> str:
    return "" if isinstance(delta, Call) else delta.text


def _close(joined: list[Delta], pieces: list[str]) -> None:
    """Give the last of `joined` the text of all pieces."""
    if len(pieces) < 2:
        return
    last = joined[-1]
    if not isinstance(last, Call):
        joined[-1] = replace(last, text="".join(pieces))
