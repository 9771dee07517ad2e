"""Calls in blocks of code, as models write them that were told of tools in words: Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.prompt.formats.base import Tool
from sensorium.prompt.formats.json_calls import JsonCalls
from sensorium.prompt.formats.lark import Rules
from sensorium.prompt.formats.notation_calls import PythonicCalls
from sensorium.prompt.formats.reader import Reader, Steps, marks
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.syntax import Tools, Wrapping

_FENCE = "```"
_PRINT = "print("
_SHORT = 16  # characters of a block's language


@dataclass(frozen=True, slots=True)
class CodeBlockCalls:
    """Python calls in a block of `language`: a list, or one a line, maybe within `print(…)`. An answer that is a list
    of calls or a JSON object of one, bare or in a block of another language, is read, too."""

    language: str = "tool_code"
    closes = ()
    inner = ()
    _python: PythonicCalls = field(default_factory=lambda: PythonicCalls(is_bare=True))
    _json: JsonCalls = field(default_factory=lambda: JsonCalls((), is_bare=True))

    @property
    def opens(self) -> tuple[str, ...]:
        return (f"{_FENCE}{self.language}",)

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        before = sink.num_calls
        yield from reader.skip_space()
        if (yield from reader.peek()) in ("[", "{"):
            yield from self._python.read(reader, sink, tools, marker)
        else:
            while (yield from self._read_line(reader, sink)):
                yield from reader.skip_space()
                if (yield from reader.peek()) in ("", "`"):
                    break
        if sink.num_calls > before:
            yield from reader.skip_space()
        yield from reader.accept(_FENCE)

    def _read_line(self, reader: Reader, sink: Sink) -> Steps[bool]:
        """One call; False if it is cut or none: what the block has left is then text."""
        is_printed = yield from reader.accept(_PRINT)
        if not (yield from self._python.read_call(reader, sink)):
            yield from reader.until(marks(_FENCE), sink.text, keep=True)
            return False
        if is_printed:
            yield from reader.skip_space()
            yield from reader.accept(")")
        return True

    def read_unmarked(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[bool]:
        for syntax in (self._python, self._json):
            reader.record()
            is_fenced = yield from _open_block(reader)
            is_call = yield from syntax.begins_call(reader, tools)
            reader.unread(reader.recorded())
            if is_call:
                sink.begin_call()
                yield from _open_block(reader)
                yield from syntax.read(reader, sink, tools, "")
                if is_fenced:
                    yield from reader.skip_space()
                    yield from reader.accept(_FENCE)
                return True
        return False

    @property
    def wrapping(self) -> Wrapping:
        return Wrapping(f"{_FENCE}{self.language}\n[", between=", ", after=f"]\n{_FENCE}")

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        return self._python.call_rule(tool, schema, rules)


def _open_block(reader: Reader) -> Steps[bool]:
    """Read a block's first line if one comes."""
    if not (yield from reader.accept(_FENCE)):
        return False
    yield from reader.word(_SHORT)
    return True
