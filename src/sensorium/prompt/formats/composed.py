"""A format made of a way of writing calls and one of writing reasoning, either of which may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sensorium.prompt.formats.base import Scanner, Thinking, Tool, ToolChoice
from sensorium.prompt.formats.grammar import Thoughts, after_reasoning, budget_grammar, choice_grammar
from sensorium.prompt.formats.reader import Marks, Reader, Steps
from sensorium.prompt.formats.sink import Sink
from sensorium.prompt.formats.stream import StreamScanner
from sensorium.prompt.formats.syntax import Syntax, Tools
from sensorium.types import Grammar


@dataclass(frozen=True, slots=True)
class Think:
    """What reasoning stands between. `is_sentence`: plain words, which count at the beginning of an answer only.
    `frame`: what content stands between, where the model marks it, too."""

    start: str
    end: str
    is_sentence: bool = False
    frame: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComposedFormat:
    """Implements `OutputFormat`. `tokens`: those of its markers that are special tokens, with their ids."""

    name: str
    syntax: Syntax | None = None
    think: Think | None = None
    ends: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_tools(self) -> bool:
        return self.syntax is not None

    @property
    def has_reasoning(self) -> bool:
        return self.think is not None

    @cached_property
    def markers(self) -> tuple[str, ...]:
        own = () if self.syntax is None else (*self.syntax.opens, *self.syntax.closes, *self.syntax.inner)
        return tuple(dict.fromkeys((*own, *self.reasoning_markers, *self.tokens)))

    @cached_property
    def reasoning_markers(self) -> tuple[str, ...]:
        if self.think is None:
            return ()
        own = (self.think.start.strip(), self.think.end, *self.think.frame)
        return (*own, *(token for token in self.tokens if any(token in mark for mark in own)))

    @property
    def reasoning_start(self) -> str:
        return "" if self.think is None else self.think.start

    @property
    def reasoning_end(self) -> str:
        return "" if self.think is None else self.think.end

    def thinking(self, tail: str) -> Thinking:
        if self.think is None:
            return "off"
        opened, closed = tail.rfind(self.think.start.strip()), tail.rfind(self.think.end)
        return "may" if opened == closed == -1 else "open" if opened > closed else "off"

    def scanner(self, tail: str, tools: Sequence[Tool]) -> Scanner:
        answer = _Answer(self.syntax if tools else None, self.think, Tools(tools))
        return StreamScanner(answer.reasoning_first if self.thinking(tail) == "open" else answer.run)

    def form_grammar(self, grammar: Grammar, tail: str, *, budget: int | None = None) -> Grammar:
        thoughts = self._thoughts(self.thinking(tail), budget)
        return grammar if thoughts is None else after_reasoning(grammar, thoughts, self.tokens)

    def budget_grammar(self, tail: str, budget: int) -> str | None:
        thoughts = self._thoughts(self.thinking(tail), budget)
        return None if thoughts is None else budget_grammar(thoughts, self.markers, self.tokens)

    def _thoughts(self, thinking: Thinking, budget: int | None) -> Thoughts | None:
        if self.think is None or thinking == "off":
            return None
        bound = None if self.think.is_sentence else budget
        return Thoughts(self.think.start, self.think.end, thinking == "open", bound, "".join(self.think.frame[:1]))

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
        if self.syntax is None:
            return None
        thoughts = self._thoughts(thinking, budget)
        return choice_grammar(
            self.syntax, tools, choice, parallel=parallel, thoughts=thoughts, tokens=self.tokens, held=held
        )


class _Answer:
    """The program that reads one answer."""

    def __init__(self, syntax: Syntax | None, think: Think | None, tools: Tools) -> None:
        self._syntax = syntax
        self._think = think
        self._tools = tools
        self._opens = () if syntax is None else syntax.opens
        closes = () if syntax is None else syntax.closes
        tags = () if think is None or think.is_sentence else (think.start, think.end, *think.frame)
        self._in_content = Marks((*self._opens, *closes, *tags))
        self._in_thoughts = Marks((*self._opens, *(() if think is None else (think.end,))))

    def reasoning_first(self, reader: Reader, sink: Sink) -> Steps[None]:
        sink.begin_reasoning()
        yield from self.run(reader, sink)

    def run(self, reader: Reader, sink: Sink) -> Steps[None]:
        yield
        is_start = True
        while True:
            if sink.in_reasoning:
                mark = yield from reader.until(self._in_thoughts, sink.thought)
                if mark is not None:
                    sink.end_reasoning()
                is_start = True
            else:
                if is_start and (yield from self._read_start(reader, sink)):
                    is_start = False
                    continue
                is_start = False
                mark = yield from reader.until(self._in_content, sink.text)
            if mark is None:
                return
            yield from self._read_mark(reader, sink, mark)

    def _read_start(self, reader: Reader, sink: Sink) -> Steps[bool]:
        """What only counts at the beginning of content."""
        if self._syntax is not None and (yield from self._syntax.read_unmarked(reader, sink, self._tools)):
            sink.end_call()
            return True
        if self._think is None or not self._think.is_sentence or not (yield from reader.accept(self._think.start)):
            return False
        sink.begin_reasoning()
        return True

    def _read_mark(self, reader: Reader, sink: Sink, mark: str) -> Steps[None]:
        if self._think is not None and mark == self._think.start:
            sink.begin_reasoning()
        elif self._think is not None and mark in self._think.frame:
            sink.begin_message()
        elif self._syntax is not None and mark in self._opens:
            sink.begin_call()
            yield from self._syntax.read(reader, sink, self._tools, mark)
            sink.end_call()
        else:
            sink.end_alone()
