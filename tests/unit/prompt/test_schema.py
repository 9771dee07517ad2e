"""JSON schemas before they are compiled: what is dropped, what is bounded, what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium.prompt.schema import ANY, LARGEST_NUMBER, MAX_DEPTH, UNSUPPORTED, SchemaRefused, ready

ANYTHING = {"$ref": f"#/$defs/{ANY}"}


def made(schema: Any, **options: Any) -> dict[str, Any]:
    found = ready(schema, **options)
    assert set(found.pop("$defs")) >= {ANY}
    return found


def test_what_says_nothing_about_the_form_is_dropped() -> None:
    schema = {
        "title": "T",
        "description": "d",
        "default": {"type": "objct"},
        "examples": [1],
        "x-guidance": {"lenient": True},
        "type": "object",
        "properties": {
            "title": {"type": "string", "title": "Title", "format": "phone", "x-guidance": {"lenient": True}}
        },
        "required": ["title"],
    }
    assert made(schema) == {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }


def test_counts_may_be_written_with_a_point() -> None:
    """2.0 is the number 2 in JSON; 2.5 is no count, which the compiler says."""
    found = made({"type": "string", "minLength": 2.0, "maxLength": 4, "minimum": 2.0})
    assert (found["minLength"], type(found["minLength"]), found["maxLength"]) == (2, int, 4)
    assert type(found["minimum"]) is float
    assert made({"maxItems": 2.5})["maxItems"] == 2.5


def test_references_are_followed_from_the_root_only() -> None:
    """Under another `$id` the same reference means another place."""
    inner = {"$id": "/inner", "properties": {"a": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"type": "null"}}}
    outer = {"$id": "https://example.com/outer", "properties": {"b": inner}, "$defs": {"v": {"type": "boolean"}}}
    with pytest.raises(SchemaRefused) as caught:
        ready(outer)
    assert (caught.value.path, "reference" in caught.value.reason) == (".properties.b.$id", True)
    ready(outer | {"properties": {"b": {"$id": "/inner", "type": "null"}, "c": {"$ref": "#/$defs/v"}}})
    ready(outer | {"properties": {"b": inner | {"$id": "#inner"}}})


def test_formats_that_can_be_held_to_stay() -> None:
    assert made({"type": "string", "format": "date-time"}) == {"type": "string", "format": "date-time"}


@pytest.mark.parametrize(
    ("schema", "bounds"),
    [
        ({"type": "integer"}, (-LARGEST_NUMBER, LARGEST_NUMBER)),
        ({"type": ["number", "null"]}, (-LARGEST_NUMBER, LARGEST_NUMBER)),
        ({"type": "integer", "minimum": 3}, (3, LARGEST_NUMBER)),
        ({"type": "integer", "exclusiveMaximum": 3}, (-LARGEST_NUMBER, None)),
        ({"type": "integer", "minimum": 10**20}, (10**20, None)),
        ({"type": "integer", "maximum": -(10**20)}, (None, -(10**20))),
        ({"type": "integer", "const": 10**19}, (None, None)),
        ({"type": "integer", "multipleOf": 7}, (None, None)),
        ({"type": "string"}, (None, None)),
    ],
)
def test_numbers_get_bounds_where_a_side_has_none(schema: dict[str, Any], bounds: tuple[Any, Any]) -> None:
    found = made(schema)
    assert (found.get("minimum"), found.get("maximum")) == bounds


def test_anything_is_one_of_typed_alternatives() -> None:
    assert made({}) == ANYTHING
    assert made(True) == ANYTHING
    found = made({"type": "array", "items": {}})
    assert found["items"] == ANYTHING
    assert made({"type": "object"})["additionalProperties"] == ANYTHING
    assert made({"properties": {"a": {"description": "whatever"}, "b": False}})["properties"] == {
        "a": ANYTHING,
        "b": False,
    }


def test_objects_that_name_their_properties_have_no_others() -> None:
    inner = {"type": "object", "properties": {"x": {"type": "null"}}}
    found = made({"type": "object", "properties": {"a": inner, "b": {"type": "object"}}, "required": ["a"]})
    assert found["additionalProperties"] is False
    assert found["properties"]["a"]["additionalProperties"] is False
    assert found["properties"]["b"]["additionalProperties"] == ANYTHING
    assert made({**inner, "additionalProperties": True})["additionalProperties"] == ANYTHING


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"$defs": {"base": {"properties": {"a": {}}}}, "$ref": "#/$defs/base", "properties": {"b": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["other"]},
        {"type": "object", "properties": {"a": {}}, "minProperties": 2},
    ],
)
def test_what_is_described_together_is_not_closed_apart(schema: dict[str, Any]) -> None:
    assert '"additionalProperties": false' not in json.dumps(made(schema))


def test_all_objects_are_closed_on_request() -> None:
    schema = {"type": "object", "allOf": [{"type": "object"}, {"type": "object", "properties": {}}]}
    assert json.dumps(made(schema, closed=True)).count('"additionalProperties": false') == 3
    assert made({"type": "object", "additionalProperties": True}, closed=True)["additionalProperties"] == ANYTHING


def option(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": kind}, **more}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("alternatives", "exclusive"),
    [
        ([{"type": "string"}, {"type": "integer"}], True),
        ([option("a", n={"type": "integer"}), option("b")], True),
        ([option("a"), option("b"), option("a")], False),
        ([{"type": "number"}, {"type": "integer"}], False),
        ([{"type": "object", "properties": {"kind": {"const": "a"}}}, option("b")], False),
        ([{"minimum": 3}, {"maximum": 1}], False),
        ([ANYTHING, {"type": "null"}], False),
    ],
)
def test_one_of_becomes_any_of_only_where_no_value_fits_two(alternatives: list[Any], exclusive: bool) -> None:
    assert ("anyOf" in made({"oneOf": alternatives})) == exclusive


@pytest.mark.parametrize("keyword", [*sorted(UNSUPPORTED), "uniqueItems"])
def test_what_cannot_be_held_to_is_refused_with_keyword_and_place(keyword: str) -> None:
    value: Any = True if keyword == "uniqueItems" else {}
    schema = {"$defs": {"x": {"anyOf": [{"type": "null"}, {"items": {keyword: value}}]}}}
    with pytest.raises(SchemaRefused) as refused:
        ready(schema)
    assert refused.value.path == ".$defs.x.anyOf[1].items"
    assert f"`{keyword}`" in refused.value.reason


def test_a_keyword_that_asks_for_nothing_is_no_hindrance() -> None:
    assert made({"type": "array", "uniqueItems": False, "items": {"type": "null"}}) == {
        "type": "array",
        "items": {"type": "null"},
    }


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (5, ""),
        ([], ""),
        (False, ""),
        ({"type": "objct"}, ".type"),
        ({"type": 5}, ".type"),
        ({"type": ["string", "x"]}, ".type"),
        ({"properties": []}, ".properties"),
        ({"properties": {"a": 5}}, ".properties.a"),
        ({"anyOf": {}}, ".anyOf"),
        ({"items": [5]}, ".items[0]"),
        ({"additionalProperties": "no"}, ".additionalProperties"),
        ({"$ref": "http://example.org/x"}, ".$ref"),
        ({"$ref": "other.json"}, ".$ref"),
        ({"$ref": 5}, ".$ref"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_place(schema: Any, path: str) -> None:
    with pytest.raises(SchemaRefused) as refused:
        ready(schema)
    assert refused.value.path == path


def test_depth_has_a_bound() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "null"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        return schema

    ready(nested(MAX_DEPTH))
    with pytest.raises(SchemaRefused, match="nested"):
        ready(nested(MAX_DEPTH + 1))
