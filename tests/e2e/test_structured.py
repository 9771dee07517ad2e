"""Answers of a form, as OpenAI's own client asks for them and reads them, from a whole server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field
from support.live import Live, live

MODEL = "sensorium-demo"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Thing(BaseModel):
    shape: Literal["circle", "square"]
    count: int = Field(ge=0, le=9)
    tags: list[Literal["a", "b"]] = Field(max_length=2)
    near: Thing | None


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("structured")) as found:
        yield found


@pytest.fixture(scope="module")
def client(demo: Live) -> OpenAI:
    return OpenAI(base_url=f"{demo.url}/v1", api_key="EMPTY", max_retries=0)


def ask(client: OpenAI, *, max_tokens: int = 400, **fields: Any) -> Any:
    names = ("response_format", "stream", "n", "temperature", "seed", "logprobs", "top_logprobs", "stream_options")
    own = {name: fields.pop(name) for name in names if name in fields}
    return client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=max_tokens, **{"temperature": 0, **own}, extra_body=fields
    )


def test_parse_gives_an_object_of_the_class(client: OpenAI) -> None:
    found = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Thing, max_tokens=1000, temperature=0
    )
    assert found.choices[0].finish_reason == "stop"
    assert isinstance(found.choices[0].message.parsed, Thing)


def test_a_schema_is_kept_strict_or_not(client: OpenAI) -> None:
    for strict in (True, False):
        schema = {"name": "thing", "schema": Thing.model_json_schema(), "strict": strict}
        answer = ask(client, max_tokens=1000, response_format={"type": "json_schema", "json_schema": schema})
        Thing.model_validate_json(answer.choices[0].message.content)


def test_json_mode_begins_an_object(client: OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=40, temperature=1, n=4)
    assert all(choice.message.content.startswith("{") for choice in answer.choices)


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "[a-c]{3}(x|yz)"}}, "[a-c]{3}(x|yz)"),
    ({"structured_outputs": {"choice": ["positive", "negative", "größer"]}}, "positive|negative|größer"),
    ({"structured_outputs": {"grammar": 'root ::= "n" [0-9]{2}'}}, "n[0-9]{2}"),
    ({"guided_regex": "(ab|cd){4}"}, "(ab|cd){4}"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
    ({"grammar": 'root ::= "hello " ("you" | "me")'}, "hello (you|me)"),
]


@pytest.mark.parametrize(("fields", "pattern"), FORMS, ids=lambda value: str(value)[:40])
def test_every_choice_of_every_form_fits_streamed_and_plain(
    client: OpenAI, fields: dict[str, Any], pattern: str
) -> None:
    plain = ask(client, **fields, n=3, temperature=1, seed=5)
    texts = [choice.message.content for choice in plain.choices]
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert {choice.finish_reason for choice in plain.choices} == {"stop"}
    streamed = ["", "", ""]
    for event in ask(client, **fields, n=3, temperature=1, seed=5, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_tokens_and_logprobs_are_counted_as_ever(client: OpenAI) -> None:
    """Also of tokens that the grammar forces."""
    answer = ask(
        client, structured_outputs={"choice": ["one long answer without a choice"]}, logprobs=True, top_logprobs=1
    )
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == "one long answer without a choice"
    assert answer.usage.completion_tokens == len(tokens)


def test_max_tokens_and_stop_strings_cut(client: OpenAI) -> None:
    cut = ask(client, guided_regex="a{50,}", max_tokens=5).choices[0]
    assert (cut.finish_reason, set(cut.message.content)) == ("length", {"a"})
    stopped = ask(client, guided_regex="abcdef", stop=["cd"]).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", "ab")


def test_completions_are_held_too(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, max_tokens=40, extra_body={"guided_regex": "[0-9]{4}"}
    )
    assert all(re.fullmatch("[0-9]{4}", choice.text.strip()) for choice in answer.choices)


def test_many_at_once_with_and_without_a_form(client: OpenAI) -> None:
    free = ask(client, max_tokens=20).choices[0].message.content

    def one(number: int) -> bool:
        if number % 3 == 0:
            return bool(ask(client, max_tokens=20).choices[0].message.content == free)
        pattern = f"[a-d]{{{number}}}x?"
        text = ask(client, guided_regex=pattern, temperature=1).choices[0].message.content
        return re.fullmatch(pattern, text) is not None

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(one, range(1, 37)))


def test_a_refusal_names_keyword_and_place(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}
    with pytest.raises(BadRequestError) as refused:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert refused.value.code == "invalid_json_schema"
    assert refused.value.param == "response_format.json_schema.schema.properties.a"
    assert "`contains`" in str(refused.value)


HOSTILE: list[dict[str, Any]] = [
    {"guided_regex": "(" * 30_000},
    {"guided_grammar": "start: " + "(" * 60_000},
    {"guided_grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(6000)) + 'r6000: "a"\n'},
    {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"guided_json": {"$ref": "http://127.0.0.1:1/schema"}},
    {"guided_json": {"type": "string", "description": "x" * 10_000_000}},
    {"structured_outputs": {"regex": "a\u0000"}},
]


def test_hostile_forms_end_as_errors_while_others_are_served(demo: Live, client: OpenAI) -> None:
    def post(fields: dict[str, Any]) -> httpx.Response:
        return demo.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, **fields})

    with ThreadPoolExecutor(8) as threads:
        hostile = list(threads.map(post, HOSTILE))
        fine = list(threads.map(post, [{"guided_regex": f"b{{{number}}}"} for number in range(1, 5)]))
    assert [reply.status_code for reply in hostile] == [400] * len(HOSTILE), [reply.text[:200] for reply in hostile]
    assert all(len(reply.text) < 1000 for reply in hostile)
    assert [reply.json()["choices"][0]["message"]["content"] for reply in fine] == ["b", "bb", "bbb", "bbbb"]
