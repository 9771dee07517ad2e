"""Calls in notations of their own: Python's `[f(a=1), g()]`, and Gemma's `call:f{a:1}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.prompt.formats.base import Tool
from sensorium.prompt.formats.json_calls import read_calls
from sensorium.prompt.formats.lark import Rules
from sensorium.prompt.formats.notation import Gemma, Python
from sensorium.prompt.formats.notation_grammar import PYTHON, NotationRules, gemma_notation
from sensorium.prompt.formats.reader import Reader, Steps, marks
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.syntax import Marked, Tools, Wrapping
from sensorium.prompt.formats.typed import escaped

_SHORT = 80  # characters of a name that may begin a call without a marker
_SHORT_SPACE = 8


@dataclass(frozen=True, slots=True)
class PythonicCalls:
    """A list of Python calls with keyword arguments. `is_bare`: an answer that is one needs no marker. Llama 4 writes
    JSON where it was shown some: that is read, too."""

    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    is_bare: bool = False
    _python: Python = field(default_factory=Python)

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        yield from reader.skip_space()
        yield from reader.accept("[")
        yield from reader.skip_space()
        if (yield from reader.peek()) == "{":
            yield from read_calls(reader, sink, (*self.opens, *self.closes), is_array=False)
        else:
            while (yield from self.read_call(reader, sink)):
                yield from reader.skip_space()
                if not (yield from reader.accept(",")):
                    break
                yield from reader.skip_space()
        yield from reader.skip_space()
        yield from reader.accept("]")
        yield from reader.skip_space()
        yield from reader.accept_any(self.closes)

    def read_call(self, reader: Reader, sink: Sink) -> Steps[bool]:
        """One call; False if it is cut or none."""
        reader.record()
        name = yield from reader.word()
        yield from reader.skip_space()
        is_call = bool(name) and (yield from reader.accept("("))
        read = reader.recorded()
        if not is_call:
            sink.text(read)
            return False
        sink.call(name)
        if (yield from self._read_arguments(reader, sink)):
            return True
        # Not Python: the rest goes out as it is, for the client to see.
        yield from reader.until(marks(*self.opens, *self.closes), sink.arguments, keep=True)
        return False

    def _read_arguments(self, reader: Reader, sink: Sink) -> Steps[bool]:
        before = "{"
        while True:
            yield from reader.skip_space()
            if (yield from reader.accept(")")):
                sink.arguments("}" if before != "{" else "{}")
                return True
            key = yield from reader.word()
            yield from reader.skip_space()
            if not key or not (yield from reader.accept("=")):
                sink.arguments(key)
                return False
            sink.arguments(f'{before}"{escaped(key)}": ')
            before = ", "
            if not (yield from self._python.value(reader, sink.arguments)):
                return False
            yield from reader.skip_space()
            if not (yield from reader.accept(",")) and (yield from reader.peek()) != ")":
                return False

    def read_unmarked(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[bool]:
        if not self.is_bare:
            return False
        reader.record()
        is_call = yield from self.begins_call(reader, tools)
        reader.unread(reader.recorded())
        if is_call:
            sink.begin_call()
            yield from self.read(reader, sink, tools, "")
        return is_call

    def begins_call(self, reader: Reader, tools: Tools) -> Steps[bool]:
        """Whether a list comes that begins with a call with keywords, or with a tool's call without any."""
        if not (yield from reader.skip_space(_SHORT_SPACE)) or not (yield from reader.accept("[")):
            return False
        yield from reader.skip_space(_SHORT_SPACE)
        name = yield from reader.word(_SHORT)
        if not name or not (yield from reader.accept("(")):
            return False
        yield from reader.skip_space(_SHORT_SPACE)
        if (yield from reader.accept(")")):
            return name in tools
        return bool((yield from reader.word(_SHORT))) and (yield from reader.accept("="))

    inner = ()

    @property
    def wrapping(self) -> Wrapping:
        before, after = "".join(self.opens[:1]), "".join(self.closes[:1])
        return Wrapping(f"{before}[", between=", ", after=f"]{after}")

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        name = rules.literal(f"{tool['function']['name']}(")
        return f'{name} {NotationRules(PYTHON, rules, schema).arguments()} ")"'


@dataclass(frozen=True, slots=True)
class GemmaCalls(Marked):
    """`call:NAME{…}` between two markers, in Gemma's notation."""

    start: str
    end: str
    notation: Gemma

    @property
    def opens(self) -> tuple[str, ...]:
        return (self.start,)

    @property
    def closes(self) -> tuple[str, ...]:
        return (self.end,)

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        yield from reader.skip_space()
        yield from reader.accept("call:")
        name: list[str] = []
        mark = yield from reader.until(marks("{", self.start, self.end), name.append, keep=True)
        if mark is None or not "".join(name).strip():
            return
        sink.call("".join(name).strip())
        if mark == "{" and not (yield from self.notation.members(reader, sink.arguments)):
            yield from reader.until(marks(self.start, self.end), sink.arguments, keep=True)
        if mark == "{" or not reader.ended:
            sink.close_arguments()
        yield from reader.skip_space()
        yield from reader.accept(self.end)

    @property
    def inner(self) -> tuple[str, ...]:
        return (self.notation.quote,)

    @property
    def wrapping(self) -> Wrapping:
        return Wrapping(each_before=f"{self.start}call:", each_after=self.end)

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        members = NotationRules(gemma_notation(self.notation.quote), rules, schema).arguments()
        return f'{rules.literal(tool["function"]["name"])} "{{" {members} "}}"'
