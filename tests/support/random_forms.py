"""Random JSON schemas and regular expressions, and whether a JSON value fits a schema: for answers under a grammar."""

from __future__ import annotations

import math
import re
from random import Random
from typing import Any

FORMATS = {
    "date": r"\d{4}-\d\d-\d\d",
    "ipv4": r"(\d{1,3}\.){3}\d{1,3}",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "phone": r"(.|\n)*",  # unknown: it says nothing
}
PATTERNS = ["^[a-c]+$", "[0-9]{2}", "^(x|yz)*$", "a.b", "^\\w{2,4}-\\d$", "ü|é"]
NAMES = ["a", "b", "name", "größe", 'q"', "x y"]


def schema(random: Random, depth: int = 3) -> dict[str, Any]:
    """One of the kinds that a client may send; most can be fulfilled."""
    kinds = [scalar, scalar, text, number]
    if depth:
        kinds += [array, array, record, record, record, choice]
    made = random.choice(kinds)(random, depth)
    if random.random() < 0.2:
        made |= {"title": "T", "description": "d", "default": None, "x-order": 1}
    return made


def scalar(random: Random, depth: int) -> dict[str, Any]:
    return random.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": random.sample(["string", "null", "boolean", "integer"], 2)},
            {"enum": random.sample(["red", 'a "b"', 1, -2.5, None, True, [1], {"k": "v"}], random.randint(1, 4))},
            {"const": random.choice(["x", 7, False, {"a": [1, "b"]}])},
            {},
        ]
    )


def text(random: Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    kind = random.randrange(4)
    if kind == 0:
        made["pattern"] = random.choice(PATTERNS)
    elif kind == 1:
        made["format"] = random.choice(list(FORMATS))
    else:
        low = random.randint(0, 4)
        made |= {"minLength": low} if random.random() < 0.5 else {}
        made |= {"maxLength": low + random.randint(0, 6)} if random.random() < 0.7 else {}
    return made


def number(random: Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": random.choice(["integer", "number"])}
    low = random.randint(-50, 50)
    made |= random.choice([{}, {"minimum": low}, {"exclusiveMinimum": low}])
    made |= random.choice([{}, {"maximum": low + 20}, {"exclusiveMaximum": low + 20}])
    if random.random() < 0.2 and made["type"] == "integer":
        made["multipleOf"] = random.choice([2, 3, 5])
    return made


def array(random: Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "array"}
    if random.random() < 0.3:
        made["prefixItems"] = [schema(random, depth - 1) for _ in range(random.randint(1, 2))]
        made["items"] = random.choice([False, schema(random, 0)])
    elif random.random() < 0.9:
        made["items"] = schema(random, depth - 1)
    if random.random() < 0.5 and made.get("items") is not False:
        made["minItems"] = random.randint(0, 2)
    if random.random() < 0.7:
        made["maxItems"] = made.get("minItems", 0) + random.randint(0, 2)
    return made


def record(random: Random, depth: int) -> dict[str, Any]:
    names = random.sample(NAMES, random.randint(0, 4))
    made: dict[str, Any] = {"type": "object", "properties": {name: schema(random, depth - 1) for name in names}}
    made["required"] = random.sample(names, random.randint(0, len(names)))
    kind = random.randrange(4)
    if kind < 2:
        made["additionalProperties"] = False
    elif kind == 2:
        made["additionalProperties"] = schema(random, 0)
    elif random.random() < 0.5:
        made |= {"patternProperties": {"^p_": schema(random, 0)}, "additionalProperties": False}
    return made


def choice(random: Random, depth: int) -> dict[str, Any]:
    kind = random.randrange(4)
    if kind == 0:
        return {"anyOf": [schema(random, depth - 1) for _ in range(random.randint(1, 3))]}
    if kind == 1:
        return {"allOf": [number(random, 0), {"minimum": -1000}]}
    if kind == 2:
        tags = random.sample(["cat", "dog", "eel"], random.randint(1, 3))
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": tag}, "more": schema(random, 0)},
                    "required": ["kind", "more"],
                    "additionalProperties": False,
                }
                for tag in tags
            ]
        }
    value = schema(random, 0)
    following = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    inner = {
        "type": "object",
        "properties": {"v": value, "next": following},
        "required": ["v"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": inner}, "$ref": "#/$defs/node"} if depth == 3 else value


def regex(random: Random, depth: int = 3) -> str:
    """Of the syntax that Python and Rust share."""
    if not depth or random.random() < 0.3:
        return random.choice(["a", "b", "[a-f]", "[^x]", "\\d", "ü", " ", "\\.", "yes", "[0-9a-f]{2}"])
    kind = random.randrange(4)
    if kind == 0:
        return "".join(regex(random, depth - 1) for _ in range(random.randint(1, 3)))
    if kind == 1:
        return "(" + "|".join(regex(random, depth - 1) for _ in range(random.randint(1, 3))) + ")"
    low = random.randint(0, 3)
    count = random.choice(["*", "+", "?", f"{{{low}}}", f"{{{low},{low + 3}}}"])
    return f"({regex(random, depth - 1)}){count}"


def fits(value: Any, schema: Any, root: Any) -> bool:
    """Whether a JSON value is one that a schema of the kinds above describes."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    checks = [
        "type" not in schema or any(_is_a(value, one) for one in _list(schema["type"])),
        "const" not in schema or _same(value, schema["const"]),
        "enum" not in schema or any(_same(value, one) for one in schema["enum"]),
        all(fits(value, one, root) for one in schema.get("allOf", ())),
        "anyOf" not in schema or any(fits(value, one, root) for one in schema["anyOf"]),
        "oneOf" not in schema or sum(fits(value, one, root) for one in schema["oneOf"]) == 1,
    ]
    if isinstance(value, str):
        checks.append(_fits_text(value, schema))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        checks.append(_fits_number(value, schema))
    elif isinstance(value, list):
        checks.append(_fits_array(value, schema, root))
    elif isinstance(value, dict):
        checks.append(_fits_object(value, schema, root))
    return all(checks)


def _fits_text(value: str, schema: dict[str, Any]) -> bool:
    return (
        schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
        and re.search(schema.get("pattern", ""), value) is not None
        and re.fullmatch(FORMATS[schema.get("format", "phone")], value) is not None
    )


def _fits_number(value: float, schema: dict[str, Any]) -> bool:
    return bool(
        schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        and value % schema.get("multipleOf", value or 1) == 0
    )


def _fits_array(value: list[Any], schema: dict[str, Any], root: Any) -> bool:
    first = schema.get("prefixItems", [])
    return (
        schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
        and all(fits(one, inner, root) for one, inner in zip(value, first, strict=False))
        and all(fits(one, schema.get("items", True), root) for one in value[len(first) :])
    )


def _fits_object(value: dict[str, Any], schema: dict[str, Any], root: Any) -> bool:
    if not set(schema.get("required", ())) <= set(value):
        return False
    for name, one in value.items():
        own = [schema["properties"][name]] if name in schema.get("properties", {}) else []
        own += [inner for pattern, inner in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        if not all(fits(one, inner, root) for inner in own or [schema.get("additionalProperties", True)]):
            return False
    return True


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    names = {dict: "object", list: "array", str: "string", type(None): "null", int: "integer", float: "number"}
    return kind == names[type(value)] or (kind == "number" and isinstance(value, int))


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)
