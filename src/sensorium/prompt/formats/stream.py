"""A format's program as a scanner: it runs as far as the text that is there takes it."""

from __future__ import annotations

from collections.abc import Callable

from sensorium.prompt.formats.base import Arguments, Call, Delta, Scanner
from sensorium.prompt.formats.reader import Reader, Steps
from sensorium.prompt.formats.sink import Sink

Program = Callable[[Reader, Sink], Steps[None]]


class StreamScanner:
    """Implements `Scanner`. The program ends only with the text."""

    def __init__(self, program: Program, already: str = "") -> None:
        """`already`: text of the prompt that the program is to have read."""
        self._reader, self._sink = Reader(), Sink()
        self._reader.feed(already)
        self._steps = program(self._reader, self._sink)
        next(self._steps, None)
        self._sink.take()

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._reader.feed(text)
        next(self._steps, None)
        return self._sink.take()

    def finish(self, *, complete: bool) -> list[Delta]:
        self._reader.end(complete=complete)
        next(self._steps, None)
        self._sink.finish(complete=complete)
        return self._sink.take()

    @property
    def in_call(self) -> bool:
        return self._sink.in_call

    @property
    def in_reasoning(self) -> bool:
        return self._sink.in_reasoning


class FirstCall:
    """A scanner that leaves out every call but the first: `parallel_tool_calls` is false."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner

    def push(self, text: str) -> list[Delta]:
        return _without_later_calls(self._scanner.push(text))

    def finish(self, *, complete: bool) -> list[Delta]:
        return _without_later_calls(self._scanner.finish(complete=complete))

    @property
    def in_call(self) -> bool:
        return self._scanner.in_call

    @property
    def in_reasoning(self) -> bool:
        return self._scanner.in_reasoning


def _without_later_calls(deltas: list[Delta]) -> list[Delta]:
    return [delta for delta in deltas if not isinstance(delta, Call | Arguments) or delta.index == 0]
