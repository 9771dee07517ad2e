"""Raw values of XML-like calls -> JSON, by the type that a tool's schema gives them."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

MAX_REFERENCES = 8  # `$ref` after `$ref`
MAX_BRANCHES = 64  # of a union, and of unions in it
_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
_TYPES = ("null", "integer", "number", "boolean", "object", "array", "string")
_TRUTH = {"true": "true", "1": "true", "false": "false", "0": "false"}


def escaped(text: str) -> str:
    """Text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def types_of(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """JSON types that a schema allows; none where it does not say. Looks at a bounded number of its branches."""
    found: set[str] = set()
    waiting = deque([schema])
    for _ in range(MAX_BRANCHES):
        if not waiting:
            break
        branch = waiting.popleft()
        if not isinstance(branch, Mapping):
            continue
        if isinstance(reference := branch.get("$ref"), str):
            waiting.append(referred(reference, root))
        elif (own := _own_types(branch)) is not None:
            found |= own
        else:
            waiting.extend(_branches(branch))
    return frozenset(found)


def _own_types(schema: Mapping[str, Any]) -> set[str] | None:
    """What a schema says itself, without its branches; None if it says nothing."""
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
    if values is None and "const" in schema:
        values = [schema["const"]]
    return None if values is None else set(map(_type_of_value, values))


def referred(reference: str, root: Mapping[str, Any]) -> object:
    """What a reference within the schema (`#/$defs/Unit`) names; None if there is nothing."""
    found: object = root
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


def property_schema(schema: Mapping[str, Any], name: str) -> object:
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, Mapping) else None


def typed(raw: str, types: frozenset[str]) -> str:
    """JSON text of a raw value. Of several types the first that fits, the narrowest first; text that fits none is a
    string. Without a type, JSON is what it says and anything else a string."""
    if not types:
        return _json_or_none(raw) or json.dumps(raw, ensure_ascii=False)
    for name in _TYPES:
        if name in types and (found := _of_type(raw, name)) is not None:
            return found
    return json.dumps(raw, ensure_ascii=False)


def _of_type(raw: str, name: str) -> str | None:
    text = raw.strip()
    match name:
        case "null":
            return "null" if text.lower() in ("null", "none") else None
        case "integer":
            return str(int(text.partition(".")[0])) if _INTEGER.fullmatch(text) else None
        case "number":
            return _number(text)
        case "boolean":
            return _TRUTH.get(text.lower())
        case "object" | "array":
            found = _json_or_none(text)
            return found if found is not None and found[0] == ("{" if name == "object" else "[") else None
    return json.dumps(raw, ensure_ascii=False)


def _number(text: str) -> str | None:
    if not _NUMBER.fullmatch(text) or not math.isfinite(value := float(text)):
        return None
    return _json_or_none(text) or json.dumps(value)


def _json_or_none(text: str) -> str | None:
    """The text if it is JSON of finite values."""
    text = text.strip()
    try:
        json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return text


def _refuse(name: str) -> None:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _type_of_value(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case dict():
            return "object"
    return "array"


def _branches(schema: Mapping[str, Any]) -> Iterator[object]:
    for key in ("anyOf", "oneOf", "allOf"):
        found = schema.get(key)
        if isinstance(found, list):
            yield from found
