"""Values in other notations than JSON -> JSON, written while they come: Python's literals and Gemma's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from sensorium.prompt.formats.reader import Emit, Reader, Steps, marks
from sensorium.prompt.formats.typed import escaped

Value = Callable[[Reader, Emit, int], Steps[bool]]
"""Reads one value at a depth; False where it is cut or is no value."""
Key = Callable[[Reader, int], Steps[str | None]]
"""Reads one key, as JSON; None where it is cut or is no key."""

MAX_DEPTH = 48
_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
_HEX = re.compile(r"[+-]?0[xX][0-9a-fA-F]{1,256}")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": ""}
_LONG_ESCAPES = {"x": 2, "u": 4, "U": 8}


def scalar(word: str) -> str:
    """JSON of a word: a number, a truth, nothing; any other word is a string."""
    if word in _WORDS:
        return _WORDS[word]
    if _NUMBER.fullmatch(word) and math.isfinite(float(word.replace("_", ""))):
        plain = word.replace("_", "").removeprefix("+")
        if _JSON_NUMBER.fullmatch(plain):
            return plain
        is_whole = plain.lstrip("-").isdigit()
        return (plain.lstrip("-0") or "0") if is_whole and plain[0] != "-" else json.dumps(float(plain))
    if _HEX.fullmatch(word):
        return str(int(word, 16))
    return json.dumps(word, ensure_ascii=False)


class Python:
    """Python's literals: quotes of either kind with escapes, lists, tuples, dicts."""

    def value(self, reader: Reader, emit: Emit, depth: int = 0) -> Steps[bool]:
        """Read one value; False where it is cut or is no value."""
        yield from reader.skip_space()
        char = yield from reader.peek()
        if not char or depth > MAX_DEPTH:
            return False
        if char in "\"'":
            return (yield from self._strings(reader, emit))
        if char in "[(":
            return (yield from _items(self.value, reader, emit, "]" if char == "[" else ")", depth))
        if char == "{":
            return (yield from _members(self._key, self.value, reader, emit, depth))
        word = yield from reader.word()
        if not word:
            return False
        if word in ("r", "f", "b", "u") and (yield from reader.peek()) in ('"', "'"):
            return (yield from self._strings(reader, emit, is_raw=word == "r"))
        if not (yield from reader.has(1)) and not reader.complete:
            return False  # more of it may have followed
        emit(scalar(word))
        return True

    def _key(self, reader: Reader, depth: int) -> Steps[str | None]:
        held: list[str] = []
        if not (yield from self.value(reader, held.append, depth)):
            return None
        yield from reader.skip_space()
        if not (yield from reader.accept(":")):
            return None
        name = "".join(held)
        return name if name.startswith('"') else json.dumps(name, ensure_ascii=False)

    def _strings(self, reader: Reader, emit: Emit, *, is_raw: bool = False) -> Steps[bool]:
        """A string, or several that stand side by side."""
        emit('"')
        while True:
            if not (yield from self._string(reader, emit, is_raw=is_raw)):
                return False
            yield from reader.skip_space()
            char = yield from reader.peek()
            if not char or char not in "\"'":
                emit('"')
                return True

    def _string(self, reader: Reader, emit: Emit, *, is_raw: bool) -> Steps[bool]:
        quote = yield from reader.next()
        if (yield from reader.accept(quote * 2)):
            quote *= 3
        inside = marks(quote, "\\")
        while True:
            mark = yield from reader.until(inside, lambda piece: emit(escaped(piece)))
            if mark != "\\":
                return mark is not None
            yield from self._escape(reader, emit, is_raw=is_raw)

    def _escape(self, reader: Reader, emit: Emit, *, is_raw: bool) -> Steps[None]:
        char = yield from reader.next()
        if is_raw or not char:
            emit(escaped("\\" + char))
        elif char in _LONG_ESCAPES:
            digits = yield from reader.next(_LONG_ESCAPES[char])
            emit(_character(char, digits))
        elif char in _ESCAPES:
            emit(escaped(_ESCAPES[char]))
        else:
            emit(escaped(char if char in "\\\"'" else "\\" + char))


def _character(kind: str, digits: str) -> str:
    """A character by its number, as JSON writes it: halves of a pair stay as they are."""
    try:
        code = int(digits, 16) if digits.isalnum() else -1
    except ValueError:
        code = -1
    if not 0 <= code <= 0x10FFFF or len(digits) < _LONG_ESCAPES[kind]:
        return escaped(f"\\{kind}{digits}")
    return f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else escaped(chr(code))


@dataclass(frozen=True, slots=True)
class Gemma:
    """Gemma's: keys without quotes, strings between two of the same marker and without escapes, bare words."""

    quote: str

    def value(self, reader: Reader, emit: Emit, depth: int = 0) -> Steps[bool]:
        yield from reader.skip_space()
        if depth > MAX_DEPTH:
            return False
        if (yield from reader.accept(self.quote)):
            emit('"')
            if (yield from reader.until(marks(self.quote), lambda piece: emit(escaped(piece)))) is None:
                return False
            emit('"')
            return True
        char = yield from reader.peek()
        if char == "{":
            return (yield from self.members(reader, emit, depth))
        if char == "[":
            return (yield from _items(self.value, reader, emit, "]", depth))
        held: list[str] = []
        mark = yield from reader.until(marks(",", "}", "]"), held.append, keep=True)
        if mark is not None:
            emit(scalar("".join(held).strip()))
        return mark is not None

    def members(self, reader: Reader, emit: Emit, depth: int = 0) -> Steps[bool]:
        """An object; its brace comes next."""
        return (yield from _members(self._key, self.value, reader, emit, depth))

    def _key(self, reader: Reader, _depth: int) -> Steps[str | None]:
        held: list[str] = []
        if (yield from reader.accept(self.quote)):
            if (yield from reader.until(marks(self.quote), held.append)) is None:
                return None
            name = "".join(held) if (yield from reader.accept(":")) else None
        else:
            mark = yield from reader.until(marks(":", "{", "}", ","), held.append)
            name = "".join(held).strip().strip('"') if mark == ":" else None
        return None if name is None else json.dumps(name, ensure_ascii=False)


def _items(value: Value, reader: Reader, emit: Emit, end: str, depth: int) -> Steps[bool]:
    """A list up to `end`; its bracket comes next."""

    def item(separator: str) -> Steps[bool]:
        if separator:
            emit(separator)
        return (yield from value(reader, emit, depth + 1))

    return (yield from _series("[]", end, item, reader, emit))


def _members(key: Key, value: Value, reader: Reader, emit: Emit, depth: int) -> Steps[bool]:
    """An object; its brace comes next. `key` reads a key and the colon behind it."""

    def member(separator: str) -> Steps[bool]:
        name = yield from key(reader, depth + 1)
        if name is None:
            return False
        emit(f"{separator}{name}: ")
        return (yield from value(reader, emit, depth + 1))

    return (yield from _series("{}", "}", member, reader, emit))


def _series(brackets: str, end: str, entry: Callable[[str], Steps[bool]], reader: Reader, emit: Emit) -> Steps[bool]:
    """Entries up to `end`, in JSON's brackets. `entry` reads one and emits it behind a separator."""
    yield from reader.next()
    emit(brackets[0])
    separator = ""
    while True:
        yield from reader.skip_space()
        if (yield from reader.accept(end)):
            emit(brackets[1])
            return True
        if not (yield from entry(separator)):
            return False
        separator = ", "
        if not (yield from _goes_on(reader, end)):
            return False


def _goes_on(reader: Reader, end: str) -> Steps[bool]:
    """Whether a comma or `end` comes next; the comma is taken."""
    yield from reader.skip_space()
    return (yield from reader.accept(",")) or (yield from reader.peek()) == end
