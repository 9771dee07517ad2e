"""The form that an answer is to have, by all the names under which clients ask for it; one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from sensorium.api.protocol.common import Body, Name, Nested
from sensorium.api.protocol.unions import TEXT_OR_OBJECT
from sensorium.errors import MissingFieldError, RequestError
from sensorium.prompt.forms import MAX_CHARS, MAX_WHITESPACE_CHARS, WHITESPACE, Form, FormKind
from sensorium.prompt.schema import SchemaRefused
from sensorium.prompt.structural import structural_grammar

MAX_CHOICES = 2**14
Source = Annotated[str, Field(max_length=max(MAX_CHARS.values()))]
Choices = Annotated[list[Annotated[str, Field(min_length=1, max_length=2**14)]], Field(max_length=MAX_CHOICES)]
Schema = Annotated[dict[str, Any], Field(max_length=1024)]  # keys of its outermost object


SchemaField = Annotated[Annotated[Source, Tag("<string>")] | Annotated[Schema, Tag("<object>")], TEXT_OR_OBJECT]
Whitespace = Annotated[str, Field(min_length=1, max_length=MAX_WHITESPACE_CHARS)]


class JsonSchemaFormat(Nested):
    name: Name | None = None
    description: Source | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Nested):
    """OpenAI's. `schema` beside `json_object` is llama.cpp's, `structural_tag` vLLM's, in its two spellings."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Schema | None = Field(None, alias="schema")
    format: Schema | None = None
    structures: Annotated[list[Schema], Field(max_length=128)] | None = None
    triggers: Annotated[list[Name], Field(max_length=128)] | None = None

    def form(self, param: str) -> Form | None:
        schemas = (("json_schema", self.json_schema), ("schema", self.schema_ if self.type == "text" else None))
        for name, value in schemas if self.type in ("text", "json_object") else ():
            if value is not None:
                raise RequestError(f"`{param}.{name}` goes with the type json_schema.", param=f"{param}.{name}")
        if self.type == "text":
            return None
        if self.type == "json_object":
            schema = self.schema_ or {}
            if schema.get("type", "object") != "object":
                raise RequestError(f"`{param}.schema.type` must be object.", param=f"{param}.schema.type")
            return json_form({**schema, "type": "object"}, f"{param}.schema" if self.schema_ else param)
        if self.type == "structural_tag":
            tree = self.model_dump(include={"format", "structures", "triggers"}, exclude_none=True)
            return structural_form(tree, param)
        if self.json_schema is None or self.json_schema.schema_ is None:
            where = f"{param}.json_schema" + ("" if self.json_schema is None else ".schema")
            raise MissingFieldError(where)
        return json_form(self.json_schema.schema_, f"{param}.json_schema.schema")


class StructuredOutputs(Nested):
    """vLLM's: one of the first six."""

    json_: SchemaField | None = Field(None, alias="json")
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = None
    json_object: bool | None = None
    structural_tag: Source | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: Whitespace | None = None

    def form(self, param: str) -> Form:
        found = list(self._forms(param))
        if len(found) != 1:
            raise RequestError(
                f"`{param}` must have exactly one of json, regex, choice, grammar, json_object and structural_tag.",
                param=param,
            )
        return found[0]

    def _forms(self, param: str) -> Iterator[Form]:
        whitespace = "" if self.disable_any_whitespace else self.whitespace_pattern or WHITESPACE
        closed = bool(self.disable_additional_properties)
        if self.json_ is not None:
            yield json_form(self.json_, f"{param}.json", whitespace, closed=closed)
        if self.regex is not None:
            yield text_form("regex", self.regex, f"{param}.regex")
        if self.choice is not None:
            yield choice_form(self.choice, f"{param}.choice")
        if self.grammar is not None:
            yield text_form("grammar", self.grammar, f"{param}.grammar")
        if self.json_object is not None:
            if not self.json_object:
                raise RequestError(f"`{param}.json_object` must be true.", param=f"{param}.json_object")
            yield json_form({"type": "object"}, f"{param}.json_object", whitespace)
        if self.structural_tag is not None:
            yield structural_form(_parsed(self.structural_tag, f"{param}.structural_tag"), f"{param}.structural_tag")


class TypedGrammar(Nested):
    """text-generation-inference's `grammar`."""

    type: Literal["json", "json_schema", "regex"]
    value: SchemaField

    def form(self, param: str) -> Form:
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise RequestError(f"`{param}.value` must be a string.", param=f"{param}.value")
            return text_form("regex", self.value, f"{param}.value")
        value = self.value
        if isinstance(value, dict) and self.type == "json_schema" and isinstance(value.get("schema"), dict):
            value = value["schema"]
        return json_form(value, f"{param}.value")


GrammarField = Annotated[Annotated[Source, Tag("<string>")] | Annotated[TypedGrammar, Tag("<object>")], TEXT_OR_OBJECT]


class StructuredBody(Body):
    """Fields of a request whose answer may be held to a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM before 0.12
    guided_json: SchemaField | None = None
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    guided_whitespace_pattern: Whitespace | None = None
    guided_decoding_backend: Name | None = None  # there is one
    # llama.cpp and text-generation-inference; SGLang
    grammar: GrammarField | None = None
    json_schema: SchemaField | None = None
    regex: Source | None = None
    ebnf: Source | None = None

    def form(self) -> Form | None:
        """What the answer is to be held to. RequestError if that is said in two fields, or in a wrong way."""
        return self.form_of_fields

    @cached_property
    def form_of_fields(self) -> Form | None:
        """Made once: a schema is written out for it, and it is asked for wherever a request is looked at."""
        found = list(self._forms())
        if len(found) > 1:
            first, second = (form.param.partition(".")[0] for form in found[:2])
            raise RequestError(f"`{first}` and `{second}` exclude each other.", param=second)
        return found[0] if found else None

    def _forms(self) -> Iterator[Form]:
        if self.response_format is not None and (form := self.response_format.form("response_format")) is not None:
            yield form
        if self.structured_outputs is not None:
            yield self.structured_outputs.form("structured_outputs")
        whitespace = self.guided_whitespace_pattern or WHITESPACE
        for name, schema in (("guided_json", self.guided_json), ("json_schema", self.json_schema)):
            if schema is not None and schema != "":
                yield json_form(schema, name, whitespace if name == "guided_json" else WHITESPACE)
        for name, regex in (("guided_regex", self.guided_regex), ("regex", self.regex)):
            if regex:
                yield text_form("regex", regex, name)
        if self.guided_choice:
            yield choice_form(self.guided_choice, "guided_choice")
        for name, grammar in (("guided_grammar", self.guided_grammar), ("ebnf", self.ebnf), ("grammar", self.grammar)):
            if isinstance(grammar, TypedGrammar):
                yield grammar.form(name)
            elif grammar:
                yield text_form("grammar", grammar, name)


_WRAPPING = frozenset({"name", "description", "strict", "schema"})


def json_form(schema: dict[str, Any] | str, param: str, whitespace: str = WHITESPACE, *, closed: bool = False) -> Form:
    """A JSON schema, as an object or as its text. RequestError for one in the wrapping of OpenAI's `json_schema`: none
    of its names is a keyword, so it would allow everything."""
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict) and schema.keys() <= _WRAPPING:
        raise RequestError(f"`{param}` is a schema here: send what its `schema` has.", param=param)
    source = schema if isinstance(schema, str) else _text(schema, param)
    if not source.strip():
        raise RequestError(f"`{param}` must not be empty.", param=param)
    return Form("json", source, param, whitespace, closed)


def text_form(kind: FormKind, source: str, param: str) -> Form:
    if not source:
        raise RequestError(f"`{param}` must not be empty.", param=param)
    return Form(kind, source, param)


def choice_form(choices: list[str], param: str) -> Form:
    if not choices:
        raise RequestError(f"`{param}` must not be empty.", param=param)
    return Form("choice", json.dumps(choices, ensure_ascii=False), param)


def structural_form(tree: Any, param: str) -> Form:
    """Free text with tags whose insides have a form."""
    if isinstance(tree, dict):
        _check_size(tree, param)
    try:
        return Form("lark", structural_grammar(tree), param)
    except SchemaRefused as error:
        raise RequestError(f"`{param}{error.path}` {error.reason}.", param=f"{param}{error.path}") from None


def _text(schema: dict[str, Any], param: str) -> str:
    _check_size(schema, param)
    try:
        return json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise RequestError(f"`{param}` is nested too deeply.", param=param, code="invalid_json_schema") from None


def _check_size(schema: Any, param: str) -> None:
    """Before it is written out: a body may have sixty megabytes."""
    left = MAX_CHARS["json"]
    stack = [schema]
    while stack and left >= 0:
        value = stack.pop()
        left -= len(value) if isinstance(value, str) else 1
        if isinstance(value, dict):
            stack.extend(value.values())
            left -= sum(map(len, value))
        elif isinstance(value, list):
            stack.extend(value)
    if left < 0:
        raise RequestError(f"`{param}` must have at most {MAX_CHARS['json']} characters.", param=param)


def _parsed(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"`{param}` must be JSON.", param=param) from None
