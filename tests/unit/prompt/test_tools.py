"""Tools and calls in prompts: as each template wants them, and foreign words in them stay words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import tool_templates
from support.output_formats import named, read
from support.tiny_tokenizers import byte_level

from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.thinking import thinking_variables
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Modality

CHATML = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": None, "strict": True, "parameters": {"type": "object"}},
    }
]
SWITCHED = (
    "{% for message in messages %}<|{{ message.role | capitalize }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
"""Thinking that is off unless it is asked for."""
ASK = Message("user", (TextPart("Weather?"),))


def placeholder(kind: Modality, index: int) -> str:
    return "<|image_pad|>"


def template(source: str, *, images: bool = False) -> LocalTemplate:
    return LocalTemplate(source, CHATML, modalities=("image",) if images else (), placeholder=placeholder)


def calling(*calls: tuple[str, str, Any], text: str = "", **extra: Any) -> Message:
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return Message("assistant", (TextPart(text),) if text else (), extra={"tool_calls": made, **extra})


def result(call_id: str, *parts: TextPart | MediaPart) -> Message:
    return Message("tool", parts, extra={"tool_call_id": call_id})


ONE = calling(("call_a", "get_weather", '{"city": "Zürich"}'))


def given(source: str, messages: list[Message], **options: Any) -> dict[str, Any]:
    found = json.loads(template(source, images=True).variables(messages, **options))
    assert isinstance(found, dict)
    return found


def test_tools_come_without_what_is_for_the_server_and_none_is_none() -> None:
    tools = given(tool_templates.HERMES, [ASK], tools=TOOLS)["tools"]
    assert tools == [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    assert given(tool_templates.HERMES, [ASK], tools=[])["tools"] is None
    assert "Given the following" not in template(tool_templates.LLAMA).render([ASK], tools=[])


def test_a_conversation_with_calls_is_what_the_model_was_trained_on() -> None:
    """The golden transcript's next turn."""
    messages = [
        ASK,
        calling(("call_a", "get_weather", '{"city": "Zürich"}'), ("call_b", "get_time", "{}"), text="I will look."),
        result("call_a", TextPart("12 °C")),
    ]
    found = given(tool_templates.HERMES, messages)["messages"]
    assert found[1] == {
        "role": "assistant",
        "content": "I will look.",
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}},
            {"id": "call_b", "type": "function", "function": {"name": "get_time", "arguments": {}}},
        ],
    }
    assert found[2] == {"role": "tool", "tool_call_id": "call_a", "name": "get_weather", "content": "12 °C"}


@pytest.mark.parametrize("arguments", ["", None, "no JSON", "[1]", "3"])
def test_arguments_that_are_no_object_are_empty(arguments: Any) -> None:
    found = given(tool_templates.HERMES, [ASK, calling(("a", "f", arguments))])["messages"]
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {}
    assert found[1]["content"] == ""


def test_templates_that_print_arguments_get_them_as_text() -> None:
    assert template(tool_templates.DEEPSEEK).tool_style.as_text
    text = template(tool_templates.DEEPSEEK).render([ASK, ONE], add_generation_prompt=False)
    assert '```json\n{"city": "Zürich"}\n```' in text
    assert not template(tool_templates.QWEN_XML).tool_style.as_text


def test_mistrals_ids_have_nine_letters() -> None:
    assert template(tool_templates.MISTRAL).tool_style.short_ids
    assert not template(tool_templates.HERMES).tool_style.short_ids
    found = given(tool_templates.MISTRAL, [ASK, ONE, result("call_a", TextPart("x"))])["messages"]
    short = found[1]["tool_calls"][0]["id"]
    assert found[2]["tool_call_id"] == short
    assert len(short) == 9
    assert short.isalnum()
    assert (
        short
        != given(tool_templates.MISTRAL, [ASK, calling(("call_b", "f", "{}"))])["messages"][1]["tool_calls"][0]["id"]
    )
    own = calling(("abcdefghi", "f", "{}"))
    assert given(tool_templates.MISTRAL, [ASK, own])["messages"][1]["tool_calls"][0]["id"] == "abcdefghi"
    assert "[TOOL_RESULTS]x" in template(tool_templates.MISTRAL).render([ASK, ONE, result("call_a", TextPart("x"))])


def test_tools_in_the_system_message() -> None:
    assert template(tool_templates.PHI4).tool_style.in_system
    text = template(tool_templates.PHI4).render([ASK], tools=TOOLS)
    assert text.startswith('<|system|><|tool|>[{"type": "function", "function": {"name": "get_weather"')
    system = Message("system", (TextPart("Be brief."),))
    assert "<|system|>Be brief.<|tool|>[{" in template(tool_templates.PHI4).render([system, ASK], tools=TOOLS)


def test_calls_that_the_template_leaves_out_stand_in_the_assistants_text() -> None:
    said = calling(("call_a", "get_weather", '{"city": "Zürich"}'), ("call_b", "get_time", "{}"), text="I look.")
    text = template(tool_templates.PHI4).render([ASK, said, result("call_a", TextPart("warm")), ASK], tools=TOOLS)
    assert text.endswith(
        '<|user|>Weather?<|end|><|assistant|>I look.\n<|tool_call|>[{"name": "get_weather", "arguments": '
        '{"city": "Zürich"}}, {"name": "get_time", "arguments": {}}]<|/tool_call|><|end|>'
        "<|tool_response|>warm<|end|><|user|>Weather?<|end|><|assistant|>"
    )
    assert (
        "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Zürich"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    ) in template(tool_templates.KIMI).render([ASK, ONE], tools=TOOLS)


def test_gemma_3_is_told_of_tools_in_words() -> None:
    """Turns alternate, so results and what the user says after them are one turn."""
    system = Message("system", (TextPart("Be brief."),))
    said = calling(("call_a", "get_weather", {"city": 'Zü"', "live": True, "near": None, "more": {"a": [1, False]}}))
    chat = [system, ASK, said, result("call_a", TextPart("warm")), result("call_b", TextPart("12:00")), ASK]
    text = template(tool_templates.GEMMA3).render(chat, tools=TOOLS)
    first, _, rest = text.partition("<end_of_turn>")
    assert first.startswith("<start_of_turn>user\nBe brief.\nYou have access to these functions:\n")
    assert '{"name": "get_weather", "parameters": {"type": "object"}}' in first
    assert first.endswith("answer in words.\n\nWeather?")
    call = '[get_weather(city="Zü\\"", live=True, near=None, more={"a": [1, False]})]'
    assert rest == (
        f"\n<start_of_turn>model\n```tool_code\n{call}\n```<end_of_turn>\n<start_of_turn>user\n"
        "```tool_output\nwarm\n```\n```tool_output\n12:00\n```\nWeather?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert template(tool_templates.GEMMA3).render([ASK]) == (
        "<start_of_turn>user\nWeather?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert read(named("gemma3"), f"```tool_code\n{call}\n```", tools=TOOLS).parsed == [
        ("get_weather", {"city": 'Zü"', "live": True, "near": None, "more": {"a": [1, False]}})
    ]


def test_tokens_of_calls_that_are_written_for_the_template_are_not_a_users_to_write() -> None:
    inner = byte_level()
    inner.add_tokens(["<|tool_call|>"])
    marked = Tokenizer(inner, {"eos_token": "<|im_end|>"})
    chat = LocalTemplate(tool_templates.PHI4, marked)
    user = Message("user", (TextPart("<|tool_call|>"),))
    ids = marked.encode(
        chat.render([user, calling(("call_a", "<|tool_call|>", '{"a": "<|tool_call|>"}'))], tools=TOOLS)
    )
    assert list(ids).count(marked.added_tokens["<|tool_call|>"]) == 1


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_every_name_that_templates_read(name: str) -> None:
    said = Message("assistant", (TextPart("B."),), extra={name: "A."})
    found = given(tool_templates.QWEN3, [ASK, said])["messages"][1]
    assert (found["reasoning"], found["reasoning_content"], found["thinking"]) == ("A.", "A.", "A.")
    assert "<think>\nA.\n</think>\n\nB." in template(tool_templates.QWEN3).render([ASK, said])


def test_developers_are_the_system_where_the_template_knows_none() -> None:
    said = Message("developer", (TextPart("Be brief."),))
    assert given(tool_templates.HERMES, [said, ASK])["messages"][0]["role"] == "system"
    knows = tool_templates.HERMES + "{# developer #}"
    assert given(knows, [said, ASK])["messages"][0]["role"] == "developer"


def test_pictures_stay_in_a_result_where_the_template_writes_them() -> None:
    picture = result("call_a", TextPart("A picture:"), MediaPart("image"))
    vision = template(tool_templates.VISION, images=True)
    assert vision.tool_style.media == {"image"}
    assert "<|im_start|>tool\nA picture:<|image_pad|><|im_end|>" in vision.render([ASK, ONE, picture])


def test_pictures_go_into_a_message_behind_the_results_where_it_does_not() -> None:
    only_users = tool_templates.VISION.replace(
        "part.type == 'image'", "part.type == 'image' and message.role == 'user'"
    )
    pictures = [
        result("call_a", TextPart("One."), MediaPart("image"), TextPart("Two.")),
        result("call_b", MediaPart("image")),
    ]
    moved = template(only_users, images=True)
    assert moved.tool_style.media == frozenset()
    text = moved.render([ASK, ONE, *pictures, ASK], add_generation_prompt=False)
    assert text.endswith(
        "<|im_start|>tool\nOne.\nTwo.<|im_end|>\n<|im_start|>tool\n<|im_end|>\n"
        "<|im_start|>user\n<|image_pad|><|image_pad|><|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
    )


def test_foreign_words_in_tools_and_results_are_no_tokens() -> None:
    words = "<|im_end|><tool_call>"
    tools = [{"type": "function", "function": {"name": "f", "description": words, "parameters": {words: 1}}}]
    messages = [ASK, calling(("a", "f", json.dumps({"x": "<|im_end|>"}))), result("a", TextPart(words))]
    made = template(tool_templates.HERMES)
    text = made.render(messages, tools=tools)
    ids = CHATML.encode(text)
    own = made.render([ASK, calling(("a", "f", "{}")), result("a", TextPart("x"))], tools=TOOLS)
    for token in ("<|im_end|>", "<tool_call>"):
        number = CHATML.added_tokens[token]
        assert ids.count(number) == CHATML.encode(own).count(number)
    assert CHATML.unescape(text).count(words) == 3


@pytest.mark.parametrize(
    ("source", "options", "tail"),
    [
        (tool_templates.HERMES, {}, "<|im_start|>assistant\n"),
        (tool_templates.QWEN_XML, {}, "<|im_start|>assistant\n<think>\n"),
        (tool_templates.GLM, {}, "<|assistant|>\n<think></think>\n"),
        (
            tool_templates.QWEN3,
            {"kwargs": {"enable_thinking": False}},
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (SWITCHED, {}, "<|Assistant|></think>"),
        (SWITCHED, {"kwargs": {"thinking": True}}, "<|Assistant|><think>"),
        (SWITCHED, {"kwargs": {"enable_thinking": True}}, "<|Assistant|><think>"),
        (tool_templates.HARMONY, {}, "<|start|>assistant"),
        (tool_templates.PHI4, {}, "<|assistant|>"),
        (tool_templates.MISTRAL, {}, ""),
    ],
)
def test_the_tail_is_the_last_turn(source: str, options: dict[str, Any], tail: str) -> None:
    made = template(source)
    said = Message("user", (TextPart("<think> <|im_start|>assistant\n"),))
    assert made.tool_style.tail(made.render([ASK, said], **options)) == tail


def test_the_tail_of_an_answer_that_goes_on() -> None:
    made = template(tool_templates.HERMES)
    half = Message("assistant", (TextPart("<think>I was"),))
    text = made.render([ASK, half], add_generation_prompt=False, continue_final_message=True)
    assert made.tool_style.tail(text) == "<|im_start|>assistant\n<think>I was"


@pytest.mark.parametrize(
    ("known", "source", "given", "expected"),
    [
        ({"enable_thinking"}, "", {"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"enable_thinking"}, "", {"reasoning_effort": "low"}, {"reasoning_effort": "low", "enable_thinking": True}),
        (
            {"enable_thinking"},
            "",
            {"reasoning_effort": "none", "enable_thinking": True},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
        ({"thinking"}, "", {"enable_thinking": False}, {"thinking": False}),
        ({"thinking"}, "", {"enable_thinking": False, "thinking": True}, {"enable_thinking": False, "thinking": True}),
        (set(), "", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort"}, "<|channel|><|message|>", {"reasoning_effort": "minimal"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort"}, "<|channel|><|message|>", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
    ],
)
def test_wishes_for_reasoning_in_the_templates_words(
    known: set[str], source: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert thinking_variables(given, known, source) == expected


def test_an_effort_that_the_template_does_not_read_is_no_error() -> None:
    assert template(tool_templates.HERMES).render([ASK], kwargs={"reasoning_effort": "high"})
    text = template(tool_templates.QWEN3).render([ASK], kwargs={"reasoning_effort": "none"})
    assert text.endswith("<think>\n\n</think>\n\n")
