"""Pieces of Lark for llguidance: rules with unique names, markers as tokens or as text, JSON as models write it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sensorium.prompt.formats.typed import MAX_REFERENCES, referred

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_SPACING = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False, "coerce_one_of": True}
"""Arguments on one line, with a space after a comma and a colon or without: models were trained with either."""
_ANY = r"(.|\n)*"


class Rules:
    """A grammar that is being written. `tokens`: markers that no text can spell, with their ids."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._split = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
        self._bodies: dict[str, str] = {}  # name with attributes -> body
        self._names: dict[str, str] = {}  # body -> name

    def add(self, name: str, body: str, attributes: str = "") -> str:
        """A rule; its name, made unique. A terminal is written in capitals."""
        key = f"{name.isupper()}{attributes}{body}"
        if key not in self._names:
            unique = f"{name}_{len(self._names)}"
            self._names[key] = unique
            self._bodies[unique + attributes] = body
        return self._names[key]

    def literal(self, text: str) -> str:
        """A text; markers that are tokens stand as tokens."""
        pieces: list[str] = []
        at = 0
        for found in self._split.finditer(text):
            pieces += [_quoted(text[at : found.start()])] if found.start() > at else []
            pieces.append(f"<[{self._tokens[found.group()]}]>")
            at = found.end()
        pieces += [_quoted(text[at:])] if at < len(text) else []
        return " ".join(pieces) or '""'

    def json(self, schema: Mapping[str, Any]) -> str:
        return f"%json {json.dumps({**schema, 'x-guidance': _SPACING})}"

    def text(self, without: Iterable[str] = ()) -> str:
        """Any text that has none of these in it."""
        spelled = [_pattern(text) for text in without if text and text not in self._tokens]
        pattern = f"/{_ANY}/" if not spelled else f"/{_ANY}/ & ~/{_ANY}({'|'.join(spelled)}){_ANY}/"
        return self.add("TEXT", pattern)

    def text_until(self, end: str, without: Iterable[str] = (), budget: int | None = None) -> str:
        """Any text up to this end, and the end. `budget`: most tokens of it. Where the end is no token, a text with a
        budget has none of the end's first letter in it: only so is it over when it must be."""
        text = self.text(one for one in without if one not in end)
        token = self._split.search(end)
        if token is not None:  # it ends the text, with whatever stands before it
            if budget is not None:
                text = self.add("bounded", text, f"[max_tokens={budget}]") if budget else ""
            return f"{text} {self.literal(end[token.start() :])}"
        if budget is None:
            return self.add("until", text, f"[suffix={_quoted(end)}]")
        text = self.add("TEXT", f"/[^{_pattern(end[0])}]*/")
        return f"{self.add('bounded', text, f'[max_tokens={budget}]') if budget else ''} {self.literal(end)}"

    def chain(self, items: Sequence[tuple[str, bool]], separator: str) -> str:
        """These in order, with a separator between two; those that are not required may be missing."""
        rest = '""'
        first = '""'
        for body, required in reversed(items):
            item = self.add("item", body)
            after = rest
            rest = self.add("rest", f"{separator} {item} {after}" + ("" if required else f" | {after}"))
            first = self.add("first", f"{item} {after}" + ("" if required else f" | {first}"))
        return first

    def written(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in self._bodies.items())])


def members_of(schema: Mapping[str, Any]) -> list[tuple[str, object, bool]] | None:
    """A schema's properties: name, schema, whether it is required. None where it allows any."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return [] if schema.get("additionalProperties") is False else None
    required = schema.get("required")
    needed = set(required) if isinstance(required, list) else set()
    return [(str(name), value, name in needed) for name, value in properties.items()]


def within(schema: object, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of a schema as one of its own, with the definitions that it may refer to."""
    own = dict(schema) if isinstance(schema, Mapping) else {}
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return {**definitions, **own}


def words_of(schema: object) -> list[str] | None:
    """The strings that a schema lists, if it lists strings."""
    if not isinstance(schema, Mapping):
        return None
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed):
        return listed
    return None


def resolved(schema: object, root: Mapping[str, Any]) -> object:
    """A schema, or the one that it refers to."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(reference := schema.get("$ref"), str):
            break
        schema = referred(reference, root)
    return schema


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    """A regular expression of Lark that matches this text."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/])", r"\\\1", text).replace("\n", "\\n")
