"""What an answer has that its JSON schema does not say, and the other way round: as much of it as pydantic uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def problems(value: Any, schema: Mapping[str, Any], schemas: Mapping[str, Any], place: str = "answer") -> list[str]:
    """One line for each. Fields that the schema does not name are a problem, unless it allows them by name."""
    return list(_problems(value, schema, schemas, place))


def _problems(value: Any, schema: Mapping[str, Any], schemas: Mapping[str, Any], place: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _problems(value, schemas[schema["$ref"].rpartition("/")[2]], schemas, place)
    elif "anyOf" in schema:
        found = [problems(value, one, schemas, place) for one in schema["anyOf"]]
        if all(found):
            yield min(found, key=len)[0]
    elif "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        if value not in allowed:
            yield f"{place} is {value!r}, not one of {allowed}"
    elif "type" in schema:
        yield from _of_type(value, schema, schemas, place)


def _of_type(value: Any, schema: Mapping[str, Any], schemas: Mapping[str, Any], place: str) -> Iterator[str]:
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{place} is {value!r}, not of type {kind}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, schema.get("items", {}), schemas, f"{place}[{index}]")
    elif isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", False)
        yield from (f"{place}.{name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            if name in properties:
                yield from _problems(item, properties[name], schemas, f"{place}.{name}")
            elif more is False:
                yield f"{place}.{name} is not described"
            elif more is not True:
                yield from _problems(item, more, schemas, f"{place}.{name}")
