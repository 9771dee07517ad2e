"""Files that were fetched for requests and are in memory until their prompts are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sensorium.errors import BodyTooLargeError, OverloadedError
from sensorium.units import size_text

Take = Callable[[int], None]
"""Called with a number of bytes before they are kept; it may refuse them."""


def unbounded(size_bytes: int) -> None:
    """For who counts nothing."""


class HeldBytes:
    """All of them together. They come after the request was let in, and a short body may name many large files."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.total = 0

    @contextmanager
    def open(self) -> Iterator[RequestBytes]:
        """One request's part."""
        part = RequestBytes(self)
        try:
            yield part
        finally:
            self.total -= part.total

    def add(self, size_bytes: int, held_bytes: int) -> None:
        if held_bytes + size_bytes > self._max_bytes:
            raise BodyTooLargeError(
                f"The media of this request are larger than {size_text(self._max_bytes)} together. Send fewer."
            )
        if self.total + size_bytes > self._max_bytes:
            raise OverloadedError("The server is busy: too many large media are being fetched. Try again later.")
        self.total += size_bytes


class RequestBytes:
    """What one request holds of `HeldBytes`. `add` before more is kept: OverloadedError, BodyTooLargeError."""

    __slots__ = ("_all", "total")

    def __init__(self, together: HeldBytes) -> None:
        self._all = together
        self.total = 0

    def add(self, size_bytes: int) -> None:
        self._all.add(size_bytes, self.total)
        self.total += size_bytes
