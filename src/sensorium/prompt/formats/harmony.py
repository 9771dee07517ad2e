"""gpt-oss's Harmony: an answer of several messages, each with a header that says what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sensorium.prompt.formats.base import Scanner, Thinking, Tool, ToolChoice
from sensorium.prompt.formats.grammar import Thoughts, budget_grammar, is_strict, one_of
from sensorium.prompt.formats.json_calls import read_arguments
from sensorium.prompt.formats.lark import Rules
from sensorium.prompt.formats.reader import Marks, Reader, Steps, ignore
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.stream import StreamScanner
from sensorium.prompt.formats.syntax import Marked, Tools, Wrapping
from sensorium.prompt.grammars import nested
from sensorium.types import Grammar

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_ALL = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_ENDS = (END, CALL, RETURN, START, CHANNEL)
_BODY = Marks(_ALL)
_HEADER = Marks((MESSAGE, END, CALL, RETURN))
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*([a-z]+)")
_FUNCTIONS = "functions."


@dataclass(frozen=True, slots=True)
class Harmony:
    """Implements `OutputFormat`. `tokens`: ids of its markers."""

    tokens: Mapping[str, int] = field(default_factory=dict)
    has_tools: bool = True
    name = "harmony"
    markers = _ALL
    reasoning_markers = _ALL
    ends = (RETURN, CALL)
    has_reasoning = True
    reasoning_start = f"{CHANNEL}analysis{MESSAGE}"
    reasoning_end = f"{END}{START}assistant{CHANNEL}final{MESSAGE}"

    def thinking(self, tail: str) -> Thinking:
        header, message, _ = tail.rpartition(START)[2].partition(MESSAGE)
        if not message:
            return "may"
        return "open" if _channel_of(header) == "analysis" else "off"

    def scanner(self, tail: str, tools: Sequence[Tool]) -> Scanner:
        begun = tail.rpartition(START)[2].removeprefix("assistant")
        return StreamScanner(_Answer(self.has_tools and bool(tools)).run, begun)

    def form_grammar(self, grammar: Grammar, tail: str, *, budget: int | None = None) -> Grammar:
        if self.thinking(tail) != "may":
            return grammar
        rules = Rules(self.tokens)
        head = f"{_others(rules, budget)} {rules.literal(f'{CHANNEL}final{MESSAGE}')}"
        return Grammar("lark", f"{rules.written(f'{head} form')}\nform: {nested(grammar)}")

    def budget_grammar(self, tail: str, budget: int) -> str | None:
        thinking = self.thinking(tail)
        if thinking == "off" or END not in self.tokens:
            return None
        thoughts = Thoughts(self.reasoning_start, END, thinking == "open", budget)
        return budget_grammar(thoughts, _ALL, self.tokens)

    def tool_grammar(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice,
        *,
        parallel: bool = True,
        thinking: Thinking = "off",
        budget: int | None = None,
        held: bool = False,
    ) -> str | None:
        allowed = choice.of(tools)
        is_free = not held and not any(map(is_strict, allowed)) and len(allowed) == len(tools)
        if choice.mode == "none" or (choice.mode == "auto" and is_free):
            return None
        rules = Rules(self.tokens)
        one = one_of(HarmonyCalls(), allowed, rules, lax=choice.mode == "auto" and not held)
        answer = f"{rules.literal(f'{CHANNEL}final{MESSAGE}')} {rules.text(_ALL)}"
        last = f"({one} | {answer})" if choice.mode == "auto" else one
        return rules.written(f"{_others(rules, budget)} {last}")


def _others(rules: Rules, budget: int | None) -> str:
    """Messages before the last: thoughts, of so many tokens each, and what is said in between."""
    thoughts = f"{rules.literal(f'{CHANNEL}analysis{MESSAGE}')} {rules.text_until(END, budget=budget)}"
    said = f"{rules.literal(f'{CHANNEL}commentary{MESSAGE}')} {rules.text(_ALL)} {rules.literal(END)}"
    return f"(({thoughts} | {said}) {rules.literal(f'{START}assistant')})*"


class _Answer:
    """The program that reads one answer."""

    def __init__(self, has_tools: bool) -> None:
        self._has_tools = has_tools

    def run(self, reader: Reader, sink: Sink) -> Steps[None]:
        while (yield from reader.peek()):
            yield from reader.skip_space()
            opening = yield from reader.accept_any((START, CHANNEL, MESSAGE, CONSTRAIN, "to="))
            header = [opening]
            if opening and opening != MESSAGE:
                mark = yield from reader.until(_HEADER, header.append)
                if mark != MESSAGE:
                    continue
            yield from self._read_body(reader, sink, "".join(header))

    def _read_body(self, reader: Reader, sink: Sink, header: str) -> Steps[None]:
        recipient = _RECIPIENT.search(header)
        channel = _channel_of(header)
        if recipient is not None and recipient[1].startswith(_FUNCTIONS) and self._has_tools:
            yield from _read_call(reader, sink, recipient[1].removeprefix(_FUNCTIONS))
        elif recipient is None and channel == "analysis":
            sink.begin_reasoning()
            if (yield from reader.until(_BODY, sink.thought, keep=True)) is not None:
                sink.end_reasoning()
        elif recipient is None and channel in ("final", "commentary", ""):
            sink.begin_message()
            yield from reader.until(_BODY, sink.text, keep=True)
        else:  # for tools that are not here
            yield from reader.until(_BODY, ignore, keep=True)
        yield from reader.accept_any((END, CALL, RETURN))


def _read_call(reader: Reader, sink: Sink, name: str) -> Steps[None]:
    sink.begin_call()
    sink.call(name)
    yield from reader.skip_space()
    is_whole = yield from read_arguments(reader, sink.arguments, _ENDS)
    if is_whole or not reader.ended:
        sink.close_arguments()
    yield from reader.until(_BODY, ignore, keep=True)
    sink.end_call()


def _channel_of(header: str) -> str:
    found = _CHANNEL_NAME.search(header)
    return "" if found is None else found[1]


class HarmonyCalls(Marked):
    """A call's message, for grammars. The answer ends with it, so there is one."""

    opens = (CHANNEL,)
    closes = (CALL,)
    wrapping = Wrapping()

    def read(self, reader: Reader, sink: Sink, tools: Tools, marker: str) -> Steps[None]:
        yield from ()

    def call_rule(self, tool: Tool, schema: Mapping[str, Any], rules: Rules) -> str:
        head = f"{CHANNEL}commentary to={_FUNCTIONS}{tool['function']['name']} {CONSTRAIN}json{MESSAGE}"
        return f"{rules.literal(head)} {rules.json(schema)} {rules.literal(CALL)}"
