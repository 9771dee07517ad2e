"""JSON schemas of requests, made ready to be compiled: what cannot be held to is refused by name, never left out.

What says nothing about the form (titles, defaults, unknown formats) is dropped. Where a model easily gets lost, less is
allowed than the schema would: numbers without bounds get some, what may be anything becomes typed alternatives, and
objects that name their properties have no others unless `additionalProperties` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 32  # of schemas inside schemas
LARGEST_NUMBER = 10**18
ANY = "any-json-value"
"""Name of the definition of a value that may be anything."""
FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
TYPES = frozenset("string number integer boolean null array object".split())
UNSUPPORTED = frozenset(
    """not contains minContains maxContains if then else dependentSchemas dependentRequired dependencies
    unevaluatedItems unevaluatedProperties propertyNames $dynamicRef $recursiveRef""".split()
)
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
SINGLES = ("items", "additionalProperties", "additionalItems")
_DEFINITION = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")
COMBINING = frozenset({"$ref", "anyOf", "oneOf", "properties"})
COUNTS = frozenset("minProperties maxProperties minItems maxItems minLength maxLength".split())
PLAIN = COUNTS | frozenset(
    """type enum const required pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf $ref
    $schema""".split()
)
"""Keywords that are taken as they are."""


class SchemaRefused(Exception):
    """`path` is where in the schema, from its root: "" or ".properties.name"; `reason` completes a sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path[:200]
        self.reason = reason


def ready(schema: Any, *, closed: bool = False, loose: bool = False) -> dict[str, Any]:
    """The schema as it is to be compiled. `closed`: no object has other properties than those named. `loose`: what may
    be anything stays as it is, for schemas that the typed alternatives cannot be intersected with: they refer to
    themselves.

    SchemaRefused if it is no schema, or one that cannot be held to. It must be plain JSON.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise SchemaRefused("", "must be a JSON schema, an object")
    made = _Ready(schema, closed, narrows=not _composes(schema), loose=loose).object(schema, "", 0)
    if not loose:
        definitions = made.get("$defs")
        made["$defs"] = {**(definitions if isinstance(definitions, dict) else {}), ANY: _anything()}
    return made


def _anything() -> dict[str, Any]:
    """Every JSON value, with numbers of sensible size."""
    again = {"$ref": f"#/$defs/{ANY}"}
    return {
        "anyOf": [
            {"type": "object", "additionalProperties": again},
            {"type": "array", "items": again},
            {"type": "string"},
            _bounded({"type": "number"}),
            {"type": ["boolean", "null"]},
        ]
    }


class _Ready:
    def __init__(self, root: Mapping[str, Any], closed: bool, *, narrows: bool, loose: bool) -> None:
        """`narrows`: every object is described in one place, and can be closed where that is."""
        self._root = root
        self._closed = closed
        self._narrows = narrows
        self._loose = loose

    def schema(self, schema: Any, path: str, depth: int) -> dict[str, Any] | bool:
        """One schema and all inside it."""
        if depth > MAX_DEPTH:
            raise SchemaRefused(path, f"is nested more than {MAX_DEPTH} schemas deep")
        if schema is False:
            return False
        if schema is True:
            return True if self._loose else {"$ref": f"#/$defs/{ANY}"}
        if not isinstance(schema, Mapping):
            raise SchemaRefused(path, "must be a JSON schema, an object")
        made = self.object(schema, path, depth)
        # The library knows that nothing fits `false`, but not what refers to it.
        return False if self._fits_nothing(made.get("$ref")) else made

    def _fits_nothing(self, reference: Any) -> bool:
        """Whether it leads to `false` or to an empty `enum`, by one definition or several."""
        for _ in range(MAX_DEPTH):
            place = _DEFINITION.fullmatch(reference) if isinstance(reference, str) else None
            definitions = self._root.get(place[1]) if place else None
            if place is None or not isinstance(definitions, Mapping):
                return False
            found = definitions.get(place[2])
            if found is False or (isinstance(found, Mapping) and found.get("enum") == []):
                return True
            reference = found.get("$ref") if isinstance(found, Mapping) else None
        return False

    def object(self, schema: Mapping[str, Any], path: str, depth: int) -> dict[str, Any]:
        _check(schema, path)
        base = schema.get("$id", "#") if depth else "#"
        if not str(base).startswith("#") and _refers(schema):
            raise SchemaRefused(
                f"{path}.$id", "is a base for the references inside it: they are followed from the root only"
            )
        made: dict[str, Any] = {}
        for key, value in schema.items():
            if key in MAPS:
                made[key] = dict(self._map(value, f"{path}.{key}", depth))
            elif key in LISTS or (key == "items" and isinstance(value, list)):
                made[key] = list(self._list(value, f"{path}.{key}", depth))
            elif key in SINGLES:
                made[key] = self.schema(value, f"{path}.{key}", depth + 1)
            elif key in COUNTS and isinstance(value, float) and value.is_integer():
                made[key] = int(value)  # 2.0 is the same number, which the library takes for another
            elif key in PLAIN or (isinstance(value, dict) and key not in ("x-guidance", "default", "discriminator")):
                made[key] = value  # a reference may lead into an object that is no keyword
        return self._finished(made, path, depth)

    def _map(self, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, Mapping):
            raise SchemaRefused(path, "must be an object")
        for name, inner in value.items():
            yield name, self.schema(inner, f"{path}.{name}", depth + 1)

    def _list(self, value: Any, path: str, depth: int) -> Iterator[Any]:
        if not isinstance(value, list):
            raise SchemaRefused(path, "must be an array")
        for place, inner in enumerate(value):
            yield self.schema(inner, f"{path}[{place}]", depth + 1)

    def _finished(self, made: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        if made.get("format") not in FORMATS:
            made.pop("format", None)
        if not self._loose:
            if depth and not made:
                return {"$ref": f"#/$defs/{ANY}"}
            if not depth and not made.keys() - {"$defs", "definitions", "$schema"}:
                made["$ref"] = f"#/$defs/{ANY}"
        types = made.get("type")
        if types == "object" or (isinstance(types, list) and "object" in types) or "properties" in made:
            if self._is_closed(made):
                made["additionalProperties"] = False
            elif types == "object" and made.keys() == {"type"} and not self._loose:
                made["additionalProperties"] = {"$ref": f"#/$defs/{ANY}"}
        if types == "array" and made.keys() == {"type"} and not self._loose:
            made["items"] = {"$ref": f"#/$defs/{ANY}"}
        if "oneOf" in made and "anyOf" not in made and _are_exclusive(made["oneOf"]):
            made["anyOf"] = made.pop("oneOf")
        return _bounded(made)

    def _is_closed(self, schema: dict[str, Any]) -> bool:
        if schema.keys() & {"additionalProperties", "patternProperties"}:
            return False
        if self._closed:
            return True
        named, required = schema.get("properties"), schema.get("required", [])
        if not self._narrows or not named or schema.keys() & {"minProperties", "maxProperties"}:
            return False
        return isinstance(required, list) and set(map(str, required)) <= set(named)


def _refers(schema: Any) -> bool:
    """Whether there is a reference in it."""
    stack = [schema]
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack.extend(one)
        elif isinstance(one, Mapping):
            if isinstance(one.get("$ref"), str):
                return True
            stack.extend(one.values())
    return False


def _composes(schema: Any) -> bool:
    """Whether anything is described by several schemas together, which must not be closed one by one."""
    stack = [schema]
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack.extend(one)
        elif isinstance(one, Mapping):
            parts = sum(
                len(value) if key == "allOf" and isinstance(value, list) else key in COMBINING
                for key, value in one.items()
            )
            if parts > 1:
                return True
            stack.extend(one.values())
    return False


def _check(schema: Mapping[str, Any], path: str) -> None:
    """What can be told of one schema without those inside it."""
    for key in schema:
        if not isinstance(key, str):
            raise SchemaRefused(path, "must have names as keys")
        if key in UNSUPPORTED:
            raise SchemaRefused(path, f"has the keyword `{key[:64]}`, which answers cannot be held to")
    if schema.get("uniqueItems") not in (None, False):
        raise SchemaRefused(path, "has the keyword `uniqueItems`, which answers cannot be held to")
    types = schema.get("type", [])
    for one in types if isinstance(types, list) else [types]:
        if not isinstance(one, str) or one not in TYPES:
            raise SchemaRefused(f"{path}.type", f"must be one of {', '.join(sorted(TYPES))}, or an array of them")
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        raise SchemaRefused(f"{path}.$ref", "must point into the schema itself: it begins with #")


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """With bounds for numbers where it sets none on a side."""
    types = schema.get("type")
    has_numbers = bool({"number", "integer"} & set(types if isinstance(types, list) else [types]))
    if not has_numbers or schema.keys() & {"enum", "const", "multipleOf", "$ref"}:
        return schema
    low = _number(schema, "minimum", "exclusiveMinimum")
    high = _number(schema, "maximum", "exclusiveMaximum")
    bounds = {}
    if low is None and (high is None or high > -LARGEST_NUMBER):
        bounds["minimum"] = -LARGEST_NUMBER
    if high is None and (low is None or low < LARGEST_NUMBER):
        bounds["maximum"] = LARGEST_NUMBER
    return schema | bounds


def _number(schema: Mapping[str, Any], *names: str) -> Any:
    """The first of these that there is: a number, or 0 for what is none, which the library refuses."""
    for name in names:
        if name in schema:
            value = schema[name]
            return value if isinstance(value, int | float) else 0
    return None


def _are_exclusive(alternatives: list[Any]) -> bool:
    """Whether no value fits two of them, as far as it shows: other types, or other constants of a property that all
    require. References are not followed."""
    seen: list[dict[str, Any]] = []
    for one in alternatives:
        if not isinstance(one, dict) or not all(_are_apart(one, other) for other in seen):
            return False
        seen.append(one)
    return True


def _are_apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    types, others = _types(one), _types(other)
    if types and others and types.isdisjoint(others):
        return True
    if types != {"object"} or others != {"object"}:
        return False
    for name in set(one.get("required", ())) & set(other.get("required", ())):
        values, other_values = (_constants(x.get("properties", {}).get(name)) for x in (one, other))
        if values and other_values and values.isdisjoint(other_values):
            return True
    return False


def _types(schema: dict[str, Any]) -> set[str]:
    types = schema.get("type", [])
    found = set(types) if isinstance(types, list) else {types}
    return found - {"integer"} | {"number"} if "integer" in found else found


def _constants(schema: Any) -> set[str]:
    """The strings that a property may be; empty if it may be others."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return set(values) if isinstance(values, list) and all(isinstance(x, str) for x in values) else set()
