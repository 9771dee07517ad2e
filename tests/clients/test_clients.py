"""Unmodified clients, as their own documentation uses them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

MODEL = "gpt-4o-mini"
TEXT = "Grüße, world! 🙂 ok"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


ANN = Person(name="Ann", age=30)
WEATHER = {
    "name": "get_weather",
    "description": "The weather now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


# openai


def test_openai(url: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    user: Any = [{"role": "user", "content": "hi"}]
    assert client.chat.completions.create(model=MODEL, messages=user).choices[0].message.content == TEXT
    pieces = client.chat.completions.create(model=MODEL, messages=user, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == TEXT
    parsed = client.chat.completions.parse(model=MODEL, messages=user, response_format=Person)
    assert parsed.choices[0].message.parsed == ANN
    tools: Any = [{"type": "function", "function": WEATHER}]
    call = client.chat.completions.create(model=MODEL, messages=user, tools=tools).choices[0]
    assert call.finish_reason == "tool_calls"
    assert json.loads(call.message.tool_calls[0].function.arguments) == {"city": "Paris"}  # type: ignore[index]
    response = client.responses.parse(model=MODEL, input="hi", text_format=Person)
    assert response.output_parsed == ANN
    with client.responses.stream(model=MODEL, input="hi", tools=[{"type": "function", "strict": None, **WEATHER}]) as s:
        final = s.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "function_call"]


async def test_openai_async(url: str) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url, api_key="none")
    async with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], response_format=Person
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == ANN


# anthropic


def test_anthropic(url: str) -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none")
    user: Any = [{"role": "user", "content": "hi"}]
    found = client.messages.create(model=MODEL, max_tokens=100, messages=user)
    assert found.content[0].text == TEXT  # type: ignore[union-attr]
    tools: Any = [{"name": "get_weather", "input_schema": WEATHER["parameters"]}]
    with client.messages.stream(model=MODEL, max_tokens=200, messages=user, tools=tools) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    used = final.content[-1]
    assert used.input == {"city": "Paris"}  # type: ignore[union-attr]
    answered: Any = [
        *user,
        {"role": "assistant", "content": [block.model_dump() for block in final.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used.id, "content": "sunny"}]},  # type: ignore[union-attr]
    ]
    last = client.messages.create(model=MODEL, max_tokens=100, messages=answered, tools=tools)
    assert last.content[0].text == "The tool says: sunny"  # type: ignore[union-attr]
    assert client.messages.count_tokens(model=MODEL, messages=user).input_tokens > 0
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=MODEL, max_tokens=10, messages=[{"role": "user", "content": [{"type": "x"}]}])  # type: ignore[list-item, typeddict-item]


def test_anthropic_runs_tools(url: str) -> None:
    """Its runner asks the server to hold the conversation; ours makes it send the whole one each time."""
    import anthropic

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather.

        Args:
            city: where
        """
        return f"sunny in {city}"

    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
    user: Any = [{"role": "user", "content": "hi"}]
    runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=200, tools=[get_weather], messages=user)
    assert runner.until_done().content[0].text == "The tool says: sunny in Paris"  # type: ignore[union-attr]


# langchain


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("responses", [False, True])
def test_langchain_structured(url: str, method: Any, responses: bool) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key="none", use_responses_api=responses)  # type: ignore[arg-type]
    assert chat.with_structured_output(Person, method=method).invoke("Who? Answer in JSON.") == ANN


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_tools(url: str, responses: bool) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key="none", use_responses_api=responses)  # type: ignore[arg-type]
    assert "Grüße" in str(chat.invoke("hi").content)
    asked = chat.bind_tools([WEATHER])
    assert asked.invoke("weather?").tool_calls[0]["args"] == {"city": "Paris"}
    gathered: Any = None
    for piece in asked.stream("weather?"):
        gathered = piece if gathered is None else gathered + piece
    assert gathered.tool_calls[0]["args"] == {"city": "Paris"}


# llama-index


def test_llama_index(url: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=MODEL,
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=512,
    )
    assert model.chat([ChatMessage(role="user", content="hi")]).message.content == TEXT
    assert "".join(piece.delta or "" for piece in model.stream_chat([ChatMessage(role="user", content="hi")])) == TEXT

    def get_weather(city: str) -> str:
        """The weather now."""
        return f"sunny in {city}"

    found = model.predict_and_call([FunctionTool.from_defaults(get_weather)], "weather?")
    assert str(found.response) == "sunny in Paris"


# litellm


def test_litellm(url: str) -> None:
    import litellm

    ask: dict[str, Any] = {
        "model": f"openai/{MODEL}",
        "api_base": url,
        "api_key": "none",
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert litellm.completion(**ask).choices[0].message.content == TEXT
    assert "".join(piece.choices[0].delta.content or "" for piece in litellm.completion(stream=True, **ask)) == TEXT
    called = litellm.completion(tools=[{"type": "function", "function": WEATHER}], **ask).choices[0].message
    assert json.loads(called.tool_calls[0].function.arguments) == {"city": "Paris"}
    formed = litellm.completion(response_format=Person, **ask).choices[0].message.content
    assert Person.model_validate_json(formed) == ANN
    response = litellm.responses(model=f"openai/{MODEL}", api_base=url, api_key="none", input="hi")
    assert response.output[-1].content[0].text == TEXT


# instructor


def instructor_modes() -> list[Any]:
    import instructor

    return [
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
        instructor.Mode.PARALLEL_TOOLS,
        instructor.Mode.JSON,
        instructor.Mode.MD_JSON,
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.RESPONSES_TOOLS,
    ]


@pytest.mark.parametrize("mode", instructor_modes(), ids=str)
def test_instructor(url: str, mode: Any) -> None:
    from collections.abc import Iterable

    import instructor
    from openai import OpenAI

    client = instructor.from_openai(OpenAI(base_url=url, api_key="none"), mode=mode)
    messages: Any = [{"role": "user", "content": "Who? Answer in JSON."}]
    ask: dict[str, Any] = {"model": MODEL, "messages": messages, "max_retries": 0}
    if mode is instructor.Mode.PARALLEL_TOOLS:
        assert list(client.chat.completions.create(response_model=Iterable[Person], **ask)) == [ANN]
        return
    found = client.chat.completions.create(response_model=Person, **ask)  # of a class of instructor's own
    assert found.model_dump() == ANN.model_dump()


# pydantic-ai


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_pydantic_ai(url: str, kind: str) -> None:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    maker = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
    model = maker(MODEL, provider=OpenAIProvider(base_url=url, api_key="none"))
    assert (await Agent(model).run("hi")).output == TEXT
    assert (await Agent(model, output_type=Person).run("Who?")).output == ANN
    assert (await Agent(model, output_type=NativeOutput(Person)).run("Who?")).output == ANN
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        return f"sunny in {city}"

    assert (await agent.run("weather?")).output == "The tool says: sunny in Paris"
    async with agent.run_stream("weather?") as stream:
        assert await stream.get_output() == "The tool says: sunny in Paris"


# openai-agents


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_openai_agents(url: str, kind: str) -> None:
    from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
    from openai import AsyncOpenAI

    maker = OpenAIChatCompletionsModel if kind == "chat" else OpenAIResponsesModel
    model = maker(model=MODEL, openai_client=AsyncOpenAI(base_url=url, api_key="none"))

    @function_tool
    def get_weather(city: str) -> str:
        """The weather now."""
        return f"sunny in {city}"

    agent = Agent(name="a", instructions="help", model=model, tools=[get_weather])
    assert (await Runner.run(agent, "weather?")).final_output == "The tool says: sunny in Paris"
    streamed = Runner.run_streamed(agent, "weather?")
    kinds = [event.type async for event in streamed.stream_events()]
    assert "run_item_stream_event" in kinds
    assert streamed.final_output == "The tool says: sunny in Paris"
    typed = Agent(name="b", model=model, output_type=Person)
    assert (await Runner.run(typed, "Who?")).final_output == ANN


# Vercel's AI SDK


def test_ai_sdk(url: str) -> None:
    """In Node, through @ai-sdk/openai (responses and chat) and @ai-sdk/openai-compatible."""
    folder = Path(os.environ.get("NODE_CLIENTS", "nowhere"))
    if not (folder / "node_modules/ai").is_dir():
        pytest.skip("Node or its packages are missing: make test-clients installs them where npm is")
    done = subprocess.run(
        ["node", "ai_sdk.mjs"], cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ}, check=False
    )
    assert done.stdout.split() == ["responses", "ok", "chat", "ok", "compatible", "ok"], done.stderr
