"""Counts what a JSON body is made of while it arrives, so that a body of many small values is refused unparsed.

Parsing costs time and memory by the value, not by the byte. What stands inside strings is not counted: a text may be
full of brackets, and an image in base64 is one value.
"""

from __future__ import annotations

from sensorium.config import Limits
from sensorium.errors import RequestError

_NOT_COUNTED = bytes(set(range(256)) - set(b"[{:,"))
_ASCII = bytes(range(128))
_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"0" * 9)
_MAX_DIGITS = 400
"""Of one number: reading it takes time by the square of its length."""
_MAX_PARAM_CHARS = 64
_MAX_KEY_BYTES = 4 * _MAX_PARAM_CHARS
_MAX_DIGITS_TOGETHER = 2**24
"""Of all numbers: as many as a million token ids can have, and more."""
_MAX_ESCAPES = 2**22
"""In strings: each takes as long as dozens of plain letters, and nobody else runs while a body is parsed."""
_MAX_WIDE_BYTES = 2**24
"""Outside ASCII: they take four times as long as letters, and five million characters of Chinese are no context."""
_SCANNED_BYTES = 64 * 1024
_SMALL_BYTES, _SMALL_NODES, _SMALL_VALUES = 256 * 1024, 1024, 16 * 1024


class TooManyValuesError(RequestError):
    code = "too_many_values"

    def __init__(self, finding: str, param: str | None) -> None:
        where = f", the last of them in `{param}`" if param else ""
        super().__init__(f"{finding}{where}; send less in one request.", param=param)
        self._finding = finding

    def placed(self, body: bytes | bytearray) -> TooManyValuesError:
        """The same with the field in which the body, which ends there, has broken the limit."""
        return TooManyValuesError(self._finding, last_field(body))


def last_field(body: bytes | bytearray) -> str | None:
    """The outermost object's last key in a body's beginning. Parsing it would take nobody knows what, and hold the
    interpreter's lock meanwhile."""
    strings = _Strings()
    depth, text, found = 0, b"", b""
    for start in range(0, len(body), _SCANNED_BYTES):
        parts = strings.split(bytes(body[start : start + _SCANNED_BYTES]))
        outside = parts[strings.begins_inside :: 2]
        inside = parts[not strings.begins_inside :: 2]
        if strings.begins_inside:
            inside[0] = (text + inside[0])[:_MAX_KEY_BYTES]
        elif inside:
            inside.insert(0, text)  # so that each stands before what is outside after it
        else:
            inside = [text]
        together = b"".join(outside)
        if b":" in together:
            for string, part in zip(inside, outside, strict=False):
                if depth == 1 and part.lstrip()[:1] == b":":
                    found = string
                depth += _deeper(part)
        else:
            depth += _deeper(together)
        text = inside[-1][:_MAX_KEY_BYTES]
    return found.decode(errors="replace")[:_MAX_PARAM_CHARS] or None


def _deeper(outside: bytes) -> int:
    return outside.count(b"{") + outside.count(b"[") - outside.count(b"}") - outside.count(b"]")


class _Strings:
    """Tells what of a body that comes in pieces is inside strings."""

    def __init__(self) -> None:
        self.begins_inside = False  # the piece that was split last
        self.escapes = 0  # so far
        self._is_inside = False
        self._in_escape = False  # the last byte was a backslash that belongs to the next one

    def split(self, piece: bytes) -> list[bytes]:
        """What is outside and inside strings, in turn, without escaped quotes and backslashes."""
        parts = self._unescaped(piece).split(b'"')
        self.begins_inside = self._is_inside
        self._is_inside ^= len(parts) % 2 == 0
        return parts

    def _unescaped(self, piece: bytes) -> bytes:
        if self._in_escape:
            piece = piece[1:]
        self._in_escape = False
        if b"\\" not in piece:
            return piece
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            self._in_escape = True
            self.escapes += 1
            piece = piece[:-1]
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        self.escapes += (len(piece) - len(plain)) // 2 + plain.count(b"\\")
        return plain


class JsonBounds:
    """Feed it a body's pieces in order, then `finish`; RequestError as soon as a limit is broken.

    Up to the first error of syntax, where a parser stops too, the counts are exact. `nodes` are arrays, objects and
    keys; `values` is the number of commas or of strings, whichever is larger.
    """

    def __init__(self, limits: Limits) -> None:
        self._max_nodes = limits.max_json_nodes
        self._max_values = max(limits.max_json_values, 2 * limits.max_embedding_tokens)
        self._pending: list[bytes] = []  # pieces too small to be worth a scan of their own
        self._pending_bytes = 0
        self._strings = _Strings()
        self._commas = self._quotes = self._digits = self._wide = 0
        self.nodes = self.size_bytes = 0

    @property
    def values(self) -> int:
        return max(self._commas, self._quotes // 2)

    @property
    def is_small(self) -> bool:
        """Is the body parsed before anybody notices?"""
        return self.size_bytes <= _SMALL_BYTES and self.nodes <= _SMALL_NODES and self.values <= _SMALL_VALUES

    def feed(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        self._pending.append(piece)
        self._pending_bytes += len(piece)
        if self._pending_bytes >= _SCANNED_BYTES:
            self.finish()

    def finish(self) -> None:
        piece = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        for start in range(0, len(piece), _SCANNED_BYTES):
            self._scan(piece[start : start + _SCANNED_BYTES])
            self._check()

    def _scan(self, piece: bytes) -> None:
        if not piece.isascii():
            self._wide += len(piece.translate(None, _ASCII))
        parts = self._strings.split(piece)
        outside = b"".join(parts[self._strings.begins_inside :: 2])
        self._quotes += len(parts) - 1
        alike = outside.translate(_DIGITS_ALIKE)
        self._digits += alike.count(b"0")
        if b"0" * _MAX_DIGITS in alike:
            raise RequestError(f"The body has a number of more than {_MAX_DIGITS} digits.", code="invalid_json")
        marks = outside.translate(None, _NOT_COUNTED)
        commas = marks.count(b",")
        self._commas += commas
        self.nodes += len(marks) - commas

    def _check(self) -> None:
        for count, most, what in (
            (self.nodes, self._max_nodes, "arrays, objects and keys"),
            (self.values, self._max_values, "values"),
            (self._strings.escapes, _MAX_ESCAPES, "escaped characters"),
            (self._digits, _MAX_DIGITS_TOGETHER, "digits of numbers"),
            (self._wide, _MAX_WIDE_BYTES, "bytes of text outside ASCII"),
        ):
            if count > most:
                raise TooManyValuesError(f"The body has more than {most} {what}", None)
