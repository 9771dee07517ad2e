"""The format that a checkpoint's template and vocabulary show, without a flag; and with one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support import tool_templates
from support.output_formats import read
from support.tiny_tokenizers import byte_level

from sensorium.errors import StartupError
from sensorium.prompt.formats.base import OutputFormat
from sensorium.prompt.formats.detect import Evidence, call_names, find_format, thinking_names
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.tokenizer import Tokenizer

CHATML = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})


def found(
    source: str, tokens: dict[str, int] | None = None, declared: object = None, **flags: str
) -> OutputFormat | None:
    style = LocalTemplate(source, CHATML).tool_style
    special = frozenset((tokens or {}).values())
    return find_format(Evidence(tokens or {}, special, source, style.written, style.shows_tools, declared), **flags)


@pytest.mark.parametrize(
    ("template", "name", "reasons"),
    [
        ("HERMES", "hermes", False),
        ("QWEN3", "hermes", True),
        ("QWEN_XML", "qwen_xml", True),
        ("GLM", "glm", True),
        ("LLAMA", "llama_json", False),
        ("MISTRAL_LIST", "mistral_list", False),
        ("MISTRAL", "mistral", False),
        ("DEEPSEEK", "deepseek_v3", False),
        ("GEMMA4", "gemma4", True),
        ("HARMONY", "harmony", True),
        ("VISION", "hermes", False),
        ("GEMMA3", "gemma3", False),
        ("PHI4", "phi4", False),
        ("KIMI", "kimi", False),
        ("SEED_OSS", "seed_oss", False),
        ("HUNYUAN", "hunyuan", True),
        ("STEP3_VL", "step3_vl", False),
        ("MINICPM5", "minicpm5", False),
    ],
)
def test_a_template_shows_its_format(template: str, name: str, reasons: bool) -> None:
    form = found(getattr(tool_templates, template))
    assert form is not None
    assert (form.name, form.has_tools, form.has_reasoning) == (name, True, reasons)


def test_dialects_are_told_by_what_the_template_writes() -> None:
    granite = tool_templates.HERMES.replace('<tool_call>\n{"name"', '<tool_call>[{"name"').replace(
        "}\n</tool_call>", "}]"
    )
    assert (form := found(granite)) is not None
    assert form.name == "granite"
    compact = tool_templates.GLM.replace("\n<arg_value>", "<arg_value>").replace("name }}\n", "name }}")
    assert (form := found(compact)) is not None
    assert form.name == "glm47"
    v11 = tool_templates.MISTRAL.replace("[ARGS]", "")
    assert (form := found(v11)) is not None
    assert form.name == "mistral_v11"


def test_a_format_that_no_rule_names_is_found_by_trying() -> None:
    """The words of another family in the template's text do not lead astray."""
    source = tool_templates.HERMES.replace("{% if tools %}", "{# [TOOL_CALLS] <arg_key> #}{% if tools %}")
    assert (form := found(source)) is not None
    assert form.name == "hermes"


def test_the_vocabulary_says_it_where_the_template_writes_no_calls() -> None:
    source = tool_templates.KIMI.replace("<|im_middle|>", "")
    assert found(source) is None
    assert (form := found(source, {"<tool_call>": 5})) is not None
    assert form.name == "hermes"
    assert "<tool_call>" in form.markers


def test_what_content_stands_between_is_told_by_the_template_or_the_vocabulary() -> None:
    """Two families with one pair of tags around their thoughts."""
    tags = {"<think>": 1, "</think>": 2}
    plain, marked = (
        found(tool_templates.HERMES, tags),
        found(tool_templates.HERMES, {**tags, "<response>": 3, "</response>": 4}),
    )
    assert plain is not None
    assert marked is not None
    assert "<response>" not in plain.markers
    assert "<response>" in marked.reasoning_markers


def test_no_tools_in_the_template_no_tools_at_all() -> None:
    assert found(tool_templates.NO_TOOLS) is None
    form = found(tool_templates.NO_TOOLS, {"<think>": 1, "</think>": 2, "<tool_call>": 3})
    assert form is not None
    assert (form.has_tools, form.has_reasoning) == (False, True)


def test_calls_that_cannot_be_read_are_none_and_a_flag_is_named(caplog: pytest.LogCaptureFixture) -> None:
    odd = tool_templates.HERMES.replace('"name"', "'fn'")
    with caplog.at_level(logging.WARNING):
        assert found(odd) is None
    assert "--tool-call-parser" in caplog.text
    assert (form := found(odd, calls="hermes")) is not None
    assert form.has_tools


def test_flags_are_names_of_ours_or_of_vllms() -> None:
    for flag, name in (("qwen3_coder", "qwen_xml"), ("llama3_json", "llama_json"), ("openai", "harmony")):
        assert (form := found(tool_templates.HERMES, calls=flag)) is not None
        assert form.name == name
    assert (form := found(tool_templates.HERMES, thinking="deepseek_r1")) is not None
    assert form.has_reasoning
    assert found(tool_templates.HERMES, calls="none") is None
    assert (form := found(tool_templates.QWEN3, thinking="none")) is not None
    assert not form.has_reasoning
    with pytest.raises(StartupError, match=r"--tool-call-parser: 'hermess' is not one of auto, .*hermes"):
        found(tool_templates.HERMES, calls="hermess")
    with pytest.raises(StartupError, match="--reasoning-parser"):
        found(tool_templates.HERMES, thinking="thonk")
    assert {"hermes", "none", "qwen3_coder"} <= set(call_names())
    assert {"think", "deepseek_r1"} <= set(thinking_names())


def test_a_flag_does_not_make_a_template_show_tools(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert found(tool_templates.NO_TOOLS, calls="hermes") is None
    assert "shows no tools" in caplog.text


def test_tokens_are_those_that_markers_are_made_of() -> None:
    form = found(tool_templates.GEMMA4, {"<|channel>": 1, "<channel|>": 2, "<|tool_call>": 3, "x": 4, '<|"|>': 5})
    assert form is not None
    assert {"<|channel>", "<channel|>", "<|tool_call>", '<|"|>'} <= set(form.markers)
    assert "x" not in form.markers
    assert "<|channel>" in form.reasoning_markers
    assert form.ends == ()
    assert (form := found(tool_templates.GEMMA4, {"<|tool_response>": 1})) is not None
    assert form.ends == ("<|tool_response>",)


CALLS: dict[str, Any] = {"open": "<do>", "close": "</do>", "repeats": True, "content": "json"}
CONTENT: dict[str, Any] = {"close": "<|im_end|>", "content": "text"}
NAMED = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"}}
LISTED = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"tool_calls": {**CALLS, "transform": {"type": "function", "function": "{content}"}}},
            '<mull>Hm.</mull>I look.<do>{"name": "probe_tool", "arguments": {"place": "a"}}</do>',
        ),
        (
            {"tool_calls": {**CALLS, "transform": NAMED}},
            '<do>{"name": "probe_tool", "parameters": {"place": "b"}}</do>\n<do>{"name": "f", "parameters": {}}</do>',
        ),
        (
            {"tool_calls": {**CALLS, "repeats": False, "transform": LISTED, "transform_each": True}},
            '<do>[{"name": "probe_tool", "arguments": {"place": "b"}}, {"name": "f", "arguments": {"a": [1]}}]</do>',
        ),
        (
            {
                "tool_calls": {
                    **CALLS,
                    "repeats": False,
                    "content": "python-call-list",
                    "transform": LISTED,
                    "transform_each": True,
                }
            },
            '<mull>Hm.</mull><do>[probe_tool(place="b", count=3), f()]</do>',
        ),
        ({"content": {"open": "<say>", "close": "</say>"}}, "<mull>Hm.</mull>\n<say>\nYes.\n</say>"),
    ],
)
def test_what_the_checkpoint_declares_is_read_as_transformers_reads_it(fields: dict[str, Any], text: str) -> None:
    from transformers.utils.chat_parsing import parse_response

    thinking = {"open": "<mull>", "close": "</mull>", "content": "text"}
    template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"thinking": thinking, "content": CONTENT, **fields},
    }
    form = found(tool_templates.KIMI.replace("<|im_middle|>", ""), declared=template)
    assert form is not None
    assert (form.name, form.has_reasoning) == ("response_template", True)
    expected = parse_response(f"{text}<|im_end|>", template, prefix="")
    calls = [(one["function"]["name"], one["function"]["arguments"]) for one in expected.get("tool_calls", [])]
    for pieces in (text, list(text)):
        whole = read(form, pieces)
        assert (whole.reasoning, whole.text.strip()) == (expected.get("thinking", ""), expected.get("content", ""))
        assert whole.parsed == calls


def test_what_a_checkpoint_declares_counts_where_nothing_else_is_known() -> None:
    template = {"fields": {"tool_calls": CALLS, "content": CONTENT}}
    assert (form := found(tool_templates.HERMES, declared=template)) is not None
    assert form.name == "hermes"
    odd = tool_templates.HERMES.replace("<tool_call>", "<do>").replace("</tool_call>", "</do>")
    assert found(odd) is None
    assert (form := found(odd, declared=template)) is not None
    assert form.name == "response_template"
    for field in ({**CALLS, "open": None, "open_pattern": "<do>"}, {**CALLS, "transform": {"function": {}}}, "x", None):
        assert found(odd, declared={"fields": {"tool_calls": field}}) is None
