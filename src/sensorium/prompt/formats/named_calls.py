"""Calls whose name stands before their JSON: Mistral from v11 on, Kimi, DeepSeek V3 and V3.1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.prompt.formats.base import Tool
from sensorium.prompt.formats.json_calls import read_arguments, read_calls
from sensorium.prompt.formats.lark import Rules
from sensorium.prompt.formats.reader import Reader, Steps, ignore, marks
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.syntax import Marked, Tools, Wrapping


@dataclass(frozen=True, slots=True)
class MistralCalls(Marked):
    """`[TOOL_CALLS]` before a list of objects with names (`is_list`), or before each name. Either is read."""

    is_list: bool
    has_args_mark: bool = True
    opens = ("[TOOL_CALLS]",)
    closes = ("[ARGS]", "[CALL_ID]")

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        yield from reader.skip_space()
        char = yield from reader.peek()
        if char and char in "[{":
            is_array = yield from reader.accept("[")
            yield from read_calls(reader, sink, self.opens, is_array=is_array)
            return
        name: list[str] = []
        mark = yield from reader.until(marks(*self.closes, *self.opens, "{"), name.append, keep=True)
        if mark == "[CALL_ID]":
            mark = yield from reader.until(marks("[ARGS]", *self.opens, "{"), ignore, keep=True)
        if mark is None:
            return
        sink.call("".join(name).strip())
        yield from reader.accept("[ARGS]")
        yield from reader.skip_space()
        is_whole = yield from read_arguments(reader, sink.arguments, self.opens)
        if is_whole or not reader.ended:
            sink.close_arguments()

    @property
    def wrapping(self) -> Wrapping:
        return (
            Wrapping("[TOOL_CALLS] [", between=", ", after="]")
            if self.is_list
            else Wrapping(each_before="[TOOL_CALLS]")
        )

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        name, arguments = tool["function"]["name"], rules.json(schema)
        if not self.is_list:
            return f"{rules.literal(name + '[ARGS]' * self.has_args_mark)} {arguments}"
        head = rules.literal(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
        return f"{head} {arguments} {rules.literal('}')}"


@dataclass(frozen=True, slots=True)
class SectionCalls(Marked):
    """Calls each between `start` and `end`, their name before `separator`, all of them in a section.

    `is_fenced`: before the separator stands a kind, the name on a line after it, the JSON in a fence (DeepSeek V3).
    `has_ids`: the name is written `functions.NAME:INDEX` (Kimi).
    """

    section_start: str
    section_end: str
    start: str
    separator: str
    end: str
    is_fenced: bool = False
    has_ids: bool = False

    @property
    def opens(self) -> tuple[str, ...]:
        return (self.section_start, self.start)

    @property
    def closes(self) -> tuple[str, ...]:
        return (self.section_end, self.end, self.separator)

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        if marker == self.section_start:
            yield from reader.skip_space()
            if not (yield from reader.accept(self.start)):
                return
        while (yield from self._read_call(reader, sink)):
            yield from reader.skip_space()
            if not (yield from reader.accept(self.start)):
                break
        yield from reader.accept(self.section_end)

    def _read_call(self, reader: Reader, sink: Sink) -> Steps[bool]:
        """One call after its marker; whether its end was seen."""
        marks_ = marks(*self.opens, *self.closes)
        head: list[str] = []
        if (yield from reader.until(marks_, head.append, keep=True)) != self.separator:
            return False
        yield from reader.accept(self.separator)
        name = yield from self._name(reader, "".join(head).strip())
        if name is None:
            return False
        sink.call(name)
        is_whole = yield from read_arguments(reader, sink.arguments, (*self.opens, *self.closes))
        if is_whole or not reader.ended:
            sink.close_arguments()
        if (yield from reader.until(marks_, ignore, keep=True)) != self.end:
            return False
        yield from reader.accept(self.end)
        return True

    def _name(self, reader: Reader, head: str) -> Steps[str | None]:
        """The name, read up to the arguments; either dialect of DeepSeek's is understood."""
        yield from reader.skip_space()
        if (yield from reader.peek()) == "{":
            name = head.removeprefix("functions.") if self.has_ids else head
            return name.rpartition(":")[0] or name if self.has_ids else name
        written: list[str] = []
        mark = yield from reader.until(marks("\n", "```", "{", *self.opens, *self.closes), written.append, keep=True)
        yield from reader.until(marks("{", *self.opens, *self.closes), ignore, keep=True)
        return None if mark is None else "".join(written).strip() or head

    @property
    def wrapping(self) -> Wrapping:
        line = "\n" if self.is_fenced else ""
        return Wrapping(self.section_start, self.start, self.end, line, self.section_end)

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        name, arguments = tool["function"]["name"], rules.json(schema)
        if self.is_fenced:
            head = rules.literal(f"function{self.separator}{name}\n```json\n")
            tail = rules.literal("\n```")
            return f"{head} {arguments} {tail}"
        if self.has_ids:
            index = rules.add("index", "/[0-9]{1,3}/")
            return f"{rules.literal(f'functions.{name}:')} {index} {rules.literal(self.separator)} {arguments}"
        return f"{rules.literal(f'{name}{self.separator}')} {arguments}"
