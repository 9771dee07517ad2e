"""Grammars of values in other notations than JSON: Python's literals and Gemma's, by a tool's schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.prompt.formats.lark import Rules, members_of, resolved, within, words_of
from sensorium.prompt.formats.typed import types_of

MAX_DEPTH = 6  # of objects in objects whose members are spelled out
MAX_VALUES = 500  # of one tool; schemas that refer to themselves have any number
_NUMBERS = {"integer", "number"}
_NAME = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"


@dataclass(frozen=True, slots=True)
class Notation:
    """`text`: Lark of any string; `quoted`: Lark of these words as strings; `named`: what stands between an argument's
    name and its value; `member`: a key of an object with what stands behind it. Words are Lark."""

    text: Callable[[Rules], str]
    quoted: Callable[[Rules, str], str]
    named: str
    member: Callable[[Rules, str | None], str]
    separator: str
    truths: str
    nothing: str


def gemma_notation(quote: str) -> Notation:
    return Notation(
        text=lambda rules: f"{rules.literal(quote)} {rules.text_until(quote)}",
        quoted=lambda rules, word: rules.literal(f"{quote}{word}{quote}"),
        named=":",
        member=lambda rules, key: f'{rules.add("key", _NAME)} ":"' if key is None else rules.literal(f"{key}:"),
        separator=",",
        truths='"true" | "false"',
        nothing='"null"',
    )


def _python_word(rules: Rules, word: str) -> str:
    """A string in either kind of quotes."""
    return f"({rules.literal(json.dumps(word, ensure_ascii=False))} | {rules.literal(repr(word))})"


def _python_key(rules: Rules, key: str | None) -> str:
    return f'{rules.add("string", _PYTHON_TEXT) if key is None else _python_word(rules, key)} ": "'


_PYTHON_TEXT = r"""/"([^"\\\n]|\\[nrt"'\\])*"/ | /'([^'\\\n]|\\[nrt"'\\])*'/"""

PYTHON = Notation(
    text=lambda rules: rules.add("string", _PYTHON_TEXT),
    quoted=_python_word,
    named="=",
    member=_python_key,
    separator=", ",
    truths='"True" | "False"',
    nothing='"None"',
)


class NotationRules:
    """Rules for one tool's arguments."""

    def __init__(self, notation: Notation, rules: Rules, schema: Mapping[str, Any]) -> None:
        self._notation = notation
        self._rules = rules
        self._schema = schema
        self._left = MAX_VALUES

    def arguments(self) -> str:
        """The arguments, without what stands around them all."""
        rules, notation = self._rules, self._notation
        members = members_of(self._schema)
        if members is None:
            name = f"{rules.add('key', _NAME)} {rules.literal(notation.named)}"
            return self._some(f"{name} {self._anything(MAX_DEPTH)}")
        items = [
            (f"{rules.literal(f'{key}{notation.named}')} {self._value(value, MAX_DEPTH)}", needed)
            for key, value, needed in members
        ]
        return rules.chain(items, rules.literal(notation.separator))

    def _some(self, item: str) -> str:
        """None, one or several of these."""
        return f"({item} ({self._rules.literal(self._notation.separator)} {item})*)?"

    def _value(self, schema: object, depth: int) -> str:
        self._left -= 1
        schema = resolved(schema, self._schema)
        types = types_of(schema, self._schema)
        if not types or depth <= 0 or self._left < 0:
            return self._anything(depth)
        choices: list[str] = []
        if "string" in types:
            words = words_of(schema)
            quoted = [self._notation.quoted(self._rules, word) for word in words or ()]
            choices += quoted or [self._notation.text(self._rules)]
        if "object" in types:
            choices.append(self._object(schema, depth))
        if "array" in types:
            items = schema.get("items") if isinstance(schema, Mapping) else None
            choices.append(f'"[" {self._some(self._value(items, depth - 1))} "]"')
        if numbers := sorted(types & _NUMBERS):
            bounded = within(schema, self._schema) if types <= _NUMBERS else {"type": numbers}
            choices.append(self._rules.json(bounded))
        choices += [self._notation.truths] * ("boolean" in types) + [self._notation.nothing] * ("null" in types)
        return self._rules.add("value", " | ".join(choices))

    def _object(self, schema: object, depth: int) -> str:
        rules = self._rules
        members = members_of(schema) if isinstance(schema, Mapping) else None
        if members is None:
            return f'"{{" {self._some(f"{self._notation.member(rules, None)} {self._anything(depth - 1)}")} "}}"'
        items = [
            (f"{self._notation.member(rules, key)} {self._value(value, depth - 1)}", needed)
            for key, value, needed in members
        ]
        return f'"{{" {rules.chain(items, rules.literal(self._notation.separator))} "}}"'

    def _anything(self, depth: int) -> str:
        """A string, a number, a truth; where there is room, a list of these."""
        notation, rules = self._notation, self._rules
        plain = f"{notation.text(rules)} | {rules.json({'type': 'number'})} | {notation.truths} | {notation.nothing}"
        item = rules.add("plain", plain)
        return rules.add("any", f'{item} | "[" {self._some(item)} "]"') if depth > 0 else item
