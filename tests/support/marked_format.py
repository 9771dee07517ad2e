"""A model's format with markers of one character, so that a test can say what a model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text, Thinking, Tool, ToolChoice
from sensorium.types import Grammar

THINK, ANSWER, CALL, WITH, END = "\x01\x02\x03\x04\x05"
"""Thoughts begin; text begins; a call's name begins; its arguments; the call ends."""


def marked(deltas: Sequence[Delta]) -> str:
    """What a model writes that is read as these."""
    text = ""
    for delta in deltas:
        match delta:
            case Text(words):
                text += ANSWER + words
            case Reasoning(words):
                text += THINK + words
            case Call(_, name):
                text += CALL + name
            case Arguments(_, words):
                text += WITH + words + END
    return text


class MarkedScanner:
    def __init__(self) -> None:
        self._state = ANSWER
        self._name = ""
        self._calls = 0

    def push(self, text: str) -> list[Delta]:
        found: list[Delta] = []
        for letter in text:
            if letter == WITH and self._state == CALL:
                found.append(Call(self._calls, self._name))
                self._calls += 1
            if letter in (THINK, ANSWER, CALL, WITH):
                self._state, self._name = letter, ""
            elif letter == END:
                self._state = ANSWER
            elif self._state == CALL:
                self._name += letter
            elif self._state == WITH:
                found.append(Arguments(self._calls - 1, letter))
            else:
                found.append(Text(letter) if self._state == ANSWER else Reasoning(letter))
        return found

    def finish(self, *, complete: bool) -> list[Delta]:
        return []

    @property
    def in_call(self) -> bool:
        return self._state in (CALL, WITH)

    @property
    def in_reasoning(self) -> bool:
        return self._state == THINK


class MarkedFormat:
    """As an OutputFormat. `choices` keeps what was to be called, `budgets` how long it may think."""

    name = "marked"
    markers: tuple[str, ...] = ()
    reasoning_markers: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    has_tools = True
    has_reasoning = True
    reasoning_start = THINK
    reasoning_end = ANSWER

    def __init__(self) -> None:
        self.choices: list[tuple[ToolChoice, bool]] = []
        self.budgets: list[int | None] = []

    def thinking(self, tail: str) -> Thinking:
        return "may"

    def scanner(self, tail: str, tools: Sequence[Tool]) -> Any:
        return MarkedScanner()

    def tool_grammar(self, tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool, **options: Any) -> str | None:
        self.choices.append((choice, parallel))
        self.budgets.append(options.get("budget"))
        return None

    def form_grammar(self, form: Grammar, tail: str, **options: Any) -> Grammar:
        return form

    def budget_grammar(self, tail: str, budget: int) -> str | None:
        self.budgets.append(budget)
        return None
