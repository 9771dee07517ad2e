"""Tools and reasoning through HTTP: what reaches the template, how an answer with calls reads, plain and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from openai import AsyncOpenAI
from support.api_support import TOKENIZER, TOOL_TEMPLATE, FakeEngine, Served, chat, events, serving, speak

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALLS = (
    "<think>\nParis, then the time\n</think>\n\nOne moment. \n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Paris </tool_call> {"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ARGUMENTS = {"city": "Paris </tool_call> {"}
USER: list[Any] = [{"role": "user", "content": "Weather in Paris, and the time?"}]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(FakeEngine(partial(speak, text=CALLS)), model={"source": TOOL_TEMPLATE}) as one:
        yield one


async def test_a_plain_answer(served: Served) -> None:
    body = (await chat(served.port, messages=USER, tools=TOOLS)).json
    message = body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert message["reasoning"] == message["reasoning_content"] == "Paris, then the time"
    assert message["content"].strip() == "One moment."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "now"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    assert message["tool_calls"][1]["function"]["arguments"] == "{}"
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    # every byte is a token here; the newlines around thoughts are tokens between the tags
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] >= len("Paris, then the time")


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
async def test_streamed_is_plain(chunk: int) -> None:
    """However many tokens come at a time; names once, indices in order, no part of a marker anywhere."""
    engine = FakeEngine(partial(speak, text=CALLS, chunk=chunk))
    async with serving(engine, model={"source": TOOL_TEMPLATE}) as served:
        whole = (await chat(served.port, messages=USER, tools=TOOLS)).json["choices"][0]
        found = events((await chat(served.port, messages=USER, tools=TOOLS, stream=True)).body)
    text = thoughts = ""
    calls: list[dict[str, str]] = []
    for event in found:
        delta = event["choices"][0]["delta"]
        text += delta.get("content") or ""
        thoughts += delta.get("reasoning") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert text == whole["message"]["content"]
    assert thoughts == whole["message"]["reasoning"]
    assert calls == [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in whole["message"]["tool_calls"]
    ]
    assert found[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "tool_calls"
    assert "tool_call>" not in text + thoughts
    assert "think" not in text + thoughts


async def test_without_tools_calls_are_text(served: Served) -> None:
    """Reasoning is split all the same."""
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = (await chat(served.port, messages=USER, **more)).json["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"].count("<tool_call>") == 2
        assert choice["message"]["reasoning"] == "Paris, then the time"


async def test_hidden_reasoning_takes_its_logprobs_along(served: Served) -> None:
    fields: dict[str, Any] = {"messages": USER, "tools": TOOLS, "include_reasoning": False, "logprobs": True}
    choice = (await chat(served.port, **fields)).json["choices"][0]
    assert "reasoning" not in choice["message"]
    told = "".join(one["token"] for one in choice["logprobs"]["content"])
    assert "then" not in told
    assert "get_weather" in told
    streamed = events((await chat(served.port, stream=True, **fields)).body)
    assert not any("reasoning" in event["choices"][0]["delta"] for event in streamed)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "now", "arguments": {"a": "long text', [("now", '{"a": "long text')]),
        ("nothing to call <tool_c", []),
        ("<think>\nonly thoughts", []),
    ],
)
async def test_answers_that_are_cut(text: str, calls: list[tuple[str, str]]) -> None:
    """What has come stays, and the reason is the length; streamed and plain are equal."""
    length = len(TOKENIZER.encode(text))
    engine = FakeEngine(partial(speak, text=text, ends=False))
    async with serving(engine, model={"source": TOOL_TEMPLATE}) as served:
        choice = (await chat(served.port, messages=USER, tools=TOOLS, max_tokens=length)).json["choices"][0]
    assert choice["finish_reason"] == "length"
    message = choice["message"]
    assert [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
    ] == calls
    if not calls and "think" not in text:
        assert message["content"] == text
    if "think" in text:
        assert (message["content"], message["reasoning"]) == (None, "only thoughts")


async def test_stop_strings_are_looked_for_in_the_text_only(served: Served) -> None:
    choice = (await chat(served.port, messages=USER, tools=TOOLS, stop=["then", "city", "moment"])).json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "moment")
    assert choice["message"]["content"] == "One "
    assert choice["message"]["reasoning"] == "Paris, then the time"
    choice = (await chat(served.port, messages=USER, tools=TOOLS, stop=["then", "city"])).json["choices"][0]
    assert choice["finish_reason"] == "tool_calls"


async def test_the_history_reaches_the_template(served: Served) -> None:
    history = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "<|end|>"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noon <tool_call>"},
    ]
    assert (await chat(served.port, messages=history, tools=TOOLS)).status == 200
    ids = served.engine.requests[-1].prompt.token_ids.tolist()
    prompt = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert '"description": "The weather now."' in prompt
    assert "<think>\nhm\n</think>" in prompt
    assert '<tool_call>\n{"name": "now", "arguments": {"zone": "<|end|>"}}\n</tool_call>' in prompt
    assert "<|start|>tool\nnoon <tool_call>" in prompt
    ends = TOKENIZER.token_to_id("<|end|>")
    assert ids.count(ends) == 4  # of the system's turn and three messages: the one in the arguments is text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
async def test_bad_tools_are_named(served: Served, fields: dict[str, Any], param: str) -> None:
    reply = await chat(served.port, messages=USER, **fields)
    assert reply.status == 400
    assert reply.error["param"] == param, reply.error


async def test_a_model_without_tools_says_so() -> None:
    async with serving() as served:
        reply = await chat(served.port, messages=USER, tools=TOOLS)
        assert (reply.error["code"], reply.error["param"]) == ("unsupported_field", "tools")
        history = [*USER, {"role": "tool", "tool_call_id": "1", "content": "x"}]
        assert (await chat(served.port, messages=history)).error["param"] == "messages[1].role"


async def test_the_official_client_streams_and_responds(served: Served) -> None:
    client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    async with client.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS) as stream:
        final = await stream.get_final_completion()
    called = final.choices[0].message.tool_calls
    assert called is not None
    assert json.loads(called[0].function.arguments) == ARGUMENTS
    flat: Any = [{"type": "function", "strict": None, **tool["function"]} for tool in TOOLS]
    async with client.responses.stream(model="tiny", input="hi", tools=flat) as items:
        response = await items.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output[3].arguments == "{}"  # type: ignore[union-attr]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
