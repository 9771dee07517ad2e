"""The built-in model through Anthropic's own client (text, images, streams, counting, errors) and Ollama's routes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, cast

import anthropic
import pytest
from anthropic import Anthropic
from support import pictures
from support.live import Live, live

MODEL = "sensorium-demo"
PNG = base64.b64encode(pictures.encoded(pictures.photo(84, 56))).decode()
SEEN: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
            {"type": "text", "text": "what do you see?"},
        ],
    }
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("demo"), "--api-key", "secret", key="secret") as found:
        yield found


@pytest.fixture
def client(demo: Live) -> Anthropic:
    return Anthropic(base_url=demo.url, api_key="secret", max_retries=0)


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "hello"}], SEEN])
def test_an_answer_its_stream_and_its_count(client: Anthropic, messages: Any) -> None:
    fields: Any = {"model": MODEL, "max_tokens": 12, "messages": messages, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**fields)
    assert [block.type for block in whole.content] == ["text"]
    with client.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        last = stream.get_final_message()
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    counted = client.messages.count_tokens(model=MODEL, messages=messages)
    for usage in (whole.usage, last.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_beta_methods_continued_answers_and_json(client: Anthropic) -> None:
    hello: Any = {"role": "user", "content": "hello"}
    answer = client.beta.messages.create(
        model=MODEL, max_tokens=5, messages=[hello, {"role": "assistant", "content": "I see"}]
    )
    assert answer.content[0].type == "text"
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    held = client.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=[hello],
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert held.stop_reason == "end_turn"
    assert json.loads(cast(Any, held.content[0]).text)["n"] in (1, 2)


def test_errors(demo: Live, client: Anthropic) -> None:
    hello: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="other").messages.create(model=MODEL, max_tokens=5, messages=hello)
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", max_tokens=5, messages=hello)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].source.data") as refused:
        broken: Any = [{"role": "user", "content": [{**SEEN[0]["content"][0], "source": {"type": "base64"}}]}]
        broken[0]["content"][0]["source"] |= {"media_type": "image/png", "data": "AAAA"}
        client.messages.create(model=MODEL, max_tokens=5, messages=broken)
    assert refused.value.request_id
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
        config: Any = {"format": {"type": "json_schema", "schema": {"type": "banana"}}}
        client.messages.create(model=MODEL, max_tokens=5, messages=hello, output_config=config)
    demo.check_unharmed()


def test_ollama_answers_as_openai_does(demo: Live) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "what do you see?"}]}]
    asked[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}})  # type: ignore[attr-defined]
    wanted = demo.post("/v1/chat/completions", {"messages": asked, "temperature": 0, "max_tokens": 12}).json()
    text = wanted["choices"][0]["message"]["content"]
    body = {"model": f"{MODEL}:latest", "options": {"temperature": 0, "num_predict": 12}}
    chat = {**body, "messages": [{"role": "user", "content": "what do you see?", "images": [PNG]}]}
    lines = demo.post("/api/chat", chat).text.splitlines()
    assert "".join(json.loads(line)["message"]["content"] for line in lines) == text
    whole = demo.post("/api/generate", {**body, "prompt": "what do you see?", "images": [PNG], "stream": False}).json()
    assert (whole["response"], whole["prompt_eval_count"]) == (text, wanted["usage"]["prompt_tokens"])
    vectors = demo.post("/api/embed", {"model": MODEL, "input": ["a", "b"]}).json()["embeddings"]
    assert vectors[0] == demo.post("/v1/embeddings", {"input": "a"}).json()["data"][0]["embedding"]
    shown = demo.post("/api/show", {"model": MODEL}).json()
    assert {"completion", "vision", "audio"} <= set(shown["capabilities"])
    assert demo.post("/api/pull", {"model": MODEL}).status_code == 501
    demo.check_unharmed()
