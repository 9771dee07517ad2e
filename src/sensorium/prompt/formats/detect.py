"""Which format a checkpoint writes: named by a flag, or found from its chat template and vocabulary and then proved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sensorium.errors import StartupError
from sensorium.prompt.formats.base import Arguments, Call, OutputFormat, Tool
from sensorium.prompt.formats.catalogue import CALL_NAMES, ENDS, HARMONY, SYNTAXES, THINKING, THINKING_NAMES
from sensorium.prompt.formats.composed import ComposedFormat
from sensorium.prompt.formats.harmony import Harmony

AUTO, OFF = "auto", "none"
_log = logging.getLogger("sensorium")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a format is found from. `tokens`: added tokens with their ids; `special`: ids of those that no text can
    spell. `source`: the chat template. `written`: what it makes of an assistant's calls, from the assistant's header
    on, for each form of arguments it may want; "" where it fails. `shows_tools`: it tells the model of tools."""

    tokens: Mapping[str, int]
    special: frozenset[int] = frozenset()
    source: str = ""
    written: tuple[str, ...] = ()
    shows_tools: bool = False


PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["place", "count"],
        },
    },
}
PROBE_ARGUMENTS: Mapping[str, object] = {"place": "Probe 7", "count": 3}


def call_names() -> list[str]:
    """What --tool-call-parser takes."""
    return sorted({*SYNTAXES, HARMONY, *CALL_NAMES, AUTO, OFF})


def thinking_names() -> list[str]:
    """What --reasoning-parser takes."""
    return sorted({*THINKING, HARMONY, *THINKING_NAMES, AUTO, OFF})


def find_format(evidence: Evidence, *, calls: str = AUTO, thinking: str = AUTO) -> OutputFormat | None:
    """The checkpoint's format; None if it writes neither calls nor reasoning. `calls` and `thinking` are the flags.
    StartupError if they name nothing that is known."""
    known = _named(calls, SYNTAXES, CALL_NAMES, call_names(), "--tool-call-parser")
    thoughts = _named(thinking, THINKING, THINKING_NAMES, thinking_names(), "--reasoning-parser")
    if known == AUTO:
        known = _found_calls(evidence)
    elif known != OFF and not evidence.shows_tools:
        _log.warning("--tool-call-parser %s: the chat template shows no tools to the model, so they are refused", calls)
        known = OFF
    if thoughts == AUTO:
        thoughts = known if known == HARMONY else _found_thinking(evidence)
    return assembled(known, thoughts, evidence.tokens, evidence.special)


def assembled(
    calls: str, thinking: str, tokens: Mapping[str, int], special: frozenset[int] = frozenset()
) -> OutputFormat | None:
    """The format of these two names of ours, `none` for neither."""
    if HARMONY in (calls, thinking):
        harmony = Harmony()
        return Harmony(_only(harmony.markers, tokens, special), has_tools=calls == HARMONY)
    if calls == thinking == OFF:
        return None
    name = calls if calls != OFF else thinking
    syntax, think = SYNTAXES.get(calls), THINKING.get(thinking)
    whole = ComposedFormat(name, syntax, think)
    ends = tuple(end for end in ENDS.get(calls, ()) if end in tokens)
    return ComposedFormat(name, syntax, think, ends, _only(whole.markers, tokens, special))


def described(format_: OutputFormat) -> str:
    """For the log."""
    parts = ["tool calls"] * format_.has_tools + ["reasoning"] * format_.has_reasoning
    return f"{format_.name} ({' and '.join(parts)})"


def reads_back(format_: OutputFormat, written: str) -> bool:
    """Whether the format's scanner finds the probe's call in what the template wrote of it."""
    scanner = format_.scanner("", [PROBE_TOOL])
    deltas = [*scanner.push(written), *scanner.finish(complete=True)]
    names = [delta.name for delta in deltas if isinstance(delta, Call)]
    arguments = "".join(delta.text for delta in deltas if isinstance(delta, Arguments))
    try:
        return names == [PROBE_TOOL["function"]["name"]] and json.loads(arguments) == PROBE_ARGUMENTS
    except ValueError:
        return False


def _named(flag: str, own: Iterable[str], others: Mapping[str, str], known: Sequence[str], option: str) -> str:
    if flag in (AUTO, OFF, HARMONY) or flag in own:
        return flag
    if flag in others:
        return others[flag]
    raise StartupError(f"{option}: {flag!r} is not one of {', '.join(known)}")


def _only(markers: Iterable[str], tokens: Mapping[str, int], special: frozenset[int]) -> dict[str, int]:
    """Tokens that are markers or part of one. llguidance takes what looks like one for one, special or not."""
    known = tuple(markers)
    return {
        token: number
        for token, number in tokens.items()
        if (number in special or (token.startswith("<") and token.endswith(">")))
        and any(token in mark for mark in known)
    }


# Calls.


def _found_calls(evidence: Evidence) -> str:
    if not evidence.shows_tools:
        return OFF
    written = [text for text in evidence.written if _has_call(text)]
    guesses = _guesses(evidence)
    if not written:
        if guesses:
            return guesses[0]
        _log.warning(
            "the chat template shows tools, but not how calls are written, so tools are refused: "
            "--tool-call-parser names the format"
        )
        return OFF
    for name in dict.fromkeys((*guesses, *SYNTAXES, HARMONY)):
        found = assembled(name, OFF, {})
        if found is not None and any(reads_back(found, text) for text in written):
            return _dialect(name, written)
    _log.warning("calls as the chat template writes them cannot be read, so tools are refused: --tool-call-parser")
    return OFF


def _has_call(written: str) -> bool:
    return str(PROBE_TOOL["function"]["name"]) in written


def _guesses(evidence: Evidence) -> list[str]:
    """Names in the order in which they are tried: what the template's source says, then the vocabulary."""
    source, tokens = evidence.source, evidence.tokens

    def both(*texts: str) -> Callable[[], bool]:
        return lambda: all(text in source for text in texts)

    def any_of(*texts: str) -> Callable[[], bool]:
        return lambda: any(text in source for text in texts)

    rules: list[tuple[str, Callable[[], bool]]] = [
        (HARMONY, both("<|channel|>", "<|message|>")),
        ("gemma4", any_of("<|tool_call>call:", '<|"|>')),
        ("functiongemma", both("<start_function_call>")),
        ("deepseek_dsml", both("｜DSML｜")),
        ("deepseek_v3", both("<｜tool▁calls▁begin｜>", "```json")),
        ("deepseek_v31", both("<｜tool▁calls▁begin｜>")),
        ("glm", both("<arg_key>")),
        ("qwen_xml", both("<function=", "<parameter=")),
        ("mistral", lambda: "[TOOL_CALLS]" in source and ("[ARGS]" in source or "[ARGS]" in tokens)),
        ("mistral_list", both("[TOOL_CALLS]")),
        ("kimi", both("<|tool_call_begin|>")),
        ("lfm2", both("<|tool_call_start|>")),
        ("internlm", both("<|action_start|>")),
        ("phi4_functools", both("functools[")),
        ("phi4", lambda: "<|tool|>" in source and ("<|tool_call|>" in source or "<|tool_call|>" in tokens)),
        ("granite_token", both("<|tool_call|>")),
        ("llama4_pythonic", any_of("<|python_start|>")),
        ("llama_json", lambda: '"parameters": ' in source and any_of("<|python_tag|>", "ipython")()),
        ("hermes", both("<tool_call>")),
        ("mistral_list", lambda: "[TOOL_CALLS]" in tokens),
        ("gemma4", lambda: "<|tool_call>" in tokens),
        ("hermes", lambda: "<tool_call>" in tokens),
        ("llama_json", lambda: "<|python_tag|>" in tokens),
    ]
    return [name for name, holds in rules if holds()]


def _dialect(name: str, written: Sequence[str]) -> str:
    """Of formats that read each other's calls, the one that writes them as the template does."""
    choose = _DIALECTS.get(name)
    return name if choose is None else choose(name, written)


def _mistral(_name: str, written: Sequence[str]) -> str:
    text = _joined(written)
    if "[TOOL_CALLS][" in text and "[TOOL_CALLS][ARGS]" not in text:
        return "mistral_list"
    return "mistral" if "[ARGS]" in text else "mistral_v11"


def _listed(name: str, written: Sequence[str]) -> str:
    return "granite" if "<tool_call>[" in _joined(written) else name


def _deepseek(_name: str, written: Sequence[str]) -> str:
    return "deepseek_v3" if "```json" in _joined(written) else "deepseek_v31"


def _glm(name: str, written: Sequence[str]) -> str:
    return name if any("probe_tool\n" in one for one in written) else "glm47"


def _joined(written: Sequence[str]) -> str:
    """Everything that was written, without white space."""
    return "".join("".join(written).split())


_DIALECTS: Mapping[str, Callable[[str, Sequence[str]], str]] = {
    "mistral": _mistral,
    "mistral_list": _mistral,
    "hermes": _listed,
    "granite": _listed,
    "deepseek_v3": _deepseek,
    "deepseek_v31": _deepseek,
    "glm": _glm,
}


# Reasoning.


def _found_thinking(evidence: Evidence) -> str:
    source, tokens = evidence.source, evidence.tokens
    for name, think in THINKING.items():
        start = think.start.strip()
        if start in source or think.end in source or (start in tokens and think.end in tokens):
            return name
    return OFF
