"""Tool calls and reasoning in chat completions, from the wire to the template and back: the golden transcripts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import tool_templates
from support.api_support import READY, TOKENIZER, FakeEngine, Served, chat, events, serving, speak
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from sensorium.errors import GRAMMAR_FAILED, GRAMMAR_NOT_COMPILED, RateLimitError
from sensorium.prompt.forms import MAX_CHARS, Form
from sensorium.prompt.grammars import GrammarPool
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineOutput, EngineRequest, Grammar

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
TWO_CALLS = (
    'I will look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
ASK = [{"role": "user", "content": "Weather?"}]
READY_FOR_MORE = replace(READY, max_model_len=4096)


def with_file(folder: Path, *special: str) -> Tokenizer:
    """The test's tokenizer with more special tokens, as a checkpoint has it: grammars need the file."""
    raw = RawTokenizer.from_str(TOKENIZER.raw.to_str())
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return Tokenizer.from_folder(folder)


@asynccontextmanager
async def saying(
    text: str, template: str = tool_templates.QWEN3, tokenizer: Tokenizer = TOKENIZER, **server: Any
) -> AsyncIterator[Served]:
    """A server whose model says this."""
    engine = FakeEngine(partial(speak, text=text), ready=READY_FOR_MORE)
    model = {"source": template, "context": 4096, "tokenizer": tokenizer}
    async with serving(engine, model=model, **server) as served:
        yield served


def prompt_of(served: Served) -> str:
    return TOKENIZER.decode(served.engine.requests[-1].prompt.token_ids.tolist(), skip_special_tokens=False)


def gathered(stream: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """What a client makes of a stream: strings are joined, calls too; the reason it ended."""
    message: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    reason = ""
    for event in stream:
        for choice in event["choices"]:
            for name, value in choice["delta"].items():
                if name != "tool_calls":
                    message[name] = message.get(name, "") + value
            for call in choice["delta"].get("tool_calls", []):
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                else:
                    assert "name" not in call["function"]
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return message, calls, reason


async def test_text_and_two_calls_streamed_and_plain() -> None:
    async with saying(TWO_CALLS) as served:
        plain = (await chat(served.port, messages=ASK, tools=[WEATHER, TIME])).json["choices"][0]
        streamed = events((await chat(served.port, messages=ASK, tools=[WEATHER, TIME], stream=True)).body)
    message, calls, reason = gathered([event for event in streamed if event != "[DONE]"])
    assert plain["finish_reason"] == reason == "tool_calls"
    assert plain["message"]["content"] == message["content"] == "I will look."
    expected = [("get_weather", '{"city": "Zürich"}'), ("get_time", "{}")]
    assert [(call["name"], call["arguments"]) for call in calls] == expected
    found = plain["message"]["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in found] == expected
    assert len({call["id"] for call in [*found, *calls]}) == 4
    assert message["role"] == "assistant"


async def test_a_call_that_max_tokens_cuts_ends_with_length() -> None:
    text = '<tool_call>\n{"name": "note", "arguments": {"text": "a}</tool_ca'
    async with serving(
        FakeEngine(partial(speak, text=text, ends=False)), model={"source": tool_templates.QWEN3}
    ) as served:
        note = {"type": "function", "function": {"name": "note"}}
        options: dict[str, Any] = {"messages": ASK, "tools": [note], "max_tokens": len(text.encode())}
        plain = (await chat(served.port, **options)).json["choices"][0]
        streamed = events((await chat(served.port, stream=True, **options)).body)
    assert plain["finish_reason"] == "length"
    assert plain["message"]["content"] is None
    assert plain["message"]["tool_calls"][0]["function"] == {"name": "note", "arguments": '{"text": "a}</tool_ca'}
    _, calls, reason = gathered([event for event in streamed if event != "[DONE]"])
    assert (calls[0]["arguments"], reason) == ('{"text": "a}</tool_ca', "length")


async def test_one_call_where_no_more_are_wanted() -> None:
    async with saying(TWO_CALLS) as served:
        options: dict[str, Any] = {"messages": ASK, "tools": [WEATHER, TIME], "parallel_tool_calls": False}
        plain = (await chat(served.port, **options)).json["choices"][0]["message"]
        streamed = events((await chat(served.port, stream=True, **options)).body)
    _, calls, reason = gathered([event for event in streamed if event != "[DONE]"])
    assert [call["function"]["name"] for call in plain["tool_calls"]] == ["get_weather"]
    assert ([call["name"] for call in calls], reason) == (["get_weather"], "tool_calls")


async def test_tools_and_history_reach_the_template() -> None:
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "reasoning": "Hm.",
            "tool_calls": [
                {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ü"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "12 °C"},
    ]
    async with saying("It is 12 °C.") as served:
        reply = await chat(served.port, messages=messages, tools=[WEATHER])
        text = prompt_of(served)
    assert reply.json["choices"][0]["message"]["content"] == "It is 12 °C."
    assert '"name": "get_weather", "description": "Weather of a city"' in text
    assert "<think>\nHm.\n</think>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ü"}}\n</tool_call>' in text
    assert "<|im_start|>tool\n12 °C<|im_end|>" in text


async def test_a_choice_that_is_demanded_becomes_a_grammar(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    async with saying(call, tool_templates.HERMES, with_file(tmp_path)) as served:
        for choice, reason in (
            ("required", "tool_calls"),
            ({"type": "function", "function": {"name": "get_time"}}, "stop"),
        ):
            reply = await chat(served.port, messages=ASK, tools=[WEATHER, TIME], tool_choice=choice)
            assert reply.status == 200, reply.json
            assert reply.json["choices"][0]["finish_reason"] == reason
            sampling = served.engine.requests[-1].sampling
            assert sampling is not None
            assert sampling.grammar is not None
            assert "get_time" in sampling.grammar.source
            assert ("get_weather" in sampling.grammar.source) == (choice == "required")
        await chat(served.port, messages=ASK, tools=[WEATHER, TIME])
        sampling = served.engine.requests[-1].sampling
        assert sampling is not None
        assert sampling.grammar is None


async def test_without_tools_a_call_is_text() -> None:
    async with saying(TWO_CALLS) as served:
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            choice = (await chat(served.port, messages=ASK, **options)).json["choices"][0]
            assert choice["message"]["content"] == TWO_CALLS
            assert choice["finish_reason"] == "stop"


async def test_a_template_without_tools_refuses_them() -> None:
    async with saying("x", tool_templates.NO_TOOLS) as served:
        reply = await chat(served.port, messages=ASK, tools=[WEATHER])
    assert (reply.status, reply.error["param"]) == (400, "tools")
    assert "--chat-template" in reply.error["message"]


async def test_a_flag_turns_tools_off() -> None:
    async with saying("x", tool_call_parser="none") as served:
        assert (await chat(served.port, messages=ASK, tools=[WEATHER])).status == 400


@pytest.mark.parametrize(
    ("said", "options", "reasoning", "content"),
    [
        ("<think>\nA.\n</think>\n\nB.", {}, "A.", "B."),
        ("B.", {}, None, "B."),
        ("B.", {"enable_thinking": False}, None, "B."),
        ("<think>A.", {}, "A.", None),
        ("<think>A.</think>B.", {"include_reasoning": False}, None, "B."),
    ],
)
async def test_reasoning_is_told_apart(
    said: str, options: dict[str, Any], reasoning: str | None, content: str | None
) -> None:
    async with saying(said) as served:
        plain = (await chat(served.port, messages=ASK, **options)).json
        stream = events((await chat(served.port, messages=ASK, stream=True, **options)).body)
    found = plain["choices"][0]["message"]
    assert (found.get("reasoning"), found["content"]) == (reasoning, content)
    assert found.get("reasoning_content") == reasoning
    message, _, _ = gathered([event for event in stream if event != "[DONE]"])
    assert message.get("reasoning") == message.get("reasoning_content") == reasoning
    assert message.get("content", "") == (content or "")


async def test_reasoning_that_the_prompt_opened() -> None:
    async with saying("A.\n</think>\n\nB.", tool_templates.QWEN_XML) as served:
        reply = (await chat(served.port, messages=ASK)).json
    assert reply["choices"][0]["message"] == {
        "role": "assistant",
        "content": "B.",
        "refusal": None,
        "reasoning": "A.",
        "reasoning_content": "A.",
    }
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


async def test_arguments_are_json_whatever_the_format() -> None:
    said = '<tool_call>\n<function=get_weather>\n<parameter=city>\nZü"rich\n</parameter>\n</function>\n</tool_call>'
    async with saying("So.</think>" + said, tool_templates.QWEN_XML) as served:
        found = (await chat(served.port, messages=ASK, tools=[WEATHER])).json["choices"][0]["message"]
    assert json.loads(found["tool_calls"][0]["function"]["arguments"]) == {"city": 'Zü"rich'}
    assert found["content"] is None


async def test_a_budget_of_thoughts_becomes_a_grammar(tmp_path: Path) -> None:
    async with saying("So.</think>B.", tool_templates.QWEN_XML, tokenizer=with_file(tmp_path, "</think>")) as served:
        reply = await chat(served.port, messages=ASK, thinking_token_budget=7)
        assert reply.json["choices"][0]["message"]["content"] == "B."
        sampling = served.engine.requests[-1].sampling
        assert sampling is not None
        assert sampling.grammar is not None
        assert "max_tokens=7" in sampling.grammar.source
        await chat(served.port, messages=ASK, thinking_token_budget=7, enable_thinking=False)
        reply = await chat(served.port, messages=ASK, thinking_token_budget=-1)
        assert (reply.status, reply.error["param"]) == (400, "thinking_token_budget")
    async with saying("B.", tool_templates.NO_TOOLS) as served:
        assert (await chat(served.port, messages=ASK, thinking_token_budget=7)).status == 200


NO_GRAMMAR: dict[str, Any] = {
    "looking ahead": {"type": "string", "pattern": "^(?!x).*$"},
    "a count beside names that may be left out": {"type": "object", "properties": {"x": {}}, "maxProperties": 1},
    "patterns that overlap": {"type": "object", "patternProperties": {"a*": {}, "aaa*": {}}},
    "a reference to nothing": {"$ref": "#/$defs/nothing"},
    "a keyword": {"not": {}},
}


def with_parameter(schema: Any, *, strict: bool) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return {"type": "function", "function": {"name": "odd", "parameters": parameters, "strict": strict}}


@pytest.mark.parametrize("schema", NO_GRAMMAR.values(), ids=NO_GRAMMAR)
async def test_a_tool_that_no_grammar_holds_stops_no_call_unless_it_is_strict(schema: Any, tmp_path: Path) -> None:
    async with saying("x", tool_templates.HERMES, with_file(tmp_path)) as served:
        lax, strict = [
            await chat(
                served.port, messages=ASK, tools=[WEATHER, with_parameter(schema, strict=one)], tool_choice="required"
            )
            for one in (False, True)
        ]
        (asked,) = served.engine.requests
    assert lax.status == 200, lax.json
    assert asked.sampling is not None
    assert asked.sampling.grammar is not None
    assert '"city"' in asked.sampling.grammar.source  # the other tool is held as ever
    assert (strict.status, strict.error["param"], strict.error["code"]) == (400, "tools", "invalid_json_schema")
    assert "'odd'" in strict.error["message"]
    assert "at 2(" not in strict.error["message"]
    assert "`parameters.properties.a" in strict.error["message"]  # which part it is


async def test_a_key_that_compiles_too_much_is_told_so_with_tools_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another form, with less in it, is for those that cannot be held to."""
    asked: list[str] = []

    async def busy(pool: GrammarPool, form: Form, tenant: bytes = b"") -> Grammar:
        asked.append(form.source)
        raise RateLimitError("Wait.")

    monkeypatch.setattr(GrammarPool, "grammar_of", busy)
    async with saying("x", tool_templates.HERMES, with_file(tmp_path)) as served:
        reply = await chat(served.port, messages=ASK, tools=[WEATHER], tool_choice="required")
    assert (reply.status, reply.error["code"], len(asked)) == (429, "rate_limit_exceeded", 1)


@pytest.mark.parametrize("said", [GRAMMAR_FAILED, GRAMMAR_NOT_COMPILED])
async def test_a_form_that_the_engine_cannot_go_on_with_is_the_request_s_fault(said: str) -> None:
    """A 500 would be tried again by clients."""

    async def failing(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(request.id, finish_reason="error", error=said)

    async with serving(FakeEngine(script=failing)) as served:
        for n in (1, 2):
            reply = await chat(served.port, n=n)
            assert (reply.status, reply.error["message"]) == (400, said)
            assert reply.error["type"] == "invalid_request_error"


async def test_parameters_that_hold_at_once_are_held(tmp_path: Path) -> None:
    tool = with_parameter({"allOf": [{"properties": {"b": {}}}, {"properties": {"b": {}}}]}, strict=True)
    async with saying("x", tool_templates.HERMES, with_file(tmp_path)) as served:
        reply = await chat(served.port, messages=ASK, tools=[tool], tool_choice="required")
    assert reply.status == 200, reply.json


async def test_tools_too_large_for_one_grammar_are_called_with_any_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_CHARS, "lark", 600)
    async with saying("x", tool_templates.HERMES, with_file(tmp_path)) as served:
        reply = await chat(served.port, messages=ASK, tools=[WEATHER], tool_choice="required")
        (asked,) = served.engine.requests
    assert reply.status == 200, reply.json
    assert asked.sampling is not None
    assert asked.sampling.grammar is not None
    assert '"city"' not in asked.sampling.grammar.source
