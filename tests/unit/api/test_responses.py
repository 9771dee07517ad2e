"""/v1/responses: the chat that a body is, the items and events of an answer, and what OpenAI's client makes of both."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from openai import AsyncOpenAI, BadRequestError
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from support.api_support import ANSWER, CONTEXT, TOKENIZER, FakeEngine, Served, post, serving, speak
from support.marked_format import MarkedFormat
from support.pictures import encoded, photo
from support.scripted import Eyes, marked_format, speaking

from sensorium.api.protocol.common import UnknownFields
from sensorium.api.protocol.responses import ResponsesRequest, sealed
from sensorium.api.response_items import ResponseItems
from sensorium.config import Limits, ServerConfig
from sensorium.errors import EngineError, NotFoundError, RequestError
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text
from sensorium.types import EngineOutput, EngineRequest

__all__ = ["marked_format"]

ROUTE = "/v1/responses"
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as one:
        yield one


def client_of(served: Served) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def messages_of(**body: Any) -> list[dict[str, Any]]:
    request = ResponsesRequest.model_validate({"input": "hi", **body})
    chat = request.chat(Limits(), ServerConfig(), UnknownFields())
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def test_items_become_turns() -> None:
    """A thought, a text and two calls in a row are one turn of the assistant's."""
    found = messages_of(
        instructions="be kind",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "one moment"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'},
            {"type": "custom_tool_call", "call_id": "b", "name": "patch", "input": "*** Begin"},
            {"type": "function_call_output", "call_id": "a", "output": "2"},
            {"type": "custom_tool_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "done"}]},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"role": "developer", "content": "short"},
        ],
    )
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "tool", "developer"]
    turn = found[2]
    assert turn["content"] == [{"type": "text", "text": "one moment"}]
    assert turn["reasoning"] == "hm"
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in turn["tool_calls"]] == [
        ("a", "f", '{"x": 1}'),
        ("b", "patch", {"input": "*** Begin"}),
    ]
    assert (found[3]["tool_call_id"], found[3]["content"]) == ("a", "2")


def test_sealed_reasoning_comes_back() -> None:
    found = messages_of(
        input=[
            {"type": "reasoning", "summary": [], "encrypted_content": sealed("müde")},
            {"type": "message", "role": "assistant", "content": "x"},
            {"role": "user", "content": "and?"},
        ]
    )
    assert found[0]["reasoning"] == "müde"
    with pytest.raises(RequestError) as caught:
        messages_of(input=[{"type": "reasoning", "encrypted_content": "!"}, {"role": "user", "content": "x"}])
    assert caught.value.param == "input[0].encrypted_content"


def test_tools_are_nested_and_named_back() -> None:
    body = {
        "input": "hi",
        "tools": [
            TOOL,
            {"type": "custom", "name": "apply_patch"},
            {"type": "web_search"},
            {"type": "namespace", "name": "files", "tools": [{"type": "function", "name": "read"}]},
        ],
        "tool_choice": {"type": "function", "name": "get_weather"},
    }
    request = ResponsesRequest.model_validate(body)
    chat = request.chat(Limits(), ServerConfig(), UnknownFields())
    assert [tool["function"]["name"] for tool in chat.tool_objects] == ["get_weather", "apply_patch", "files__read"]
    assert chat.tool_choice_of().names == ("get_weather",)
    items = ResponseItems(request)
    items.add([Call(0, "apply_patch"), Arguments(0, '{"input": "a'), Arguments(0, 'b"}'), Call(1, "files__read")])
    items.add([Arguments(1, "{}")])
    items.finish(is_whole=True)
    custom, function = items.items
    assert (custom["type"], custom["input"]) == ("custom_tool_call", "ab")
    assert (function["name"], function["namespace"], function["arguments"]) == ("read", "files", "{}")


def test_a_custom_tools_format_is_held_told_and_shown() -> None:
    formats = [
        {"type": "grammar", "syntax": "regex", "definition": "[a-f]+"},
        {"type": "grammar", "syntax": "lark", "definition": "start: /x+/"},
        {"type": "text"},
    ]
    tools = [
        {"type": "custom", "name": f"t{index}", "description": "Do it.", "format": one}
        for index, one in enumerate(formats)
    ]
    request = ResponsesRequest.model_validate({"input": "hi", "tools": tools})
    held, told, free = (
        tool["function"] for tool in request.chat(Limits(), ServerConfig(), UnknownFields()).tool_objects
    )
    assert held["parameters"]["properties"] == {"input": {"type": "string", "pattern": "^(?:[a-f]+)$"}}
    assert held["strict"] is True
    assert told["description"] == "Do it.\n\nThe input follows this Lark grammar:\nstart: /x+/"
    assert free["description"] == "Do it."
    assert [tool.model_dump(exclude_none=True)["format"] for tool in request.tools or ()] == formats


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        (
            {"tools": [{"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "lark"}}]},
            "tools[0].format.definition",
            400,
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id", 400),
        ({"background": True}, "background", 400),
        ({"conversation": "c"}, "conversation", 400),
        ({"prompt": {"id": "p"}}, "prompt", 400),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", 404),
        ({"input": [{"type": "what", "id": "x"}]}, "input[0].type", 400),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", 400),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
            400,
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]},
            "input[0].content[0].image_url",
            400,
        ),
        ({"input": []}, "input", 400),
        ({"n": 2}, "n", 400),
        *(({name: True}, name, 400) for name in ("echo", "return_token_ids", "return_tokens_as_token_ids")),
        ({"prompt_logprobs": 0}, "prompt_logprobs", 400),
        ({"max_tokens": 5}, "max_tokens", 400),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", 400),
        ({"tool_choice": "required"}, "tool_choice", 400),
        ({"tools": [{"type": "function"}]}, "tools[0].name", 400),
        ({"tools": [{"type": "web_search"}, {"type": "mcp", "server_label": "a"}]}, "tools[0].type", 400),
        ({"tools": [TOOL]}, "tools", 400),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", 400),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "what"}}}},
            "text.format.schema",
            400,
        ),
        ({"input": "x" * 3000}, "input", 400),
        ({"metadata": {"a": 1}}, "metadata.a", 400),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_is_refused_is_named(served: Served, body: dict[str, Any], param: str, status: int) -> None:
    reply = await post(served.port, ROUTE, {"input": "hi", **body})
    assert reply.status == status, reply.body
    assert reply.error["param"] == param, reply.error


async def test_the_official_client(served: Served) -> None:
    client = client_of(served)
    found = await client.responses.create(
        model="tiny", input="hi", instructions="x", include=["message.output_text.logprobs"], metadata={"a": "b"}
    )
    assert found.id.startswith("resp_")
    assert (found.output_text, found.status, found.metadata) == (ANSWER, "completed", {"a": "b"})
    usage = found.usage
    assert usage is not None
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 3
    logprobs = cast(Any, found.output[0]).content[0].logprobs
    assert logprobs and logprobs[0].logprob <= 0
    cut = await client.responses.create(model="tiny", input="hi", max_output_tokens=3)
    assert (cut.status, cut.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert cut.incomplete_details is not None and cut.incomplete_details.reason == "max_output_tokens"
    counted = await client.responses.input_tokens.count(model="tiny", input="hi", instructions="x")
    assert counted.input_tokens == usage.input_tokens
    with pytest.raises(BadRequestError):
        await client.responses.create(model="tiny", input="hi", previous_response_id="resp_1")
    with pytest.raises(Exception, match="404"):
        await client.responses.retrieve("resp_1")


async def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    client = client_of(served)
    async with client.responses.stream(model="tiny", input="hi") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output_text == ANSWER
    assert final.usage is not None


async def test_a_stream_that_breaks_ends_with_a_failed_response() -> None:
    async def breaks(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        async for output in speak(request):
            yield output
            raise EngineError

    async with serving(FakeEngine(breaks)) as served:
        stream = await client_of(served).responses.create(model="tiny", input="hi", stream=True)
        events = [event async for event in stream]
        assert events[-1].type == "response.failed"
        assert events[-1].response.error is not None
        assert events[-1].response.error.code == "server_error"
        assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_long_conversations_are_cut_by_whole_turns() -> None:
    turns = [{"role": role, "content": f"{place} " + "x" * 60} for place in range(8) for role in ("user", "assistant")]
    body = {"input": [*turns, {"role": "user", "content": "last"}], "instructions": "sys", "max_output_tokens": 8}
    engine = FakeEngine()
    async with serving(engine) as served:
        assert (await post(served.port, ROUTE, body)).error["code"] == "context_length_exceeded"
        reply = await post(served.port, ROUTE, {**body, "truncation": "auto"})
        assert reply.status == 200, reply.body
    prompt = TOKENIZER.decode(engine.requests[-1].prompt.token_ids.tolist(), skip_special_tokens=False)
    assert prompt.startswith("<|start|>system\nsys<|end|>\n<|start|>user\n")
    assert "<|start|>user\nlast<|end|>" in prompt
    assert "user\n0 x" not in prompt


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/chat/completions"])
async def test_media_are_measured_and_not_decoded_to_be_counted(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the conversation is."""
    url = f"data:image/png;base64,{base64.b64encode(encoded(photo(16, 16))).decode()}"
    texts: Any = {"type": "input_text", "text": "look " * 3}, {"type": "input_image", "image_url": url}
    body: dict[str, Any] = {"input": [{"role": "user", "content": texts}]}
    if "chat" in route:
        texts = {"type": "text", "text": "look " * 3}, {"type": "image_url", "image_url": {"url": url}}
        body = {"messages": [{"role": "user", "content": texts}]}
    async with speaking("ok", sees=True) as served:
        assert (await post(served.port, route, body)).status == 200
        expected = len(served.engine.requests[0].prompt.token_ids)
    async with speaking("ok", sees=True) as served:
        monkeypatch.setattr(Eyes, "process", None)
        counted = await post(served.port, f"{route}/input_tokens", body)
        assert (counted.status, counted.json["input_tokens"]) == (200, expected)
        texts[0]["text"] = "x" * 2 * CONTEXT
        assert (await post(served.port, f"{route}/input_tokens", body)).json["input_tokens"] > 2 * CONTEXT
        assert served.engine.requests == []


def test_items_are_what_the_events_made() -> None:
    """For random deltas: every item is added and done once, its pieces joined are its end, in the events and in it."""
    chosen = random.Random(7)
    for _ in range(200):
        items = ResponseItems(ResponsesRequest.model_validate({"input": "x", "reasoning": {"summary": "auto"}}))
        events = []
        said: list[tuple[str, str]] = []
        calls = 0
        for _ in range(chosen.randrange(8)):
            deltas: list[Delta] = []
            text = chosen.choice(["a", "ü", " b", "\n"])
            match chosen.randrange(3):
                case 0:
                    deltas = [Text(text)]
                    said.append(("message", text))
                case 1:
                    deltas = [Reasoning(text)]
                    said.append(("reasoning", text))
                case _:
                    deltas = [Call(calls, "f"), Arguments(calls, "{"), Arguments(calls, "}")]
                    said.append((f"call{calls}", "{}"))
                    calls += 1
            events += items.add(deltas)
        is_whole = chosen.random() < 0.5
        events += items.finish(is_whole=is_whole)
        check_events(events, items)
        joined: list[list[str]] = []
        for kind, text in said:
            if joined and joined[-1][0] == kind:
                joined[-1][1] += text
            else:
                joined.append([kind, text])
        assert [text_of(item) for item in items.items] == ([text for _, text in joined] or [""])
        assert items.items[-1]["status"] == ("completed" if is_whole else "incomplete")


def text_of(item: dict[str, Any]) -> str:
    return str(item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def check_events(events: list[dict[str, Any]], items: ResponseItems) -> None:
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == items.items
    assert [item["id"] for item in added] == [item["id"] for item in done]
    for item in done:
        pieces = [
            event["delta"]
            for event in events
            if event.get("item_id") == item["id"]
            and event["type"].endswith(("output_text.delta", "reasoning_text.delta", "arguments.delta"))
        ]
        assert "".join(pieces) == text_of(item)


def test_a_reference_is_not_found() -> None:
    with pytest.raises(NotFoundError):
        messages_of(input=[{"type": "item_reference", "id": "x"}])


BRACKETS: dict[
    str, tuple[str, ...]
] = {  # what an item's first event opens, its last one closes: the events in between are of its kind
    "reasoning": ("content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"),
    "message": ("content_part.added", "output_text.delta", "output_text.done", "content_part.done"),
    "function_call": ("function_call_arguments.delta", "function_call_arguments.done"),
    "custom_tool_call": ("custom_tool_call_input.delta", "custom_tool_call_input.done"),
}
CALLS = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "custom", "name": "patch"},
]
ANSWERS: dict[str, tuple[list[Any], dict[str, Any], list[str], str]] = {
    "text": (["Hello", " you"], {}, ["message"], "completed"),
    "thought and text": (
        [[Reasoning("Hm")], [Reasoning("m."), Text("Yes")]],
        {},
        ["reasoning", "message"],
        "completed",
    ),
    "text and calls": (
        [
            [Text("So")],
            [Call(0, "get_weather"), Arguments(0, "{"), Arguments(0, "}"), Call(1, "get_weather")],
            [Arguments(1, "{}")],
        ],
        {},
        ["message", "function_call", "function_call"],
        "completed",
    ),
    "a custom tool": (
        [[Call(0, "patch"), Arguments(0, '{"input": "a')], [Arguments(0, ' b"}')]],
        {},
        ["custom_tool_call"],
        "completed",
    ),
    "nothing": ([], {}, ["message"], "completed"),
    "a text that is cut": (["Hel", "lo"], {"ends": False}, ["message"], "incomplete"),
    "a thought that is cut": ([[Reasoning("Hm")]], {"ends": False}, ["reasoning"], "incomplete"),
    "a call that is cut": (
        [[Call(0, "get_weather"), Arguments(0, '{"a')]],
        {"ends": False},
        ["function_call"],
        "incomplete",
    ),
    "a failure": (["Hel"], {"fails": True}, ["message"], "failed"),
}


@pytest.mark.parametrize(("pieces", "ends", "kinds", "status"), ANSWERS.values(), ids=ANSWERS)
async def test_every_event_is_whole_and_in_its_place(
    marked_format: MarkedFormat, pieces: list[Any], ends: dict[str, Any], kinds: list[str], status: str
) -> None:
    """By OpenAI's own types, for every kind of item and of end; the last event has what the events before it built."""
    async with speaking(*pieces, **ends) as served:
        body = {"model": "tiny", "input": "hi", "stream": True, "tools": CALLS, "metadata": {"a": "b"}}
        sent = named_events((await post(served.port, ROUTE, body)).body)
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    checked: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in sent:
        checked.validate_python(event)
    names = [event["type"].removeprefix("response.") for event in sent]
    expected = ["created", "in_progress"]
    for kind in kinds:
        opens = [name for name in BRACKETS[kind] if name.endswith("added")]
        ends_with = [name for name in BRACKETS[kind] if name.endswith("done")]
        expected += ["output_item.added", *opens, *ends_with, "output_item.done"]
    deltas = {name for kind in BRACKETS.values() for name in kind if name.endswith("delta")}
    plain = [name for name in names if name not in deltas]
    if status == "failed":  # what was open stays so
        assert plain == ["created", "in_progress", "output_item.added", "content_part.added", "failed"]
        assert sent[-1]["response"]["error"]["code"] == "server_error"
        return
    assert plain == [*expected, status]
    final = sent[-1]["response"]
    done = [event["item"] for event in sent if event["type"] == "response.output_item.done"]
    assert final["output"] == done
    assert [item["type"] for item in done] == kinds
    assert done[-1]["status"] == status
    assert final["incomplete_details"] == ({"reason": "max_output_tokens"} if status == "incomplete" else None)
    for index, item in enumerate(done):
        own = [event for event in sent if event.get("item_id") == item["id"]]
        assert {event["output_index"] for event in own} == {index}
        built = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert built == (item["content"][0]["text"] if "content" in item else item.get("arguments", item.get("input")))
    assert {response_id for event in sent if (response_id := event.get("response", {}).get("id"))} == {final["id"]}


def named_events(body: bytes) -> list[dict[str, Any]]:
    """Each has the same name on its `event:` line."""
    found = []
    for frame in body.decode().strip().split("\n\n"):
        name, _, data = frame.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found
