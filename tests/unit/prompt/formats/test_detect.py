"""The format that a checkpoint's template and vocabulary show, without a flag; and with one."""

from __future__ import annotations

import logging

import pytest
from support import tool_templates
from support.tiny_tokenizers import byte_level

from sensorium.errors import StartupError
from sensorium.prompt.formats.base import OutputFormat
from sensorium.prompt.formats.detect import Evidence, call_names, find_format, thinking_names
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.tokenizer import Tokenizer

CHATML = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})


def found(source: str, tokens: dict[str, int] | None = None, **flags: str) -> OutputFormat | None:
    style = LocalTemplate(source, CHATML).tool_style
    evidence = Evidence(tokens or {}, frozenset((tokens or {}).values()), source, style.written, style.shows_tools)
    return find_format(evidence, **flags)


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
    form = found(tool_templates.PHI4, {"<|tool_call|>": 5, "<|/tool_call|>": 6, "<|tool|>": 7})
    assert form is not None
    assert form.name == "phi4"
    assert {"<|tool_call|>", "<|/tool_call|>"} <= set(form.markers)


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
