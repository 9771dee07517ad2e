"""Anthropic's Messages API: its own client, golden streams, what becomes of each block, and its errors."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from hypothesis import given, settings
from hypothesis import strategies as st
from support.api_support import CONTEXT, LEAKS, TOOL_TEMPLATE, FakeEngine, Reply, Served, get, post, request, serving
from support.api_support import raw as sent
from support.marked_format import MarkedFormat
from support.pictures import encoded, photo
from support.scripted import Eyes, marked_format, prompt_of, says, speaking

from sensorium.api.error_forms import error_form
from sensorium.api.message_content import Content
from sensorium.api.protocol.common import UnknownFields
from sensorium.api.protocol.messages import MessagesRequest
from sensorium.api.protocol.validation import parse_json
from sensorium.api.transport.asgi import Call as HttpCall
from sensorium.config import Limits
from sensorium.errors import (
    AuthenticationError,
    BodyTooLargeError,
    EngineError,
    ForbiddenError,
    NotFoundError,
    OverloadedError,
    RateLimitError,
    RequestError,
    RequestTimeoutError,
    SensoriumError,
    ServerError,
    UnavailableError,
)
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text, ToolChoice

__all__ = ["marked_format"]

PATH = "/v1/messages"
PIXELS = base64.b64encode(encoded(photo(32, 16))).decode()  # 8 rows
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXELS}}
WEATHER = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
HI: list[Any] = [{"role": "user", "content": "hi"}]


def client_of(served: Served, **options: Any) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=served.url, **{"api_key": "k", "max_retries": 0, **options})


async def ask(served: Served, path: str = PATH, **fields: Any) -> Reply:
    body = {"model": "tiny", "max_tokens": 50, "messages": HI, **fields}
    return await post(served.port, path, {name: value for name, value in body.items() if value is not ...})


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; each names itself twice."""
    found = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def error_of(reply: Reply) -> dict[str, Any]:
    """The error object, with its form checked."""
    found = reply.json
    assert set(found) == {"type", "error", "request_id"}
    assert found["type"] == "error"
    assert set(found["error"]) - {"details"} == {"type", "message"}
    assert reply.headers["request-id"] == found["request_id"] == reply.headers["x-request-id"]
    assert not LEAKS.search(reply.body.decode())
    return dict(found["error"])


def golden(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.strip().splitlines() if line.startswith("data: ")]


def masked(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is different every time: ids, signatures and the length of the prompt."""
    text = json.dumps(events)
    text = re.sub(r'"(msg|toolu)_\w+"', r'"\1_"', text)
    text = re.sub(r'("signature": )"[^"]+"', r'\1"*"', text)
    return list(json.loads(re.sub(r'("(?:cache_read_)?input_tokens": )\d+', r"\g<1>0", text)))


THINKING_AND_TOOL = """
data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"tiny","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":310,"output_tokens":0,"cache_read_input_tokens":0,"cache_creation_input_tokens":0}}}
data: {"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}
data: {"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Need weather."}}
data: {"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"c2ln"}}
data: {"type":"content_block_stop","index":0}
data: {"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"toolu_1","name":"get_weather","input":{}}}
data: {"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\": \\"Ro"}}
data: {"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"me\\"}"}}
data: {"type":"content_block_stop","index":1}
data: {"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"output_tokens":45}}
data: {"type":"message_stop"}
"""  # noqa: E501
IMAGE_AND_STOP = """
data: {"type":"message_start","message":{"id":"msg_2","type":"message","role":"assistant","model":"tiny","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":420,"output_tokens":0,"cache_read_input_tokens":0,"cache_creation_input_tokens":0}}}
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"A red "}}
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"car"}}
data: {"type":"content_block_stop","index":0}
data: {"type":"message_delta","delta":{"stop_reason":"stop_sequence","stop_sequence":"\\n\\n"},"usage":{"output_tokens":11}}
data: {"type":"message_stop"}
"""  # noqa: E501


async def test_golden_thinking_and_a_tool(marked_format: MarkedFormat) -> None:
    first, second = [Reasoning("Need weather.")], '{"city": "Ro'
    async with speaking(first, "\x03get_weather\x04" + second, 'me"}\x05') as served:
        headers = {"x-api-key": "KEY", "anthropic-version": "2023-06-01"}
        body = {
            "model": "tiny",
            "max_tokens": 2000,
            "stream": True,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": "Weather in Rome?"}],
            "tools": [WEATHER],
            "tool_choice": {"type": "auto"},
        }
        reply = await post(served.port, f"{PATH}?beta=true", body, headers=headers)
        assert reply.headers["request-id"] == reply.headers["x-request-id"]
        found, wanted = events_of(reply.body), golden(THINKING_AND_TOOL)
        asked = served.engine.requests[0]
    assert masked(found) == masked(wanted)
    assert prompt_of(asked).startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nWeather in Rome?<|end|>\n")
    assert found[0]["message"]["usage"]["input_tokens"] == len(asked.prompt.token_ids) - 3
    assert found[0]["message"]["usage"]["cache_read_input_tokens"] == 3


async def test_golden_an_image_in_a_result_and_a_stop_sequence(marked_format: MarkedFormat) -> None:
    async with speaking("A red ", "car\n", "\n!", sees=True) as served:
        reply = await ask(
            served,
            stream=True,
            stop_sequences=["\n\n"],
            messages=[
                {"role": "user", "content": "Take a picture"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "toolu_1", "name": "camera", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [IMAGE]},
                        {"type": "text", "text": "What is it?"},
                    ],
                },
            ],
            tools=[{"name": "camera", "input_schema": {"type": "object"}}],
        )
        assert masked(events_of(reply.body)) == masked(golden(IMAGE_AND_STOP))
        asked = served.engine.requests[0]
    assert (asked.prompt.spans[0].length, len(asked.prompt.media)) == (8, 1)
    text = prompt_of(asked)
    assert text.index("Take a picture") < text.index("<|stop|>") < text.index("What is it?")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_client(marked_format: MarkedFormat, stream: bool) -> None:
    said: list[Delta] = [
        Reasoning("Hm."),
        Text("I look.\n"),
        Call(0, "get_weather"),
        Arguments(0, '{"city": "Zürich"}'),
    ]
    async with speaking(said, [Call(1, "get_weather"), Arguments(1, "{}")]) as served:
        fields: Any = {"model": "tiny", "max_tokens": 100, "messages": HI, "tools": [WEATHER]}
        client = client_of(served)
        if stream:
            async with client.messages.stream(**fields) as events:
                message: Any = await events.get_final_message()
        else:
            message = await client.messages.create(**fields)
            assert message._request_id.startswith("req-")
        asked = served.engine.requests[0]
    thinking, text, call, empty = message.content
    assert (thinking.type, thinking.thinking, len(thinking.signature)) == ("thinking", "Hm.", 44)
    assert (text.type, text.text) == ("text", "I look.\n")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Zürich"})
    assert empty.input == {}
    assert call.id.startswith("toolu_") and call.id != empty.id
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == (
        "assistant",
        "tiny",
        "tool_use",
        None,
    )
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(asked.prompt.token_ids)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (3, 0)
    assert usage.output_tokens > 30


async def test_the_client_lists_models() -> None:
    async with serving(names=("tiny", "claude-main")) as served:
        client = client_of(served)
        found = [model async for model in client.models.list()]
        assert [(model.id, model.display_name, model.type) for model in found] == [
            ("tiny", "tiny", "model"),
            ("claude-main", "claude-main", "model"),
        ]
        one = await client.models.retrieve("claude-main")
        assert (one.max_input_tokens, one.max_tokens, one.lifecycle) == (CONTEXT, CONTEXT, "active")
        assert one.created_at.tzinfo is not None
        page = (await get(served.port, "/v1/models")).json
        assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == (
            "list",
            False,
            "tiny",
            "claude-main",
        )
        assert page["data"][0]["created"] == one.created_at.timestamp()
        for row in page["data"]:  # Mistral's client knows a model by these, and Anthropic's `type` is none of its own
            assert (row["type"], row["max_context_length"]) == ("base", CONTEXT)
            assert row["capabilities"]["completion_chat"] is True
            assert row["capabilities"]["vision"] is False


deltas = st.lists(
    st.one_of(
        st.builds(Text, st.text(" \nab{é", min_size=1, max_size=6)),
        st.builds(Reasoning, st.text(" \nxy", min_size=1, max_size=6)),
        st.sampled_from(["f", "g.h"]),
    ),
    max_size=8,
)
arguments = st.dictionaries(st.text("ab", max_size=2), st.text('é"\\{', max_size=3), max_size=2)


@settings(max_examples=60, deadline=None)
@given(deltas, st.data())
def test_a_stream_says_what_the_whole_answer_says(parts: list[Any], data: st.DataObject) -> None:
    said: list[Delta] = []
    calls = 0
    for part in parts:
        if not isinstance(part, str):
            said.append(part)
            continue
        text = json.dumps(data.draw(arguments))
        at = data.draw(st.integers(0, len(text)))
        said.append(Call(calls, part))
        said += [Arguments(calls, piece) for piece in (text[:at], text[at:]) if piece]
        calls += 1
    whole, streamed = Content(b"k"), Content(b"k")
    whole.push(said)
    whole.finish(cut=False)
    events: list[dict[str, Any]] = []
    place = 0
    while place < len(said):
        step = data.draw(st.integers(1, 4))
        events += streamed.push(said[place : place + step])
        place += step
    events += streamed.finish(cut=False)
    assert read_back(events) == [{**block, "id": "*"} if "id" in block else block for block in whole.blocks]
    for kind, field in ((Text, "text"), (Reasoning, "thinking")):
        words = "".join(delta.text for delta in said if isinstance(delta, kind)).split()
        assert "".join(words) == "".join("".join(block.get(field, "") for block in whole.blocks).split())


def read_back(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a stream, as clients put them together. One is open at a time."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(blocks)
                block = {**event["content_block"]}
                blocks.append({**block, "json": ""} if "input" in block else block)
                is_open = True
            case "content_block_delta":
                assert is_open and event["index"] == len(blocks) - 1
                kind, text = event["delta"].values()
                field = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}.get(kind)
                blocks[-1][field or "json"] += text
            case "content_block_stop":
                assert is_open and event["index"] == len(blocks) - 1
                is_open = False
    assert not is_open
    for block in blocks:
        if "json" in block:
            block |= {"id": "*", "input": json.loads(block.pop("json") or "{}")}
        if block["type"] == "text":
            block["citations"] = None
    return blocks


ENDS: list[Any] = [
    (["all"], {}, True, ["all"], "end_turn", None),
    (["al", "l"], {}, False, ["all"], "model_context_window_exceeded", None),
    (["all"], {"max_tokens": 3}, False, ["all"], "max_tokens", None),
    (["a END b"], {"stop_sequences": ["END"]}, True, ["a "], "stop_sequence", "END"),
    (["\n \n"], {}, True, ["\n \n"], "end_turn", None),
    ([""], {}, True, [""], "end_turn", None),
    (["\x03f\x04{}\x05"], {"tool_choice": {"type": "tool", "name": "get_weather"}}, True, [{}], "tool_use", None),
    (["\x03f\x04{}\x05", " END"], {"stop_sequences": ["END"]}, True, [{}], "stop_sequence", "END"),
    (['\x03f\x04{"a": "b'], {"max_tokens": 11}, False, [{}], "max_tokens", None),
    (["\x03f\x04[1]\x05"], {}, True, [{"raw": "[1]"}], "tool_use", None),
    (["\x03f\x04{'a'}\x05"], {}, True, [{"raw": "{'a'}"}], "tool_use", None),
    (["\x01thought"], {"max_tokens": 8}, False, ["thought"], "max_tokens", None),
]


async def test_ends(marked_format: MarkedFormat) -> None:
    async with speaking() as served:
        for pieces, fields, ends, content, reason, sequence in ENDS:
            served.engine.script = says(*pieces, ends=ends)
            found = (await ask(served, tools=[WEATHER], **fields)).json
            assert [_shown(block) for block in found["content"]] == content
            assert (found["stop_reason"], found["stop_sequence"], found["stop_details"]) == (reason, sequence, None)
            events = events_of((await ask(served, tools=[WEATHER], stream=True, **fields)).body)
            assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
            if "raw" not in str(content) and reason != "max_tokens":
                assert [_shown(block) for block in read_back(events)] == content


def _shown(block: dict[str, Any]) -> Any:
    return block.get("text", block.get("thinking", block.get("input")))


RESULT = {"type": "tool_result", "tool_use_id": "t1"}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}


ASKED: list[Any] = [
    ({"system": "S"}, "system\nS|user\nhi|assistant\n"),
    ({"system": [{"type": "text", "text": "S"}, {"type": "text", "text": "T"}]}, "system\nS\nT|user\nhi|assistant\n"),
    (
        {"system": [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "S"}]},
        "system\nS|user\nhi|assistant\n",
    ),
    ({"system": "x-anthropic-billing-header: cch=1;\nS"}, "system\nS|user\nhi|assistant\n"),
    ({"system": ""}, "user\nhi|assistant\n"),
    ({"messages": [*HI, {"role": "user", "content": [{"type": "text", "text": "ho"}]}]}, "user\nhi\nho|assistant\n"),
    (
        {"messages": [*HI, {"role": "system", "content": "now"}, {"role": "user", "content": "ho"}]},
        "user\nhi|system\nnow|user\nho|assistant\n",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, USE]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "so"},
                        {**RESULT, "content": "3"},
                        {"type": "text", "text": "?"},
                    ],
                },
            ]
        },
        "assistant\n|tool\n3|user\nso\n?|assistant\n",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "content": [USE]},
                {
                    "role": "user",
                    "content": [{**RESULT, "content": "no", "is_error": True}, {**RESULT, "is_error": True}],
                },
            ]
        },
        "assistant\n|tool\nError: no|tool\nError: |assistant\n",
    ),
    (
        {
            "messages": [
                {"role": "assistant", "content": [USE]},
                {
                    "role": "user",
                    "content": [
                        {
                            **RESULT,
                            "content": [
                                {
                                    "type": "search_result",
                                    "source": "u",
                                    "title": "T",
                                    "content": [{"type": "text", "text": "c"}],
                                },
                                {"type": "tool_reference", "tool_name": "g"},
                            ],
                        }
                    ],
                },
            ]
        },
        "assistant\n|tool\nT\nu\nc\ng|assistant\n",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "document",
                            "title": "D",
                            "source": {"type": "text", "media_type": "text/plain", "data": "d"},
                        },
                        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "e"}]}},
                        {"type": "document", "source": {"type": "content", "content": "f"}},
                    ],
                }
            ]
        },
        "user\nD\nd\ne\nf|assistant\n",
    ),
    (
        {"messages": [*HI, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, *HI]},
        "user\nhi|assistant\n|user\nhi|assistant\n",
    ),
    ({"messages": [*HI, {"role": "assistant", "content": "The answer is"}]}, "user\nhi|assistant\nThe answer is"),
    ({"messages": [{"role": "user", "content": "<|end|> is text"}]}, "user\n<|end|> is text|assistant\n"),
]


async def test_what_the_model_is_asked(marked_format: MarkedFormat) -> None:
    async with speaking("ok") as served:
        for fields, prompt in ASKED:
            reply = await ask(served, tools=[WEATHER], **fields)
            assert reply.status == 200, reply.body
            counted = await ask(served, f"{PATH}/count_tokens", max_tokens=..., tools=[WEATHER], **fields)
            text = prompt_of(served.engine.requests[-1])
            for mark, short in (("<|start|>", ""), ("<|end|>\n", "|")):
                text = text.replace(mark, short)
            assert text == prompt
            usage = reply.json["usage"]
            assert counted.json == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


async def test_media_are_in_the_prompts_order_wherever_they_were_sent(
    marked_format: MarkedFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"type": "image", "source": {"type": "url", "url": f"data:image/png;base64,{PIXELS}"}}
    small = base64.b64encode(encoded(photo(16, 16))).decode()
    result = {**RESULT, "content": [{"type": "image", "source": {**IMAGE["source"], "data": small}}]}  # type: ignore[dict-item]
    async with speaking("ok", sees=True) as served:
        messages = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [other, result]}]
        reply = await ask(served, messages=messages, tools=[WEATHER])
        assert reply.status == 200, reply.body
        asked = served.engine.requests[0]
    async with speaking("ok", sees=True) as served:
        monkeypatch.setattr(Eyes, "process", None)  # nothing is decoded to be counted
        counted = await ask(served, f"{PATH}/count_tokens", messages=messages, tools=[WEATHER])
    assert [span.length for span in asked.prompt.spans] == [4, 8]
    assert counted.json == {"input_tokens": len(asked.prompt.token_ids)}
    assert served.engine.requests == []


async def test_tokens_are_counted_beyond_the_context() -> None:
    long = [{"role": "user", "content": "x" * 2 * CONTEXT}]
    async with serving() as served:
        found = await ask(served, f"{PATH}/count_tokens", messages=long)
        assert found.json["input_tokens"] > 2 * CONTEXT
        refused = await ask(served, messages=long)
        assert (refused.status, error_of(refused)["type"]) == (400, "invalid_request_error")
        assert served.engine.requests == []


async def test_an_answer_is_as_long_as_fits() -> None:
    async with serving() as served:
        assert (await ask(served, max_tokens=32_000)).status == 200
        asked = served.engine.requests[0]
        assert asked.sampling is not None
        assert asked.sampling.max_tokens == CONTEXT - len(asked.prompt.token_ids)
        await ask(served, max_tokens=7, temperature=0.5, top_p=0.25, top_k=5)
        sampling = served.engine.requests[1].sampling
        assert sampling is not None
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.25, 5)


CHOICES: list[Any] = [
    (None, (ToolChoice("auto"), True)),
    ({"type": "auto"}, (ToolChoice("auto"), True)),
    ({"type": "auto", "disable_parallel_tool_use": True}, (ToolChoice("auto"), False)),
    ({"type": "any"}, (ToolChoice("required"), True)),
    ({"type": "tool", "name": "get_weather"}, (ToolChoice("named", ("get_weather",)), True)),
    ({"type": "none"}, None),
]


async def test_tool_choices(marked_format: MarkedFormat) -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    tools = [{**WEATHER, "defer_loading": True, "type": "custom"}, search]
    async with speaking("ok") as served:
        for choice, wanted in CHOICES:
            marked_format.choices.clear()
            reply = await ask(served, tools=tools, tool_choice=choice)
            assert reply.status == 200, reply.body
            assert marked_format.choices == ([wanted] if wanted else [])


@pytest.mark.parametrize(
    ("thinking", "variable", "shown"),
    [
        (None, "True", True),  # an effort asks for thoughts
        ({"type": "disabled"}, "False", True),
        ({"type": "adaptive"}, "True", True),
        ({"type": "adaptive", "display": "omitted"}, "True", False),
        ({"type": "enabled", "budget_tokens": 1024}, "True", True),
        ({"type": "between_tools"}, "True", True),
    ],
)
async def test_thinking(marked_format: MarkedFormat, thinking: Any, variable: str, shown: bool) -> None:
    template = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{{ reasoning_effort }}"
    said: list[Delta] = [Reasoning("Hm."), Text("ok")]
    async with speaking(said, template="{{ messages[0].content }}" + template) as served:
        reply = await ask(served, max_tokens=2000, thinking=thinking, output_config={"effort": "xhigh"})
        assert reply.status == 200, reply.body
        assert prompt_of(served.engine.requests[0]) == f"hi{variable}xhigh"
    assert [block["type"] for block in reply.json["content"]] == (["thinking", "text"] if shown else ["text"])
    assert marked_format.budgets == ([1024] * ((thinking or {}).get("type") == "enabled"))


async def test_a_models_own_format_and_the_turn_after_it() -> None:
    said = "<think>\nRome\n</think>\n\nI look. \n" + (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    )
    async with speaking(*said, template=TOOL_TEMPLATE) as served:
        whole = (await ask(served, tools=[WEATHER])).json
        events = events_of((await ask(served, tools=[WEATHER], stream=True)).body)
        kinds = [(block["type"], _shown(block)) for block in whole["content"]]
        assert kinds == [("thinking", "Rome"), ("text", "I look."), ("tool_use", {"city": "Rome"})]
        assert [(block["type"], _shown(block)) for block in read_back(events)] == kinds
        assert (whole["stop_reason"], events[-2]["delta"]["stop_reason"]) == ("tool_use", "tool_use")
        result = {"type": "tool_result", "tool_use_id": whole["content"][2]["id"], "content": "sunny"}
        messages = [*HI, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [result]}]
        reply = await ask(served, tools=[WEATHER], messages=messages)
        assert reply.status == 200, reply.body
        prompt = prompt_of(served.engine.requests[-1])
    for words in ("I look.", "get_weather", "Rome", "<|start|>tool\nsunny"):
        assert words in prompt


async def test_system_messages_come_first_where_the_template_wants_it() -> None:
    picky = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    late = [*HI, {"role": "system", "content": "now"}, {"role": "user", "content": "ho"}]
    async with speaking("ok", template=picky) as served:
        assert (await ask(served, system="S", messages=late)).status == 200
        assert prompt_of(served.engine.requests[0]) == "[system]S\nnow[user]hi\nho"
        counted = await ask(served, f"{PATH}/count_tokens", system="S", messages=late)
        assert counted.json["input_tokens"] == len(served.engine.requests[0].prompt.token_ids)
        only = await ask(served, messages=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
        assert only.status == 200
    refusing = "{{ raise_exception('no') if messages[0].role == 'system' else messages[0].content }}"
    async with speaking("ok", template=refusing) as served:
        assert "no" in error_of(await ask(served, system="S", messages=late))["message"]


def test_the_form_of_an_answer() -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    for fields, param in (
        ({"output_format": wanted}, "output_format.schema"),
        ({"output_config": {"format": wanted}}, "output_config.format.schema"),
    ):
        body = json.dumps({"model": "m", "max_tokens": 1, "messages": HI, **fields}).encode()
        form = parse_json(MessagesRequest, body, UnknownFields()).as_chat().form()
        assert form is not None
        assert (form.kind, form.source, form.param) == ("json", '{"type": "object"}', param)


def test_a_form_beside_a_demanded_call_is_taken_as_chats_take_it() -> None:
    form = {"type": "json_schema", "schema": {"const": 7}}
    asked = {"model": "m", "max_tokens": 1, "messages": HI, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    chat = parse_json(MessagesRequest, json.dumps({**asked, "output_format": form}).encode(), UnknownFields()).as_chat()
    assert chat.form() is not None
    assert chat.tool_choice_of().mode == "required"


def bad(**fields: Any) -> dict[str, Any]:
    return fields


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, fields]}]}


async def test_off_positions_of_fields_that_a_message_lacks_pass() -> None:
    """Some clients always send them."""
    off: dict[str, Any] = {
        **{"repetition_penalty": 1, "min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True},
        **{"bad_words": [], "allowed_token_ids": None, "thinking_token_budget": -1, "seed": None},
    }
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    async with serving() as served:
        assert (await post(served.port, "/v1/messages", {**body, **off})).status == 200


WRONG: list[Any] = [
    (bad(model=...), "model"),
    (bad(model=""), "model"),
    (bad(max_tokens=...), "max_tokens"),
    (bad(max_tokens=0), "max_tokens"),
    (bad(max_tokens="5"), "max_tokens"),
    (bad(messages=...), "messages"),
    (bad(messages=[]), "messages"),
    (bad(messages=[{"role": "tool", "content": "x"}]), "messages[0].role"),
    (bad(messages=[{"role": "user"}]), "messages[0].content"),
    (bad(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (bad(temperature=1.5), "temperature"),
    (bad(top_p=0), "top_p"),
    (bad(top_k="a"), "top_k"),
    (bad(stream="yes"), "stream"),
    (bad(stop_sequences=["a"] * 17), "stop_sequences"),
    (bad(stop_sequences=["a", ""]), "stop_sequences[1]"),
    (bad(stop_sequences=["a" * 5000]), "stop_sequences[0]"),
    (bad(stop_sequences="a"), "stop_sequences"),
    (bad(system=5), "system"),
    (bad(system=[{"type": "image"}]), "system[0].type"),
    (bad(tools=[{"name": "f"}]), "tools[0].input_schema"),
    (bad(tools=[{"name": "f", "input_schema": {"type": "array"}}]), "tools[0].input_schema.type"),
    (bad(tools=[{"name": "f f", "input_schema": {}}]), "tools[0].name"),
    (bad(tools=[WEATHER, WEATHER]), "tools[1].name"),
    (bad(tools=[{"type": "bash_20250124", "name": "bash"}]), "tools[0].type"),
    (bad(tools=[WEATHER], tool_choice={"type": "tool", "name": "g"}), "tool_choice.name"),
    (bad(tools=[WEATHER], tool_choice={"type": "tool"}), "tool_choice.name"),
    (bad(tools=[WEATHER], tool_choice={"type": "must"}), "tool_choice.type"),
    (bad(tools=[WEATHER], tool_choice="auto"), "tool_choice"),
    (bad(tool_choice={"type": "any"}), "tool_choice"),
    (bad(thinking={"type": "on"}), "thinking.type"),
    (bad(thinking={"type": "enabled"}), "thinking.budget_tokens"),
    (bad(thinking={"type": "enabled", "budget_tokens": 100}), "thinking.budget_tokens"),
    (bad(thinking={"type": "enabled", "budget_tokens": 2000}), "thinking.budget_tokens"),
    (bad(output_config={"effort": "huge"}), "output_config.effort"),
    (bad(output_config={"format": {"type": "xml"}}), "output_config.format.type"),
    (bad(output_config={"format": {"type": "json_schema"}}), "output_config.format.schema"),
    (bad(output_format={"type": "json_schema", "schema": {"type": "banana"}}), "output_format.schema"),
    (
        bad(output_config={"format": {"type": "json_schema", "schema": {"type": "banana"}}}),
        "output_config.format.schema",
    ),
    (
        bad(
            output_format={"type": "json_schema", "schema": {}},
            output_config={"format": {"type": "json_schema", "schema": {}}},
        ),
        "output_format",
    ),
    (bad(stop="x"), "stop_sequences"),
    (bad(n=2), "n"),
    (bad(bad_words=["a"]), "`bad_words`"),
    (bad(allowed_token_ids=[5]), "`allowed_token_ids`"),
    (bad(min_tokens=2), "`min_tokens`"),
    (bad(stop_token_ids=[5]), "`stop_token_ids`"),
    (bad(ignore_eos=True), "`ignore_eos`"),
    (bad(include_stop_str_in_output=True), "`include_stop_str_in_output`"),
    (bad(skip_special_tokens=False), "`skip_special_tokens`"),
    (bad(prompt_logprobs=0), "`prompt_logprobs`"),
    (bad(return_token_ids=True), "`return_token_ids`"),
    (bad(truncate_prompt_tokens=5), "`truncate_prompt_tokens`"),
    (bad(repetition_penalty=1.1), "`repetition_penalty`"),
    (bad(structured_outputs={"choice": ["a"]}), "output_config.format"),
    (bad(guided_json={"type": "object"}), "output_config.format"),
    (bad(thinking_token_budget=5), "thinking.budget_tokens"),
    (bad(response_format={"type": "json_object"}), "output_config.format"),
    (bad(mcp_servers=[{"url": "x"}]), "mcp_servers"),
    (bad(compaction={"type": "summarize"}), "`compaction`"),
    (block(type="image"), "messages[0].content[1].source"),
    (block(type="image", source={"type": "file", "file_id": "f"}), "messages[0].content[1].source.type"),
    (block(**{**IMAGE, "source": {**IMAGE["source"], "data": "%%%"}}), "messages[0].content[1].source.data"),  # type: ignore[dict-item]
    (
        block(**{**IMAGE, "source": {**IMAGE["source"], "media_type": "text/plain"}}),  # type: ignore[dict-item]
        "messages[0].content[1].source.media_type",
    ),
    (block(type="image", source={"type": "url", "url": "ftp://x"}), "messages[0].content[1].source.url"),
    (block(type="document", source={"type": "base64", "data": "x"}), "messages[0].content[1].source.type"),
    (block(type="document", source={"type": "url", "url": "http://x"}), "messages[0].content[1].source.type"),
    (block(type="audio"), "messages[0].content[1].type"),
    (block(type="thinking", thinking="a"), "messages[0].content[1].type"),
    (block(**USE), "messages[0].content[1].type"),
    (block(**RESULT, content=[{"type": "tool_use"}]), "messages[0].content[1].content[0].type"),
    (block(**RESULT, content=[{"type": "text"}]), "messages[0].content[1].content[0].text"),
    (block(type="tool_result"), "messages[0].content[1].tool_use_id"),
    (bad(messages=[{"role": "assistant", "content": [{**USE, "input": "{}"}]}, *HI]), "messages[0].content[0].input"),
    (bad(messages=[{"role": "assistant", "content": [RESULT]}]), "messages[0].content[0].type"),
    (bad(messages=[*HI, {"role": "assistant", "content": [USE]}]), "messages[1]"),
    (bad(messages=[{"role": "system", "content": [IMAGE]}]), "messages[0].content[0].type"),
]


async def test_what_is_wrong_is_named(marked_format: MarkedFormat) -> None:
    async with speaking("ok", sees=True) as served:
        for fields, named in WRONG:
            reply = await ask(served, **fields)
            assert reply.status == 400, (fields, reply.body)
            found = error_of(reply)
            assert found["type"] == "invalid_request_error"
            assert named in found["message"], fields
        assert served.engine.requests == []


async def test_clients_that_keep_conversations_on_the_server_send_whole_ones() -> None:
    """Anthropic's client reads why a thread was refused and goes on without one."""
    async with serving() as served:
        for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
            found = error_of(await ask(served, thread=thread))
            assert found["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        assert served.engine.requests == []
        talk = client_of(served).beta.messages.thread(
            model="tiny", max_tokens=50, unsupported_request_behavior="continue_unthreaded"
        )
        for said in ("one", "two"):
            await talk.send({"role": "user", "content": said})
        assert all(said in prompt_of(served.engine.requests[-1]) for said in ("one", "two"))


async def test_what_a_model_without_tools_or_eyes_refuses() -> None:
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [RESULT]},
    ]
    async with serving() as served:
        for fields, named in (
            ({"tools": [WEATHER]}, "tools"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
            ({"messages": history}, "messages[1].content[0]"),
            ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].source.data"),
        ):
            for path in (PATH, f"{PATH}/count_tokens"):
                reply = await ask(served, path, **fields)
                assert (reply.status, named in error_of(reply)["message"]) == (400, True), reply.body


async def test_fields_without_effect_are_taken() -> None:
    async with serving() as served:
        reply = await ask(
            served,
            metadata={"user_id": "u"},
            service_tier="auto",
            container="c",
            context_management={"edits": []},
            inference_geo="eu",
            fallbacks="default",
            thread=None,
            compaction=None,
            mcp_servers=[],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}
            ],
        )
        assert reply.status == 200, reply.body


async def test_every_refusal_has_anthropics_form() -> None:
    async with serving(limits=Limits(max_body_bytes=2000, max_concurrency_per_key=1), api_key=("k",)) as served:
        key = {"x-api-key": "k"}
        body = {"model": "tiny", "max_tokens": 5, "messages": HI}
        for reply, status, kind in (
            (await post(served.port, PATH, body), 401, "authentication_error"),
            (await post(served.port, PATH, body, headers={"x-api-key": "no"}), 401, "authentication_error"),
            (await post(served.port, f"{PATH}/count_tokens", body), 401, "authentication_error"),
            (await post(served.port, PATH, {**body, "model": "x"}, headers=key), 404, "not_found_error"),
            (await post(served.port, f"{PATH}/batches", body, headers=key), 404, "not_found_error"),
            (await get(served.port, PATH, headers=key), 405, "invalid_request_error"),
            (await post(served.port, PATH, b"{", headers=key), 400, "invalid_request_error"),
            (await post(served.port, PATH, b"", headers=key), 400, "invalid_request_error"),
            (await post(served.port, PATH, {**body, "system": "x" * 3000}, headers=key), 413, "request_too_large"),
            (await post(served.port, PATH, body, headers={**key, "Content-Type": "text/plain"}), 415, None),
            (await post(served.port, PATH, body, headers={**key, "Origin": "http://evil"}), 403, "permission_error"),
            (await post(served.port, f"/api{PATH}", {**body, "model": "x"}, headers=key), 404, "not_found_error"),
        ):
            assert (reply.status, error_of(reply)["type"]) == (status, kind or "invalid_request_error")
        served.engine.state = "restarting"
        reply = await post(served.port, PATH, body, headers=key)
        assert (reply.status, error_of(reply)["type"], "retry-after" in reply.headers) == (
            503,
            "overloaded_error",
            True,
        )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("no"), "invalid_request_error"),
        (AuthenticationError("no"), "authentication_error"),
        (ForbiddenError("no"), "permission_error"),
        (NotFoundError("no"), "not_found_error"),
        (RequestTimeoutError("no"), "timeout_error"),
        (BodyTooLargeError("no"), "request_too_large"),
        (RateLimitError("no"), "rate_limit_error"),
        (ServerError("no"), "api_error"),
        (EngineError("no"), "api_error"),
        (OverloadedError("no"), "overloaded_error"),
        (UnavailableError("no"), "overloaded_error"),
    ],
)
def test_every_error_has_anthropics_type(error: SensoriumError, kind: str) -> None:
    form = error_form("/v1/messages")
    assert form is not None
    call = HttpCall({"method": "POST", "path": "/v1/messages", "headers": []}, None, None)  # type: ignore[arg-type]
    assert json.loads(form.body(error, call)) == {
        "type": "error",
        "error": {"type": kind, "message": "no"},
        "request_id": call.request_id,
    }
    [event] = events_of(form.event(error, call))
    assert event == {"type": "error", "error": {"type": kind, "message": "no"}}


async def test_a_failure_before_and_after_the_first_token() -> None:
    async with speaking("some", fails=True) as served:
        reply = await ask(served)
        assert (reply.status, error_of(reply)["type"]) == (500, "api_error")
        stream = events_of((await ask(served, stream=True)).body)
        assert [event["type"] for event in stream] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "error",
        ]
        assert (stream[-1]["error"]["type"], set(stream[-1]["error"])) == ("api_error", {"type", "message"})


async def test_failures_as_the_client_raises_them() -> None:
    async with speaking("some", fails=True, api_key=("k",)) as served:
        good, bad, bearer = (
            client_of(served),
            client_of(served, api_key="no"),
            client_of(served, api_key=None, auth_token="k"),
        )
        fields: Any = {"model": "tiny", "max_tokens": 9, "messages": HI}
        with pytest.raises(anthropic.AuthenticationError, match="API key") as refused:
            await bad.messages.create(**fields)
        assert refused.value.request_id
        for client in (good, bearer):
            with pytest.raises(anthropic.InternalServerError):
                await client.messages.create(**fields)
            with pytest.raises(anthropic.APIStatusError):
                async with client.messages.stream(**fields) as events:
                    await events.get_final_message()


async def test_a_silence_is_filled_with_pings() -> None:
    from functools import partial

    from support.api_support import speak

    engine = FakeEngine(script=partial(speak, text="ab", delay_s=0.2))
    async with serving(engine, limits=Limits(keep_alive_comment_s=0.05)) as served:
        body = json.dumps({"model": "tiny", "max_tokens": 9, "messages": HI, "stream": True}).encode()
        reply = await sent(served.port, request("POST", PATH, body))
        kinds = [event["type"] for event in events_of(reply.body)]
    assert "ping" in kinds
    assert b": keep-alive" not in reply.body
