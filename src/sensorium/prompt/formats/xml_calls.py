"""Calls written as tags, arguments as raw text between them: Qwen3-Coder and 3.5, GLM, DeepSeek's DSML, MiniMax, Step3,
MiniCPM5, Seed-OSS, Hunyuan 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sensorium.prompt.formats.base import Tool
from sensorium.prompt.formats.json_calls import read_calls
from sensorium.prompt.formats.lark import Rules, members_of, within, words_of
from sensorium.prompt.formats.reader import Emit, Reader, Steps, ignore, marks
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.syntax import Marked, Tools, Wrapping
from sensorium.prompt.formats.typed import escaped, property_schema, typed, types_of


@dataclass(frozen=True)
class XmlCalls(Marked):
    """Literals of the tags: `block` may hold several calls or, where `call_start` is "", is one; "" where there is
    none. `value_start` is "" where the value follows the key's tag at once. `flag`: what stands between a key and
    whether it is a string. `lead` and `trail`: what stands around each call."""

    block_start: str
    block_end: str
    call_start: str
    name_end: str
    call_end: str
    key_start: str
    key_end: str
    value_start: str
    value_end: str
    is_padded: bool = False  # a newline at either end of a value is markup
    flag: str = ""
    line: str = "\n"  # between tags, where the model writes it
    is_block_of_many: bool = False  # one block around all calls, not one around each
    lead: tuple[str, ...] = ()
    trail: tuple[str, ...] = ()
    cdata: tuple[str, str] = ("", "")  # a value may stand between these

    @cached_property
    def opens(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.block_start, *self.lead[:1], self.call_start)))

    @cached_property
    def closes(self) -> tuple[str, ...]:
        return tuple(filter(None, dict.fromkeys((self.block_end, self.call_end, *self.trail))))

    @property
    def inner(self) -> tuple[str, ...]:
        own = (self.key_start, self.key_end, self.value_start, self.value_end, *self.lead, *self.cdata)
        return tuple(text for text in own if text and not text.isalnum())

    @cached_property
    def _tags(self) -> tuple[str, ...]:
        """What may follow a value, in or out of order."""
        return tuple(dict.fromkeys((*self.opens, *self.closes, self.key_start)))

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        if marker != self.call_start and self.call_start:
            yield from reader.skip_space()
            if (yield from reader.peek()) == "{":  # as its elder siblings wrote
                yield from read_calls(reader, sink, (*self.opens, *self.closes), is_array=False)
                yield from reader.skip_space()
                yield from reader.accept_any(self.closes)
                return
            if not (yield from self._accept_call(reader)):
                return
        while True:
            end = yield from self._read_call(reader, sink, tools)
            if end != self.call_end:
                return
            if self.block_end == self.call_end:
                return
            yield from _skip(reader, self.trail)
            if (self.block_end and (yield from reader.accept(self.block_end))) or not (
                yield from self._accept_call(reader)
            ):
                return

    def _accept_call(self, reader: Reader) -> Steps[bool]:
        """Read a call's first tag, with what leads to it, if it comes next."""
        yield from _skip(reader, self.lead)
        return (yield from reader.accept(self.call_start))

    def _read_call(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[str | None]:
        """A call from its name on; the tag that ended it, which is read if it is the call's or the block's end."""
        name = yield from self._read_name(reader)
        if not name:
            return None
        sink.call(name)
        arguments = _Arguments(sink, tools.schema(name))
        tags = marks(*self._tags)
        while True:
            tag = yield from reader.until(tags, ignore, keep=True)
            if tag != self.key_start:
                break
            yield from reader.accept(tag)
            yield from self._read_argument(reader, arguments)
        if tag is not None or reader.complete:
            arguments.close()
        if tag in self.closes:
            yield from reader.accept(tag or "")
        return tag

    def _read_name(self, reader: Reader) -> Steps[str]:
        taken: list[str] = []
        ends = marks(self.name_end, *self._tags)
        mark = yield from reader.until(ends, taken.append, keep=True)
        if mark == self.name_end:
            yield from reader.accept(mark)
        return "" if mark is None else "".join(taken).strip().strip('"')

    def _read_argument(self, reader: Reader, arguments: _Arguments) -> Steps[None]:
        taken: list[str] = []
        mark = yield from reader.until(marks(self.key_end, *self._tags), taken.append, keep=True)
        if mark != self.key_end:
            return
        yield from reader.accept(mark)
        key, flagged, flag = "".join(taken).partition(self.flag) if self.flag else ("".join(taken), "", "")
        if self.value_start:
            yield from reader.skip_space()
            yield from reader.accept(self.value_start)
        types = arguments.types(key.strip())
        if flagged:
            types = frozenset({"string"}) if flag == "true" else frozenset()
        arguments.key(key.strip())
        yield from self._read_value(reader, arguments, types)

    def _read_value(self, reader: Reader, arguments: _Arguments, types: frozenset[str]) -> Steps[None]:
        is_string = types == {"string"}
        ends = marks(self.value_end, *self._tags)
        if self.cdata[0] and (yield from reader.accept(self.cdata[0])):
            ends = marks(self.cdata[1])
        held: list[str] = []
        emit: Emit = arguments.string if is_string else held.append
        emit = _Padded(emit).push if self.is_padded else emit
        if is_string:
            arguments.open_string()
        elif types & {"object", "array"}:
            yield from self._read_json(reader, emit)
        tag = yield from reader.until(ends, emit, keep=True)
        if tag is not None and tag == self.cdata[1]:
            yield from reader.accept(tag)
            yield from reader.accept(self.value_end)
        elif tag == self.value_end:
            yield from reader.accept(tag)
        if is_string:
            if tag is not None or reader.complete:
                arguments.close_string()
        elif tag is not None or reader.complete:
            arguments.value(typed("".join(held), types))

    def _read_json(self, reader: Reader, emit: Emit) -> Steps[None]:
        """Where it begins as JSON: up to its end, so that tags in its strings are text."""
        yield from reader.skip_space()
        char = yield from reader.peek()
        if char and char in "{[":
            yield from reader.json_value(emit, (self.value_end, *self._tags))

    # As a grammar.

    @property
    def wrapping(self) -> Wrapping:
        if not self.call_start:
            return Wrapping(each_before=self.block_start, each_after=self.call_end, between=self.line)
        before, after = "".join(self.lead) + self.call_start, self.call_end + "".join(self.trail)
        if self.is_block_of_many:
            return Wrapping(self.block_start + self.line, before, after, self.line, self.line + self.block_end)
        if not self.block_start:
            return Wrapping(each_before=before, each_after=after, between=self.line)
        return Wrapping(
            each_before=f"{self.block_start}{self.line}{before}",
            each_after=f"{after}{self.line}{self.block_end}",
            between=self.line,
        )

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        head = rules.literal(
            f"{tool['function']['name']}{self.name_end}{'' if self.name_end == self.line else self.line}"
        )
        members = members_of(schema)
        if members is None:
            return f"{head} ({self._any_argument(rules)})*"
        items = [
            f"{self._argument_rule(key, value, schema, rules)}"
            if required
            else f"({self._argument_rule(key, value, schema, rules)})?"
            for key, value, required in members
        ]
        return " ".join([head, *items])

    def _argument_rule(self, key: str, value: object, root: Mapping[str, Any], rules: Rules) -> str:
        types = types_of(value, root)
        is_text = not types or "string" in types
        flag = f"{self.flag}{'true' if is_text else 'false'}" if self.flag else ""
        pad = "\n" if self.is_padded else ""
        head = rules.literal(f"{self.key_start}{key}{flag}{self.key_end}{self._before_value}{pad}")
        end = f"{pad}{self.value_end}{self.line}"
        if not is_text:
            return f"{head} {rules.json(within(value, root))} {rules.literal(end)}"
        words = words_of(value)
        if words is not None and not any(tag in word for tag in (*self._tags, self.value_end) for word in words):
            return f"{head} ({' | '.join(map(rules.literal, words))}) {rules.literal(end)}"
        return f"{head} {rules.text_until(end, (*self._tags, self.value_end))}"

    @property
    def _before_value(self) -> str:
        return f"{self.line}{self.value_start}" if self.value_start else ""

    def _any_argument(self, rules: Rules) -> str:
        pad = "\n" if self.is_padded else ""
        flag = f"{self.flag}true" if self.flag else ""
        key = rules.add("key", "/[A-Za-z0-9_.-]{1,64}/")
        head = rules.literal(f"{flag}{self.key_end}{self._before_value}{pad}")
        end = f"{pad}{self.value_end}{self.line}"
        return f"{rules.literal(self.key_start)} {key} {head} {rules.text_until(end, (*self._tags, self.value_end))}"


def _skip(reader: Reader, texts: tuple[str, ...]) -> Steps[None]:
    """Read white space and these texts in their order, as far as they come."""
    yield from reader.skip_space()
    for text in texts:
        yield from reader.accept(text)
        yield from reader.skip_space()


class _Arguments:
    """A JSON object that is written member by member."""

    def __init__(self, sink: Sink, schema: Mapping[str, Any]) -> None:
        self._sink = sink
        self._schema = schema
        self._is_begun = False

    def types(self, key: str) -> frozenset[str]:
        return types_of(property_schema(self._schema, key), self._schema)

    def key(self, key: str) -> None:
        self._sink.arguments(f'{", " if self._is_begun else "{"}"{escaped(key)}": ')
        self._is_begun = True

    def open_string(self) -> None:
        self._sink.arguments('"')

    def string(self, piece: str) -> None:
        self._sink.arguments(escaped(piece))

    def close_string(self) -> None:
        self._sink.arguments('"')

    def value(self, text: str) -> None:
        self._sink.arguments(text)

    def close(self) -> None:
        self._sink.arguments("}" if self._is_begun else "{}")


class _Padded:
    """Passes a value on without the newline at either end."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._is_first = True
        self._held = ""

    def push(self, piece: str) -> None:
        if self._is_first:
            piece = piece.removeprefix("\n")
            self._is_first = False
        text = self._held + piece
        self._held = "\n" if text.endswith("\n") else ""
        if text := text.removesuffix("\n"):
            self._emit(text)
