"""Which part of a JSON schema keeps it from being compiled, so that its author knows what to change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sensorium.prompt.schema import LISTS, MAPS, SINGLES

Schema = Mapping[str, Any]
MANY_OPTIONAL = 500
"""Properties of one object that may be left out from which it is told: what is compiled grows with their square."""
MANY_PATTERNS = 50  # the same of `patternProperties`, which are compared with one another
_DEFINITIONS = ("$defs", "definitions")
_NAMED = (
    "pattern format minLength maxLength multipleOf minimum maximum exclusiveMinimum exclusiveMaximum minItems maxItems "
    "prefixItems minProperties maxProperties patternProperties enum allOf anyOf oneOf items"
).split()


class Fault(NamedTuple):
    """`path` of a schema inside the whole, such as ".properties.name"; `keywords`: without any one of them it would not
    be refused for this reason."""

    path: str
    keywords: tuple[str, ...]


def fault_of(schema: Schema, fails: Callable[[Schema], bool], has_time: Callable[[], bool]) -> Fault:
    """The deepest part that fails alone, and what of it does. `fails` tells whether a schema is refused for the reason
    that is looked for; nothing more is tried when `has_time` says no."""
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    path, found = "", schema
    while (inner := _failing(found, definitions, fails, has_time)) is not None:
        path, found = path + inner[0], inner[1]
    keywords = tuple(
        key
        for key in _NAMED
        if key in found
        and has_time()
        and not fails({**definitions, **{name: value for name, value in found.items() if name != key}})
    )
    return Fault(path, keywords)


def _failing(
    schema: Schema, definitions: Schema, fails: Callable[[Schema], bool], has_time: Callable[[], bool]
) -> tuple[str, Schema] | None:
    for path, inner in _inside(schema):
        if not has_time():
            return None
        if fails({**definitions, **inner}):
            return path, inner
    return None


def _inside(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for key, value in schema.items():
        if key in MAPS and isinstance(value, Mapping):
            yield from ((f".{key}.{name}", one) for name, one in value.items() if isinstance(one, Mapping))
        elif key in (*LISTS, "items") and isinstance(value, list):
            yield from ((f".{key}[{place}]", one) for place, one in enumerate(value) if isinstance(one, Mapping))
        elif key in SINGLES and isinstance(value, Mapping):
            yield f".{key}", value


def costly_part(source: str) -> str:
    """A sentence about the part of a schema, as JSON text, that is known to take long, or "". For one that nobody could
    compile: it is only looked at."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        return ""
    worst, said = 1.0, ""
    stack: list[tuple[str, Any]] = [("", schema)]
    while stack:
        path, one = stack.pop()
        if not isinstance(one, Mapping):
            continue
        stack.extend(_inside(one))
        named, patterns, required = (one.get(key) for key in ("properties", "patternProperties", "required"))
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        optional = len(named.keys() - needed) if isinstance(named, Mapping) else 0
        for count, many, what in (
            (
                optional,
                MANY_OPTIONAL,
                "properties that may be left out: list them in `required`, or in smaller objects",
            ),
            (len(patterns) if isinstance(patterns, Mapping) else 0, MANY_PATTERNS, "`patternProperties`: use fewer"),
        ):
            if count / many >= worst:
                worst, said = count / many, f"{f'`{path[1:]}`' if path else 'its root'} has {count} {what}"
    return said
