"""What stands in for a template that leaves tools or calls out: words and marks in the family's form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Calls = Sequence[Mapping[str, Any]]
"""Calls as OpenAI writes them, their arguments objects."""


@dataclass(frozen=True, slots=True)
class Told:
    """`calls`: what an assistant's turn has behind its text. `marks`: tokens among that. `tools`: what a chat says of
    its tools; None where the template says it. `result_role`: who says a tool's result, with `result` around it."""

    calls: Callable[[Calls], str]
    marks: tuple[str, ...] = ()
    tools: Callable[[Sequence[Mapping[str, Any]]], str] | None = None
    result_role: str = "tool"
    result: str = "%s"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _phi4_calls(calls: Calls) -> str:
    listed = (_json({"name": name, "arguments": arguments}) for name, arguments in map(_of, calls))
    return f"<|tool_call|>[{', '.join(listed)}]<|/tool_call|>"


def _kimi_calls(calls: Calls) -> str:
    listed = (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{_json(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(map(_of, calls))
    )
    return f"<|tool_calls_section_begin|>{''.join(listed)}<|tool_calls_section_end|>"


def _code_calls(calls: Calls) -> str:
    listed = (
        f"{name}({', '.join(f'{key}={_python(value)}' for key, value in arguments.items())})"
        for name, arguments in map(_of, calls)
    )
    return f"```tool_code\n[{', '.join(listed)}]\n```"


def _python(value: object) -> str:
    """A JSON value in Python's words, its strings in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(key)}: {_python(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return repr(value) if value is None or isinstance(value, bool) else _json(value)


def _of(call: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return call["function"]["name"], call["function"]["arguments"]


def _code_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    listed = _json([tool["function"] for tool in tools])
    return (
        f"You have access to these functions:\n{listed}\n"
        "To call functions, answer with nothing but a block of tool_code: a Python list of calls with keyword "
        'arguments, for example\n```tool_code\n[name(first="text", second=3)]\n```\n'
        "What they return comes back in blocks of tool_output. If no function helps, answer in words."
    )


PHI4 = Told(_phi4_calls, ("<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"), result_role="tool_response")
KIMI = Told(
    _kimi_calls,
    (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
)
GEMMA3 = Told(_code_calls, tools=_code_tools, result_role="user", result="```tool_output\n%s\n```")


def told_for(source: str, *, shows_tools: bool, writes_calls: bool) -> Told | None:
    """What this template needs; None where it says all itself or its family is unknown."""
    if writes_calls:
        return None
    if not shows_tools:
        return GEMMA3 if "<start_of_turn>" in source else None
    if "<|tool|>" in source:
        return PHI4
    return KIMI if "<|im_middle|>" in source else None
