"""Reading text that comes in pieces: small steps that pause where the next character decides and is not there yet.

Every step is a generator that yields to wait for more text, so formats are written as if the text were whole. What a
step takes depends on the characters alone, never on where the pieces end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

Got = TypeVar("Got")
Steps = Generator[None, None, Got]
Emit = Callable[[str], None]

SPACE = " \t\r\n"
WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
"""What numbers and names are made of."""


class Marks:
    """Strings to look for; none is the beginning of another."""

    __slots__ = ("heads", "longest", "pattern")

    def __init__(self, marks: Iterable[str]) -> None:
        known = [mark for mark in marks if mark]
        self.pattern = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self.heads = frozenset(mark[:end] for mark in known for end in range(1, len(mark)))
        self.longest = max(map(len, self.heads), default=0)

    def begun(self, text: str, start: int) -> int:
        """Length of the longest end of text[start:] that begins a mark."""
        for length in range(min(self.longest, len(text) - start), 0, -1):
            if text[len(text) - length :] in self.heads:
                return length
        return 0


marks = lru_cache(maxsize=256)(lambda *texts: Marks(texts))
"""`Marks` of these strings; a format looks for the same few all the time."""

_STRING = Marks(('"', "\\"))


def ignore(_: str) -> None:
    """Where text that nobody wants goes."""


class Reader:
    """The text so far that was not read yet."""

    __slots__ = ("_at", "_buffer", "_record", "complete", "ended")

    def __init__(self) -> None:
        self._buffer = ""
        self._at = 0
        self._record: list[str] | None = None
        self.ended = False
        self.complete = False  # it ended by itself

    def feed(self, text: str) -> None:
        self._buffer = self._buffer[self._at :] + text
        self._at = 0

    def end(self, *, complete: bool) -> None:
        self.ended, self.complete = True, complete

    # Keeping what was read, for where it turns out to be something else.

    def record(self) -> None:
        """Keep what is read from now on."""
        self._record = []

    def recorded(self) -> str:
        """What was read since; keeping ends."""
        kept, self._record = self._record or [], None
        return "".join(kept)

    def unread(self, text: str) -> None:
        """Let text that was read be read again."""
        self.feed("")
        self._buffer = text + self._buffer

    def _take(self, end: int) -> str:
        piece = self._buffer[self._at : end]
        self._at = end
        if self._record is not None and piece:
            self._record.append(piece)
        return piece

    # Steps.

    def has(self, count: int) -> Steps[bool]:
        """Whether this many characters are left."""
        while len(self._buffer) - self._at < count:
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character; "" at the end."""
        yield from self.has(1)
        return self._buffer[self._at : self._at + 1]

    def next(self, count: int = 1) -> Steps[str]:
        """The next characters; fewer at the end."""
        yield from self.has(count)
        return self._take(min(self._at + count, len(self._buffer)))

    def skip_space(self, most: int = 1 << 30) -> Steps[bool]:
        """False once there is more than this much of it."""
        for _ in range(most + 1):
            char = yield from self.peek()
            if not char or char not in SPACE:
                return True
            self._take(self._at + 1)
        return False

    def accept(self, text: str) -> Steps[bool]:
        """Read this text if it comes next."""
        while True:
            there = self._buffer[self._at : self._at + len(text)]
            if there == text:
                self._take(self._at + len(text))
                return True
            if self.ended or not text.startswith(there):
                return False
            yield

    def accept_any(self, texts: Iterable[str]) -> Steps[str]:
        """Read the first of these that comes next; "" if none does."""
        for text in texts:
            if (yield from self.accept(text)):
                return text
        return ""

    def until(self, wanted: Marks, emit: Emit, *, keep: bool = False) -> Steps[str | None]:
        """Emit text up to the first mark, which is read too unless it is to be kept; None at the end of the text. What
        may be the beginning of a mark is held back."""
        while True:
            found = wanted.pattern.search(self._buffer, self._at)
            if found is not None:
                if found.start() > self._at:
                    emit(self._take(found.start()))
                if not keep:
                    self._take(found.end())
                return found.group()
            end = len(self._buffer)
            if not self.ended:
                end -= wanted.begun(self._buffer, self._at)
            if end > self._at:
                emit(self._take(end))
            if self.ended:
                return None
            yield

    def word(self, most: int = 1 << 16) -> Steps[str]:
        """Characters of a name or a number, up to one that is none."""
        taken: list[str] = []
        while len(taken) < most and (yield from self.peek()) in WORD:
            taken.append(self._take(self._at + 1))
        return "".join(taken)

    # JSON.

    def json_string(self, emit: Emit, most: int = 1 << 30) -> Steps[bool]:
        """Emit a JSON string as it is written, quotes included; False if none is here, it is cut or too long."""
        if not (yield from self.accept('"')):
            return False
        emit('"')
        length = 0

        def count(piece: str) -> None:
            nonlocal length
            length += len(piece)
            emit(piece)

        while length <= most:
            mark = yield from self.until(_STRING, count)
            if mark is None:
                return False
            if mark == '"':
                emit(mark)
                return length <= most
            count(mark)
            count((yield from self.next()))
        return False

    def json_value(self, emit: Emit, stops: tuple[str, ...] = ()) -> Steps[bool]:
        """Emit one JSON value as it is written, found by its brackets and strings; False if it is cut. A stop outside
        strings cuts it, too, and is not read."""
        char = yield from self.peek()
        if char == '"':
            return (yield from self.json_string(emit))
        if not char or char not in "{[":
            word = yield from self.word()
            emit(word)
            return bool(word)
        outside = marks('"', "[", "]", "{", "}", *stops)
        depth = 0
        while True:
            mark = yield from self.until(outside, emit, keep=True)
            if mark is None or mark in stops:
                return False
            if mark == '"':
                if not (yield from self.json_string(emit)):
                    return False
                continue
            emit((yield from self.next()))
            depth += 1 if mark in "{[" else -1
            if depth == 0:
                return True
