"""Structural tags: free text with tags whose insides have a form, in vLLM's two spellings, as a Lark grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sensorium.prompt.forms import WHITESPACE
from sensorium.prompt.schema import SchemaRefused, ready

MAX_PARTS = 512
MAX_DEPTH = 16
TEXT = "TEXT: /(.|\\n)*/"


def structural_grammar(tree: Any) -> str:
    """Lark of {"structures", "triggers"} or {"format"}. SchemaRefused says what is wrong, and where."""
    grammar = _Grammar()
    if not isinstance(tree, Mapping):
        raise SchemaRefused("", "must be an object")
    body = grammar.older(tree) if "structures" in tree else grammar.part(_object(tree, "format", ""), ".format", 0)
    return "\n".join([f"start: {body}", *grammar.rules, TEXT, ""])


class _Grammar:
    def __init__(self) -> None:
        self.rules: list[str] = []

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a new rule."""
        if len(self.rules) >= MAX_PARTS:
            raise SchemaRefused("", f"must have at most {MAX_PARTS} parts")
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def older(self, tree: Mapping[str, Any]) -> str:
        """Any text, where each trigger begins one of the structures."""
        tags = []
        for place, one in enumerate(_array(tree, "structures", "")):
            path = f".structures[{place}]"
            schema = {"type": "json_schema", "json_schema": _object(one, "schema", path)}
            tags.append({"begin": one.get("begin"), "content": schema, "end": one.get("end")})
        return self.triggered({"tags": tags, "triggers": tree.get("triggers")}, "", 0)

    def part(self, node: Mapping[str, Any], path: str, depth: int) -> str:
        """What a node of the tree stands for, in a form that can be a piece of a rule."""
        if depth > MAX_DEPTH:
            raise SchemaRefused(path, f"is nested more than {MAX_DEPTH} parts deep")
        kind = node.get("type")
        if kind == "const_string":
            return json.dumps(_string(node, "value", path), ensure_ascii=False)
        if kind == "json_schema":
            return self.rule(_json(_object(node, "json_schema", path), f"{path}.json_schema"))
        if kind == "any_text":
            return "TEXT"
        if kind == "sequence":
            return self.rule(" ".join(self._parts(node, "elements", path, depth)))
        if kind == "or":
            return self.rule(" | ".join(self._parts(node, "elements", path, depth)))
        if kind == "tag":
            return self.tag(node, path, depth, "")
        if kind == "triggered_tags":
            return self.triggered(node, path, depth)
        if kind == "tags_with_separator":
            return self.separated(node, path, depth)
        raise SchemaRefused(
            f"{path}.type",
            "must be const_string, json_schema, any_text, sequence, or, tag, triggered_tags or tags_with_separator",
        )

    def _parts(self, node: Mapping[str, Any], name: str, path: str, depth: int) -> list[str]:
        found = [
            self.part(_of(one, f"{path}.{name}[{place}]"), f"{path}.{name}[{place}]", depth + 1)
            for place, one in enumerate(_array(node, name, path))
        ]
        if not found:
            raise SchemaRefused(f"{path}.{name}", "must not be empty")
        return found

    def tag(self, node: Mapping[str, Any], path: str, depth: int, begun: str) -> str:
        """A tag of whose beginning `begun` stands there already."""
        begin, end = _string(node, "begin", path)[len(begun) :], _string(node, "end", path)
        content = _object(node, "content", path)
        head = json.dumps(begin, ensure_ascii=False) if begin else ""
        if content.get("type") == "any_text" and end:
            quoted = json.dumps(end, ensure_ascii=False)
            return self.rule(f"{head} {self.rule('TEXT', f'[suffix={quoted}]')}".strip())
        inside = self.part(content, f"{path}.content", depth + 1)
        return self.rule(f"{head} {inside} {json.dumps(end, ensure_ascii=False) if end else ''}".strip())

    def triggered(self, node: Mapping[str, Any], path: str, depth: int) -> str:
        """Free text in which a trigger, once written, begins one of the tags."""
        triggers = [one for one in _array(node, "triggers", path) if isinstance(one, str) and one]
        calls = []
        for place, one in enumerate(_array(node, "tags", path)):
            where = f"{path}.tags[{place}]"
            begin = _string(_of(one, where), "begin", where)
            trigger = max((t for t in triggers if begin.startswith(t)), key=len, default=None)
            if trigger is None:
                raise SchemaRefused(f"{where}.begin", "must begin with one of the triggers")
            before = self.rule(f"TEXT {json.dumps(trigger, ensure_ascii=False)}", "[lazy]")
            calls.append(f"{before} {self.tag(one, where, depth, trigger)}")
        if not calls:
            raise SchemaRefused(f"{path}.tags", "must not be empty")
        call = self.rule(" | ".join(calls))
        if node.get("stop_after_first"):
            return call if node.get("at_least_one") else self.rule(f"{call} | TEXT")
        return self.rule(f"{call}{'+' if node.get('at_least_one') else '*'} TEXT")

    def separated(self, node: Mapping[str, Any], path: str, depth: int) -> str:
        """Tags with nothing but a separator between them."""
        tags = [
            self.tag(_of(one, f"{path}.tags[{place}]"), f"{path}.tags[{place}]", depth, "")
            for place, one in enumerate(_array(node, "tags", path))
        ]
        if not tags:
            raise SchemaRefused(f"{path}.tags", "must not be empty")
        one = self.rule(" | ".join(tags))
        separator = _string(node, "separator", path)
        more = f" ({json.dumps(separator, ensure_ascii=False)} {one})*" if separator else f" {one}*"
        whole = self.rule(one if node.get("stop_after_first") else one + more)
        return whole if node.get("at_least_one") else f"{whole}?"


def _json(schema: Mapping[str, Any], path: str) -> str:
    try:
        made = ready(schema)
    except SchemaRefused as error:
        raise SchemaRefused(path + error.path, error.reason) from None
    return f"%json {json.dumps({**made, 'x-guidance': {'whitespace_pattern': WHITESPACE}}, ensure_ascii=False)}"


def _of(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SchemaRefused(path, "must be an object")
    return value


def _object(node: Any, name: str, path: str) -> Mapping[str, Any]:
    return _of(_of(node, path).get(name), f"{path}.{name}")


def _array(node: Mapping[str, Any], name: str, path: str) -> list[Any]:
    value = node.get(name)
    if not isinstance(value, list):
        raise SchemaRefused(f"{path}.{name}", "must be an array")
    return value


def _string(node: Mapping[str, Any], name: str, path: str) -> str:
    value = node.get(name)
    if not isinstance(value, str):
        raise SchemaRefused(f"{path}.{name}", "must be a string")
    return value
