"""The ways of writing calls and reasoning that are known, by name. Literal data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sensorium.prompt.formats.code_calls import CodeBlockCalls
from sensorium.prompt.formats.composed import Think
from sensorium.prompt.formats.json_calls import JsonCalls
from sensorium.prompt.formats.named_calls import MistralCalls, SectionCalls
from sensorium.prompt.formats.notation import Gemma
from sensorium.prompt.formats.notation_calls import GemmaCalls, PythonicCalls
from sensorium.prompt.formats.syntax import Syntax, Wrapping
from sensorium.prompt.formats.xml_calls import XmlCalls

HARMONY = "harmony"
_TAGGED = ("<tool_call>", "</tool_call>")
_LISTED = (("<tool_calls>", "<tool_call>"), ("</tool_call>", "</tool_calls>"))

_GLM = XmlCalls(
    block_start="<tool_call>",
    block_end="</tool_call>",
    call_start="",
    name_end="\n",
    call_end="</tool_call>",
    key_start="<arg_key>",
    key_end="</arg_key>",
    value_start="<arg_value>",
    value_end="</arg_value>",
)
_QWEN_XML = XmlCalls(
    block_start="<tool_call>",
    block_end="</tool_call>",
    call_start="<function=",
    name_end=">",
    call_end="</function>",
    key_start="<parameter=",
    key_end=">",
    value_start="",
    value_end="</parameter>",
    is_padded=True,
)
_DEEPSEEK = SectionCalls(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
)

SYNTAXES: Mapping[str, Syntax] = {
    "hermes": JsonCalls(
        _TAGGED[:1], _TAGGED[1:], Wrapping(each_before="<tool_call>\n", each_after="\n</tool_call>", between="\n")
    ),
    "qwen_xml": _QWEN_XML,
    "seed_oss": replace(_QWEN_XML, block_start="<seed:tool_call>", block_end="</seed:tool_call>", is_padded=False),
    "minimax_m2": XmlCalls(
        block_start="<minimax:tool_call>",
        block_end="</minimax:tool_call>",
        call_start='<invoke name="',
        name_end='">',
        call_end="</invoke>",
        key_start='<parameter name="',
        key_end='">',
        value_start="",
        value_end="</parameter>",
        is_block_of_many=True,
    ),
    "minicpm5": XmlCalls(
        block_start="",
        block_end="",
        call_start='<function name="',
        name_end='">',
        call_end="</function>",
        key_start='<param name="',
        key_end='">',
        value_start="",
        value_end="</param>",
        line="",
        cdata=("<![CDATA[", "]]>"),
    ),
    "step3": XmlCalls(
        block_start="<｜tool_calls_begin｜>",
        block_end="<｜tool_calls_end｜>",
        call_start='<steptml:invoke name="',
        name_end='">',
        call_end="</steptml:invoke>",
        key_start='<steptml:parameter name="',
        key_end='">',
        value_start="",
        value_end="</steptml:parameter>",
        line="",
        is_block_of_many=True,
        lead=("<｜tool_call_begin｜>", "function", "<｜tool_sep｜>"),
        trail=("<｜tool_call_end｜>",),
    ),
    "llama_json": JsonCalls(
        ("<|python_tag|>",), wrapping=Wrapping(between="; "), is_bare=True, argument_key="parameters"
    ),
    "pythonic": PythonicCalls(is_bare=True),
    "llama4_pythonic": PythonicCalls(("<|python_start|>",), ("<|python_end|>",), is_bare=True),
    "mistral": MistralCalls(is_list=False),
    "mistral_v11": MistralCalls(is_list=False, has_args_mark=False),
    "mistral_list": MistralCalls(is_list=True),
    "phi4_functools": JsonCalls(("functools[",), (), Wrapping("functools[", between=", ", after="]")),
    "phi4": JsonCalls(
        ("<|tool_call|>",), ("<|/tool_call|>",), Wrapping("<|tool_call|>[", between=", ", after="]<|/tool_call|>")
    ),
    "gemma3": CodeBlockCalls(),
    "gemma4": GemmaCalls("<|tool_call>", "<tool_call|>", Gemma('<|"|>')),
    "functiongemma": GemmaCalls("<start_function_call>", "<end_function_call>", Gemma("<escape>")),
    "glm": _GLM,
    "glm47": replace(_GLM, name_end="", line=""),
    "hunyuan_v3": replace(
        _GLM,
        block_start="<tool_calls>",
        block_end="</tool_calls>",
        call_start="<tool_call>",
        name_end="<tool_sep>",
        is_block_of_many=True,
    ),
    "deepseek_v3": replace(_DEEPSEEK, is_fenced=True),
    "deepseek_v31": _DEEPSEEK,
    "deepseek_dsml": XmlCalls(
        block_start="<｜DSML｜function_calls>",
        block_end="</｜DSML｜function_calls>",
        call_start='<｜DSML｜invoke name="',
        name_end='">',
        call_end="</｜DSML｜invoke>",
        key_start='<｜DSML｜parameter name="',
        key_end='">',
        value_start="",
        value_end="</｜DSML｜parameter>",
        flag='" string="',
        is_block_of_many=True,
    ),
    "granite": JsonCalls(_TAGGED[:1], _TAGGED[1:], Wrapping("<tool_call>[", between=", ", after="]")),
    "granite_token": JsonCalls(("<|tool_call|>",), (), Wrapping("<|tool_call|>[", between=", ", after="]")),
    "granite_20b": JsonCalls(("<function_call>",), (), Wrapping(each_before="<function_call> ", between="\n")),
    "hunyuan": JsonCalls(*_LISTED, Wrapping("<tool_calls>[", between=", ", after="]</tool_calls>"), _TAGGED[:1]),
    "step3_vl": JsonCalls(
        *_LISTED,
        Wrapping("<tool_calls>\n", "<tool_call>\n", "\n</tool_call>", "\n", "\n</tool_calls>"),
        lead=_TAGGED[:1],
    ),
    "longcat": JsonCalls(
        ("<longcat_tool_call>",),
        ("</longcat_tool_call>",),
        Wrapping(each_before="<longcat_tool_call>\n", each_after="\n</longcat_tool_call>", between="\n"),
    ),
    "nemotron": JsonCalls(
        ("<TOOLCALL>",), ("</TOOLCALL>",), Wrapping("<TOOLCALL>[", between=", ", after="]</TOOLCALL>")
    ),
    "cohere": JsonCalls(
        ("<|START_ACTION|>",),
        ("<|END_ACTION|>",),
        Wrapping("<|START_ACTION|>[\n    ", between=",\n    ", after="\n]<|END_ACTION|>"),
        argument_key="parameters",
        name_key="tool_name",
        id_key="tool_call_id",
    ),
    "kimi": SectionCalls(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        has_ids=True,
    ),
    "internlm": JsonCalls(
        ("<|action_start|>",),
        ("<|action_end|>",),
        Wrapping(each_before="<|action_start|><|plugin|>\n", each_after="<|action_end|>", between="\n"),
        lead=("<|plugin|>", "<|interpreter|>"),
        argument_key="parameters",
    ),
    "lfm2": PythonicCalls(("<|tool_call_start|>",), ("<|tool_call_end|>",)),
}
"""Name -> how calls are written. `harmony` has its own class."""

CALL_NAMES: Mapping[str, str] = {
    "qwen3_coder": "qwen_xml",
    "qwen3_xml": "qwen_xml",
    "qwen3_5": "qwen_xml",
    "step3p5": "qwen_xml",
    "llama3_json": "llama_json",
    "llama4_json": "llama_json",
    "openai": HARMONY,
    "gpt_oss": HARMONY,
    "phi4_mini_json": "phi4_functools",
    "glm45": "glm",
    "deepseek_v32": "deepseek_dsml",
    "deepseek_v4": "deepseek_dsml",
    "deepseek_r1": "deepseek_v3",
    "granite4": "hermes",
    "granite-20b-fc": "granite_20b",
    "kimi_k2": "kimi",
    "minicpm": "hermes",
    "olmo3": "pythonic",
    "qwen": "hermes",
    "ernie45": "hermes",
    "hunyuan_a13b": "hunyuan",
    "hy_v3": "hunyuan_v3",
    "jamba": "hunyuan",
    "cohere_command3": "cohere",
    "mimo": "qwen_xml",
    "nemotron_json": "nemotron",
}
"""Names of vLLM's for --tool-call-parser -> ours."""

ENDS: Mapping[str, tuple[str, ...]] = {
    "llama_json": ("<|eom_id|>",),
    "llama4_pythonic": ("<|eom|>",),
    "gemma4": ("<|tool_response>",),
    "functiongemma": ("<start_function_response>",),
}
"""Tokens with which an answer of calls ends."""

THINKING: Mapping[str, Think] = {
    "think": Think("<think>", "</think>"),
    "mistral": Think("[THINK]", "[/THINK]"),
    "gemma4": Think("<|channel>thought\n", "<channel|>"),
    "granite": Think("Here is my thought process:", "Here is my response:", is_sentence=True),
    "seed_oss": Think("<seed:think>", "</seed:think>"),
    "cohere": Think("<|START_THINKING|>", "<|END_THINKING|>", frame=("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    "ernie": Think("<think>", "</think>", frame=("<response>", "</response>")),
    "hunyuan": Think("<think>", "</think>", frame=("<answer>", "</answer>")),
    "kimi_vl": Think("◁think▷", "◁/think▷"),
}
"""Name -> what reasoning stands between. `harmony` has its own class."""

THINKING_NAMES: Mapping[str, str] = {
    **dict.fromkeys(
        """qwen3 deepseek_r1 deepseek_v3 deepseek_v31 deepseek_v32 deepseek_v4 glm45 glm47 minicpm
        minimax_m2 nemotron nemotron_v3 olmo3 smollm3 step3 step3p5 holo2 internvl kimi_k2 qwq""".split(),
        "think",
    ),
    "magistral": "mistral",
    "granite3": "granite",
    "openai_gptoss": HARMONY,
    "gpt_oss": HARMONY,
    "cohere_command3": "cohere",
    "ernie45": "ernie",
    "hunyuan_a13b": "hunyuan",
}
"""Names of vLLM's for --reasoning-parser -> ours."""
