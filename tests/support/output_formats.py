"""Output formats for tests: tools, what a scanner's deltas say put together, and writers that are not the server's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sensorium.prompt.formats.base import Arguments, Call, Delta, OutputFormat, Reasoning, Text, Tool
from sensorium.prompt.formats.catalogue import HARMONY, SYNTAXES
from sensorium.prompt.formats.detect import assembled

Calls = Sequence[tuple[str, dict[str, Any]]]


def tool(name: str, properties: Mapping[str, Any] | None = None, **more: Any) -> Tool:
    schema = {"type": "object", "properties": dict(properties or {}), **more.pop("schema", {})}
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


TOOLS: list[Tool] = [
    tool(
        "get_weather",
        {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "heat": {"type": "number"},
            "live": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "more": {"type": "object"},
        },
    ),
    tool("get_time"),
]
NAMES = [*SYNTAXES, HARMONY]


def named(name: str, thinking: str = "none", tokens: Mapping[str, int] | None = None) -> OutputFormat:
    tokens = tokens or {}
    found = assembled(name, thinking, tokens, frozenset(tokens.values()))
    assert found is not None
    return found


@dataclass
class Read:
    """An answer as a client puts it together."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, deltas: Iterable[Delta]) -> Read:
        read = cls()
        for delta in deltas:
            match delta:
                case Text(text):
                    assert text
                    read.text += text
                case Reasoning(text):
                    assert text
                    read.reasoning += text
                case Call(index, name):
                    assert index == len(read.calls)
                    read.calls.append((name, ""))
                case Arguments(index, text):
                    assert text
                    assert index == len(read.calls) - 1
                    read.calls[index] = (read.calls[index][0], read.calls[index][1] + text)
        return read

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def pieces(text: str, ends: Iterable[int]) -> list[str]:
    """A text cut at these places."""
    at = [0, *sorted({end for end in ends if 0 < end < len(text)}), len(text)]
    return [text[start:end] for start, end in pairwise(at)]


def read(
    form: OutputFormat,
    text: str | Sequence[str],
    *,
    tail: str = "",
    tools: Sequence[Tool] = TOOLS,
    complete: bool = True,
) -> Read:
    """An answer, whole or in pieces, through the format's scanner."""
    scanner = form.scanner(tail, tools)
    deltas: list[Delta] = []
    for piece in [text] if isinstance(text, str) else text:
        deltas += scanner.push(piece)
    return Read.of([*deltas, *scanner.finish(complete=complete)])


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _python(value: Any) -> str:
    return repr(value)


def _gemma(value: Any, quote: str) -> str:
    match value:
        case str():
            return f"{quote}{value}{quote}"
        case dict():
            return "{" + ",".join(f"{key}:{_gemma(one, quote)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ",".join(_gemma(one, quote) for one in value) + "]"
    return compact(value)


def _objects(calls: Calls, key: str = "arguments") -> list[str]:
    return [compact({"name": name, key: arguments}) for name, arguments in calls]


def _raw(value: Any) -> str:
    return value if isinstance(value, str) else compact(value)


def _hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in _objects(calls))


def _seed_oss(calls: Calls) -> str:
    return "\n".join(
        f"<seed:tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>{_raw(value)}</parameter>\n" for key, value in arguments.items())
        + "</function>\n</seed:tool_call>"
        for name, arguments in calls
    )


def _invokes(calls: Calls, invoke: str, parameter: str, line: str = "", before: str = "", after: str = "") -> list[str]:
    """Tags with the names in attributes; `before` and `after` each call."""
    return [
        f'{before}<{invoke} name="{name}">{line}'
        + "".join(f'<{parameter} name="{key}">{_raw(value)}</{parameter}>{line}' for key, value in arguments.items())
        + f"</{invoke}>{after}"
        for name, arguments in calls
    ]


def _step3(calls: Calls) -> str:
    before, after = "<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>"
    written = _invokes(calls, "steptml:invoke", "steptml:parameter", before=before, after=after)
    return f"<｜tool_calls_begin｜>{''.join(written)}<｜tool_calls_end｜>"


def _hunyuan_v3(calls: Calls) -> str:
    written = "\n".join(
        f"<tool_call>{name}<tool_sep>\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_raw(value)}</arg_value>\n" for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )
    return f"<tool_calls>\n{written}\n</tool_calls>"


def _cohere(calls: Calls) -> str:
    written = (
        compact({"tool_call_id": str(index), "tool_name": name, "parameters": arguments})
        for index, (name, arguments) in enumerate(calls)
    )
    listed = ",\n    ".join(written)
    return f"<|START_ACTION|>[\n    {listed}\n]<|END_ACTION|>"


def _qwen_xml(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{_raw(value)}\n</parameter>\n" for key, value in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def _glm(calls: Calls, line: str) -> str:
    return line.join(
        f"<tool_call>{name}{line}"
        + "".join(
            f"<arg_key>{key}</arg_key>{line}<arg_value>{_raw(value)}</arg_value>{line}"
            for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def _dsml(calls: Calls) -> str:
    tag = "｜DSML｜"
    invokes = "".join(
        f'<{tag}invoke name="{name}">\n'
        + "".join(
            f'<{tag}parameter name="{key}" string="{compact(isinstance(value, str))}">{_raw(value)}</{tag}parameter>\n'
            for key, value in arguments.items()
        )
        + f"</{tag}invoke>\n"
        for name, arguments in calls
    )
    return f"<{tag}function_calls>\n{invokes}</{tag}function_calls>"


def _pythonic(calls: Calls) -> str:
    written = (
        f"{name}({', '.join(f'{key}={_python(value)}' for key, value in arguments.items())})"
        for name, arguments in calls
    )
    return f"[{', '.join(written)}]"


def _gemma_calls(calls: Calls, start: str, end: str, quote: str) -> str:
    return "".join(f"{start}call:{name}{_gemma(arguments, quote)}{end}" for name, arguments in calls)


def _deepseek(calls: Calls, *, is_fenced: bool) -> str:
    written = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{compact(arguments)}\n```<｜tool▁call▁end｜>"
        if is_fenced
        else f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{compact(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    line = "\n" if is_fenced else ""
    return f"<｜tool▁calls▁begin｜>{line.join(written)}<｜tool▁calls▁end｜>"


def _kimi(calls: Calls) -> str:
    written = (
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{compact(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{''.join(written)}<|tool_calls_section_end|>"


def _harmony(calls: Calls) -> str:
    return "<|call|><|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{compact(arguments)}"
        for name, arguments in calls
    )


WRITERS: Mapping[str, Callable[[Calls], str]] = {
    "hermes": _hermes,
    "qwen_xml": _qwen_xml,
    "seed_oss": _seed_oss,
    "minimax_m2": lambda calls: (
        "<minimax:tool_call>\n" + "\n".join(_invokes(calls, "invoke", "parameter", "\n")) + "\n</minimax:tool_call>"
    ),
    "minicpm5": lambda calls: "".join(_invokes(calls, "function", "param")),
    "step3": _step3,
    "llama_json": lambda calls: "; ".join(_objects(calls, "parameters")),
    "pythonic": _pythonic,
    "llama4_pythonic": lambda calls: f"<|python_start|>{_pythonic(calls)}<|python_end|>",
    "mistral": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{compact(one)}" for name, one in calls),
    "mistral_v11": lambda calls: "".join(f"[TOOL_CALLS]{name}{compact(one)}" for name, one in calls),
    "mistral_list": lambda calls: f"[TOOL_CALLS] [{', '.join(_objects(calls))}]",
    "phi4_functools": lambda calls: f"functools[{', '.join(_objects(calls))}]",
    "phi4": lambda calls: f"<|tool_call|>[{', '.join(_objects(calls))}]<|/tool_call|>",
    "gemma3": lambda calls: f"```tool_code\n{_pythonic(calls)}\n```",
    "gemma4": lambda calls: _gemma_calls(calls, "<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": lambda calls: _gemma_calls(calls, "<start_function_call>", "<end_function_call>", "<escape>"),
    "glm": lambda calls: _glm(calls, "\n"),
    "glm47": lambda calls: _glm(calls, ""),
    "hunyuan_v3": _hunyuan_v3,
    "deepseek_v3": lambda calls: _deepseek(calls, is_fenced=True),
    "deepseek_v31": lambda calls: _deepseek(calls, is_fenced=False),
    "deepseek_dsml": _dsml,
    "granite": lambda calls: f"<tool_call>[{', '.join(_objects(calls))}]",
    "granite_token": lambda calls: f"<|tool_call|>[{', '.join(_objects(calls))}]",
    "granite_20b": lambda calls: "\n".join(f"<function_call> {one}" for one in _objects(calls)),
    "hunyuan": lambda calls: f"<tool_calls>[{', '.join(_objects(calls))}]</tool_calls>",
    "step3_vl": lambda calls: f"<tool_calls>\n{_hermes(calls)}\n</tool_calls>",
    "longcat": lambda calls: _hermes(calls).replace("tool_call>", "longcat_tool_call>"),
    "nemotron": lambda calls: f"<TOOLCALL>[{', '.join(_objects(calls))}]</TOOLCALL>",
    "cohere": _cohere,
    "kimi": _kimi,
    "internlm": lambda calls: "\n".join(
        f"<|action_start|><|plugin|>\n{one}<|action_end|>" for one in _objects(calls, "parameters")
    ),
    "lfm2": lambda calls: f"<|tool_call_start|>{_pythonic(calls)}<|tool_call_end|>",
    HARMONY: _harmony,
}
"""Format -> calls as a model of it writes them, by another way than the server's grammars."""
