"""The form of an answer under every name that clients have for it: one at a time, or a 400 that says which."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.common import UnknownFields
from sensorium.api.protocol.completion import CompletionRequest
from sensorium.api.protocol.validation import parse_json
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.prompt.forms import MAX_CHARS, WHITESPACE, Form

MESSAGES = [{"role": "user", "content": "x"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)


def parsed(fields: dict[str, Any], model: type[Any] = ChatRequest) -> Any:
    own = {"messages": MESSAGES} if model is ChatRequest else {"prompt": "x"}
    return parse_json(model, json.dumps({**own, **fields}).encode(), UnknownFields())


def form_of(fields: dict[str, Any], model: type[Any] = ChatRequest) -> Form | None:
    found: Form | None = parsed(fields, model).form()
    return found


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "grammar": "", "json_schema": None, "guided_choice": []}, None),
        ({"response_format": {"type": "json_object"}}, ("json", '{"type": "object"}', "response_format")),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            ("json", TEXT.replace('{"type": "object", ', "{")[:-1] + ', "type": "object"}', "response_format.schema"),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": False},
                }
            },
            ("json", TEXT, "response_format.json_schema.schema"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json", TEXT, "structured_outputs.json")),
        ({"structured_outputs": {"json": TEXT}}, ("json", TEXT, "structured_outputs.json")),
        (
            {"structured_outputs": {"json_object": True}},
            ("json", '{"type": "object"}', "structured_outputs.json_object"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+", "structured_outputs.regex")),
        ({"structured_outputs": {"choice": ["a", "ü"]}}, ("choice", '["a", "ü"]', "structured_outputs.choice")),
        ({"structured_outputs": {"grammar": "root ::= x"}}, ("grammar", "root ::= x", "structured_outputs.grammar")),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, ("json", TEXT, "guided_json")),
        ({"guided_json": TEXT}, ("json", TEXT, "guided_json")),
        ({"guided_regex": "a+"}, ("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a"]}, ("choice", '["a"]', "guided_choice")),
        ({"guided_grammar": "root ::= x"}, ("grammar", "root ::= x", "guided_grammar")),
        ({"grammar": "root ::= x"}, ("grammar", "root ::= x", "grammar")),
        ({"grammar": {"type": "regex", "value": "a"}}, ("regex", "a", "grammar.value")),
        ({"grammar": {"type": "json", "value": SCHEMA}}, ("json", TEXT, "grammar.value")),
        (
            {"grammar": {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}},
            ("json", TEXT, "grammar.value"),
        ),
        ({"json_schema": SCHEMA}, ("json", TEXT, "json_schema")),
        ({"regex": "a"}, ("regex", "a", "regex")),
        ({"ebnf": "root ::= x"}, ("grammar", "root ::= x", "ebnf")),
    ],
    ids=str,
)
def test_every_name_for_a_form(model: type[Any], fields: dict[str, Any], expected: tuple[Any, ...] | None) -> None:
    found = form_of(fields, model)
    assert (None if found is None else (found.kind, json_again(found), found.param)) == (
        expected and (expected[0], json_again(Form(*expected)), expected[2])
    )


def json_again(form: Form) -> Any:
    """What JSON says, whatever the order of its keys; the text of all else."""
    return json.loads(form.source) if form.kind in ("json", "choice") else form.source


def test_how_json_is_written() -> None:
    def written(fields: dict[str, Any]) -> tuple[str, bool]:
        found = form_of(fields)
        assert found is not None
        return found.whitespace, found.closed

    assert written({"structured_outputs": {"json": SCHEMA}}) == (WHITESPACE, False)
    assert written({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}) == ("", False)
    assert written({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "[ ]?"}}) == ("[ ]?", False)
    assert written({"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}}) == (
        WHITESPACE,
        True,
    )
    assert written({"guided_json": SCHEMA, "guided_whitespace_pattern": " "}) == (" ", False)


@pytest.mark.parametrize("order", ["structures", "format"])
def test_structural_tags_become_a_grammar(order: str) -> None:
    older = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
    tag = {"begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}
    newer = {"format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag]}}
    tree: dict[str, Any] = older if order == "structures" else newer
    for fields in (
        {"response_format": {"type": "structural_tag", **tree}},
        {"structured_outputs": {"structural_tag": json.dumps(tree)}},
    ):
        found = form_of(fields)
        assert found is not None
        assert found.kind == "lark"
        assert "%json" in found.source


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
        ({"json_schema": {"name": "n", "schema": SCHEMA}}, "json_schema"),
        ({"guided_json": {"schema": SCHEMA, "strict": True}}, "guided_json"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, "response_format.schema.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.format"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "x"}}}, "response_format.format.type"),
        (
            {"response_format": {"type": "structural_tag", "structures": [{"begin": "a"}], "triggers": []}},
            "response_format.structures[0].schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": "", "json": {}}}, "structured_outputs.whitespace_pattern"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
        ({"grammar": 5}, "grammar"),
        ({"guided_json": [1]}, "guided_json"),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "guided_json"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"json_schema": SCHEMA, "grammar": "root ::= x"}, "grammar"),
        ({"guided_regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"guided_json": {"enum": ["a" * MAX_CHARS["json"]]}}, "guided_json"),
        ({"guided_json": {"enum": list(range(MAX_CHARS["json"]))}}, "guided_json"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_wrong_and_contradictory_forms_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parsed(fields).check(Limits(), ServerConfig())
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param.rpartition(".")[2] in refused.value.message or "exclude" in refused.value.message
