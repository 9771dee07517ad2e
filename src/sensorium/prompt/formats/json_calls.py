"""Calls as JSON objects with a name and arguments, one or a list of them: Hermes, Llama, Phi, Granite, old Mistral."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.prompt.formats.base import Tool
from sensorium.prompt.formats.lark import Rules
from sensorium.prompt.formats.reader import Emit, Reader, Steps, ignore
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.syntax import NO_WRAPPING, Tools, Wrapping

NAME_KEYS = frozenset({"name", "function", "tool_name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_SHORT = 80  # characters of a key or name that may begin a call without a marker
_SHORT_SPACE = 8


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """`lead`: what may stand between the marker and the JSON. `is_bare`: an answer that begins with a call needs no
    marker. `id_key`: under which the model numbers its calls; "" where it does not."""

    opens: tuple[str, ...]
    closes: tuple[str, ...] = ()
    wrapping: Wrapping = NO_WRAPPING
    lead: tuple[str, ...] = ()
    is_bare: bool = False
    argument_key: str = "arguments"
    name_key: str = "name"
    id_key: str = ""

    @property
    def inner(self) -> tuple[str, ...]:
        return self.lead

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        yield from reader.skip_space()
        while (yield from reader.accept_any(self.lead)):
            yield from reader.skip_space()
        before = sink.num_calls
        is_array = marker.endswith("[") or (yield from reader.accept("["))
        yield from read_calls(reader, sink, (*self.opens, *self.closes), is_array=is_array)
        if sink.num_calls == before and marker.endswith("["):
            sink.text(marker)
        yield from reader.skip_space()
        yield from reader.accept_any(self.closes)

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
        """Whether a JSON text is a call and not an answer in JSON: it has a name and then arguments, or only the name
        of a tool. Reads a bounded piece."""
        if not (yield from reader.skip_space(_SHORT_SPACE)):
            return False
        yield from reader.accept("[")
        if not ((yield from reader.skip_space(_SHORT_SPACE)) and (yield from reader.accept("{"))):
            return False
        name = ""
        for _ in range(3):
            key: list[str] = []
            if not (yield from _short_string(reader, key)) or not (yield from reader.accept(":")):
                return False
            word = text_of("".join(key))
            if word in ARGUMENT_KEYS:
                return bool(name)
            value: list[str] = []
            if word not in {"type", "id", *NAME_KEYS} or not (yield from _short_string(reader, value)):
                return False
            name = text_of("".join(value)) if word in NAME_KEYS else name
            if not (yield from reader.accept(",")):
                return name in tools and (yield from reader.peek()) == "}"
        return False

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        name = json.dumps(tool["function"]["name"], ensure_ascii=False)
        head = rules.literal(f'"{self.name_key}": {name}, "{self.argument_key}": ')
        if self.id_key:
            number = rules.add("number", "/[0-9]{1,3}/")
            before, after = rules.literal(f'"{self.id_key}": "'), rules.literal('", ')
            head = f"{before} {number} {after} {head}"
        return f"{rules.literal('{')} {head} {rules.json(schema)} {rules.literal('}')}"


def read_calls(reader: Reader, sink: Sink, stops: tuple[str, ...], *, is_array: bool) -> Steps[None]:
    """One call or several: an array, whose bracket was read, or objects with a comma, a semicolon or white space
    between them."""
    while True:
        yield from reader.skip_space()
        if not (yield from reader.accept("{")):
            break
        yield from _read_object(reader, sink, stops)
        yield from reader.skip_space()
        yield from reader.accept_any((",", ";"))
    if is_array:
        yield from reader.accept("]")


def _read_object(reader: Reader, sink: Sink, stops: tuple[str, ...]) -> Steps[None]:
    """A call whose brace was read. What has no name is text."""
    reader.record()
    call = _Call(reader, sink)
    is_whole = yield from _read_members(reader, call, stops)
    if not call.is_begun:
        sink.begin_message()
        sink.text("{" + reader.recorded())
    elif is_whole or not reader.ended:
        sink.close_arguments()


def _read_members(reader: Reader, call: _Call, stops: tuple[str, ...]) -> Steps[bool]:
    """Members of the object and of `"function": {…}` in it; whether its end was seen."""
    depth = 1
    while depth:
        yield from reader.skip_space()
        if (yield from reader.accept("}")):
            depth -= 1
        elif not (yield from reader.accept(",")):
            key: list[str] = []
            if not (yield from reader.json_string(key.append)):
                return False
            yield from reader.skip_space()
            if not (yield from reader.accept(":")):
                return False
            yield from reader.skip_space()
            name = "".join(key)[1:-1]
            if name == "function" and (yield from reader.accept("{")):
                depth += 1
            elif not (yield from call.read_member(name, stops)):
                return False
    return True


class _Call:
    """A call as its members come, in any order."""

    def __init__(self, reader: Reader, sink: Sink) -> None:
        self._reader = reader
        self._sink = sink
        self._early: list[str] = []  # arguments before the name is known
        self.is_begun = False

    def read_member(self, key: str, stops: tuple[str, ...]) -> Steps[bool]:
        """Read the value of this key; False if it is cut."""
        if key in NAME_KEYS and not self.is_begun:
            written: list[str] = []
            if not (yield from self._reader.json_string(written.append)):
                return False
            self._begin(text_of("".join(written)))
            return True
        if key in ARGUMENT_KEYS:
            return (yield from read_arguments(self._reader, self._emit, stops))
        return (yield from self._reader.json_value(ignore, stops))

    def _begin(self, name: str) -> None:
        self._reader.recorded()
        self._sink.call(name)
        self.is_begun = True
        for piece in self._early:
            self._sink.arguments(piece)

    def _emit(self, piece: str) -> None:
        if self.is_begun:
            self._sink.arguments(piece)
        else:
            self._early.append(piece)


def read_arguments(reader: Reader, emit: Emit, stops: tuple[str, ...]) -> Steps[bool]:
    """A call's arguments: an object as it is written, or one that some models write into a string; null is none."""
    char = yield from reader.peek()
    if char == "{":
        return (yield from reader.json_value(emit, stops))
    held: list[str] = []
    is_whole = yield from reader.json_value(held.append, stops)
    written = "".join(held)
    if is_whole and char == '"':
        written = text_of(written)
    emit("" if written in ("null", "") else written)
    return is_whole


def text_of(written: str) -> str:
    """What a JSON string says; what is none stays as it is, without its quotes."""
    try:
        found = json.loads(written, strict=False)
    except ValueError:
        found = None
    return found if isinstance(found, str) else written.strip('"')


def _short_string(reader: Reader, into: list[str]) -> Steps[bool]:
    """A short JSON string with little space around it."""
    return (
        (yield from reader.skip_space(_SHORT_SPACE))
        and (yield from reader.json_string(into.append, _SHORT))
        and (yield from reader.skip_space(_SHORT_SPACE))
    )
