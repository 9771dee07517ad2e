"""Which format a checkpoint writes: named by a flag, or found from its chat template and vocabulary and then proved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sensorium.errors import StartupError
from sensorium.prompt.formats.base import Arguments, Call, OutputFormat, Tool
from sensorium.prompt.formats.catalogue import CALL_NAMES, ENDS, HARMONY, SYNTAXES, THINKING, THINKING_NAMES
from sensorium.prompt.formats.composed import ComposedFormat, Think
from sensorium.prompt.formats.declared import declared_calls, declared_thinking
from sensorium.prompt.formats.harmony import Harmony
from sensorium.prompt.formats.syntax import Syntax

AUTO, OFF = "auto", "none"
DECLARED = "response_template"
"""Names what the checkpoint itself says, where nothing that is known does."""
_log = logging.getLogger("sensorium")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a format is found from. `tokens`: added tokens with their ids; `special`: ids of those that no text can
    spell. `source`: the chat template. `written`: what it makes of an assistant's calls, from the assistant's header
    on, for each form of arguments it may want; "" where it fails. `shows_tools`: it tells the model of tools.
    `response_template`: what tokenizer_config.json has under this name."""

    tokens: Mapping[str, int]
    special: frozenset[int] = frozenset()
    source: str = ""
    written: tuple[str, ...] = ()
    shows_tools: bool = False
    response_template: object = None


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
    if DECLARED in (known, thoughts):
        syntax = declared_calls(evidence.response_template) if known == DECLARED else SYNTAXES.get(known)
        think = declared_thinking(evidence.response_template) if thoughts == DECLARED else THINKING.get(thoughts)
        name = known if known != OFF else thoughts
        return _composed(name, syntax, think, ENDS.get(known, ()), evidence.tokens, evidence.special)
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
    return _composed(name, SYNTAXES.get(calls), THINKING.get(thinking), ENDS.get(calls, ()), tokens, special)


def _composed(
    name: str,
    syntax: Syntax | None,
    think: Think | None,
    ends: Iterable[str],
    tokens: Mapping[str, int],
    special: frozenset[int],
) -> ComposedFormat:
    whole = ComposedFormat(name, syntax, think)
    known = tuple(end for end in ends if end in tokens)
    return ComposedFormat(name, syntax, think, known, _only(whole.markers, tokens, special))


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
    declared = declared_calls(evidence.response_template)
    if not written:
        if guesses or declared is not None:
            return guesses[0] if guesses else DECLARED
        _log.warning(
            "the chat template shows tools, but not how calls are written, so tools are refused: "
            "--tool-call-parser names the format"
        )
        return OFF
    for name in dict.fromkeys((*guesses, *SYNTAXES, HARMONY)):
        found = assembled(name, OFF, {})
        if found is not None and any(reads_back(found, text) for text in written):
            return _dialect(name, written)
    if declared is not None and any(reads_back(ComposedFormat(DECLARED, declared), text) for text in written):
        return DECLARED
    _log.warning("calls as the chat template writes them cannot be read, so tools are refused: --tool-call-parser")
    return OFF


def _has_call(written: str) -> bool:
    return str(PROBE_TOOL["function"]["name"]) in written


_SIGNS: Sequence[tuple[str, tuple[tuple[str, ...], ...]]] = (
    (HARMONY, (("<|channel|>",), ("<|message|>",))),
    ("gemma4", (("<|tool_call>call:", '<|"|>'),)),
    ("functiongemma", (("<start_function_call>",),)),
    ("gemma3", (("<start_of_turn>",),)),
    ("deepseek_dsml", (("｜DSML｜",),)),
    ("deepseek_v3", (("<｜tool▁calls▁begin｜>",), ("```json",))),
    ("deepseek_v31", (("<｜tool▁calls▁begin｜>",),)),
    ("hunyuan_v3", (("<arg_key>",), ("<tool_sep>",))),
    ("glm", (("<arg_key>",),)),
    ("minimax_m2", (("<minimax:tool_call>",),)),
    ("seed_oss", (("<seed:tool_call>",),)),
    ("step3", (("<steptml:invoke",),)),
    ("minicpm5", (('<function name="',), ('<param name="',))),
    ("qwen_xml", (("<function=",), ("<parameter=",))),
    ("mistral", (("[TOOL_CALLS]",), ("[ARGS]",))),
    ("mistral_list", (("[TOOL_CALLS]",),)),
    ("kimi", (("<|tool_call_begin|>",),)),
    ("cohere", (("<|START_ACTION|>",),)),
    ("longcat", (("<longcat_tool_call>",),)),
    ("nemotron", (("<TOOLCALL>",),)),
    ("granite_20b", (("<function_call>",),)),
    ("lfm2", (("<|tool_call_start|>",),)),
    ("internlm", (("<|action_start|>",),)),
    ("phi4_functools", (("functools[",),)),
    ("phi4", (("<|tool|>",), ("<|tool_call|>",))),
    ("granite_token", (("<|tool_call|>",),)),
    ("llama4_pythonic", (("<|python_start|>",),)),
    ("llama_json", (('"parameters": ',), ("<|python_tag|>", "ipython"))),
    ("hunyuan", (("<tool_calls>",),)),
    ("hermes", (("<tool_call>",),)),
)
"""Format -> what gives it away, in the order in which they are tried: one of the first in the template's source, and
one of each of the others there or in the vocabulary."""
_TOKENS: Sequence[tuple[str, str]] = (
    ("kimi", "<|tool_call_begin|>"),
    ("mistral_list", "[TOOL_CALLS]"),
    ("gemma4", "<|tool_call>"),
    ("hermes", "<tool_call>"),
    ("llama_json", "<|python_tag|>"),
)
"""The same where only the vocabulary says it."""


def _guesses(evidence: Evidence) -> list[str]:
    """Names in the order in which they are tried: what the template's source says, then the vocabulary."""

    def holds(first: Sequence[str], *others: Sequence[str]) -> bool:
        return any(text in evidence.source for text in first) and all(
            any(text in evidence.source or text in evidence.tokens for text in other) for other in others
        )

    said = [name for name, signs in _SIGNS if holds(*signs)]
    return said + [name for name, token in _TOKENS if token in evidence.tokens]


def _dialect(name: str, written: Sequence[str]) -> str:
    """Of formats that read each other's calls, the one that writes them as the template does."""
    choose = _DIALECTS.get(name)
    return name if choose is None else choose(name, written)


def _mistral(_name: str, written: Sequence[str]) -> str:
    text = _joined(written)
    if "[TOOL_CALLS][" in text and "[TOOL_CALLS][ARGS]" not in text:
        return "mistral_list"
    return "mistral" if "[ARGS]" in text else "mistral_v11"


def _wrapped(_name: str, written: Sequence[str]) -> str:
    return "hunyuan" if "<tool_calls>[" in _joined(written) else "step3_vl"


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
    "hunyuan": _wrapped,
    "hermes": _listed,
    "granite": _listed,
    "deepseek_v3": _deepseek,
    "deepseek_v31": _deepseek,
    "glm": _glm,
}


# Reasoning.


def _found_thinking(evidence: Evidence) -> str:
    """Of those between the same tags, the one that marks content as the checkpoint does."""
    found = [name for name, think in THINKING.items() if _is_shown(think.start.strip(), think.end, evidence)]
    framed = [name for name in found if _frame_is_shown(THINKING[name].frame, evidence)]
    plain = [name for name in found if not THINKING[name].frame]
    declared = [DECLARED] if declared_thinking(evidence.response_template) is not None else []
    return [*framed, *plain, *found, *declared, OFF][0]


def _is_shown(start: str, end: str, evidence: Evidence) -> bool:
    source, tokens = evidence.source, evidence.tokens
    return start in source or end in source or (start in tokens and end in tokens)


def _frame_is_shown(frame: Sequence[str], evidence: Evidence) -> bool:
    return bool(frame) and all(mark in evidence.source or mark in evidence.tokens for mark in frame)
