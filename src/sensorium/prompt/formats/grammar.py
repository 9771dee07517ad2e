"""`tool_choice` as a grammar, in the model's own way of writing calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sensorium.prompt.formats.base import Tool, ToolChoice
from sensorium.prompt.formats.lark import ANY_OBJECT, Rules
from sensorium.prompt.formats.syntax import Syntax, parameters_of

Tags = tuple[str, str]


def choice_grammar(
    syntax: Syntax,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    think: Tags | None,
    tokens: Mapping[str, int],
) -> str | None:
    """Lark; None where the answer is free. `think`: the tags between which the answer may begin with reasoning.

    "auto" holds an answer only where a tool is strict or not every tool may be called; then the arguments of tools that
    are not strict may be any object. Calls without a marker cannot be told from text, so "auto" leaves them free."""
    allowed = choice.of(tools)
    rules = Rules(tokens)
    before = _reasoning(rules, think, syntax) if think is not None else ""
    single = choice.mode == "named" or not parallel
    if choice.mode in ("required", "named"):
        return rules.written(f"{before}{_calls(syntax, allowed, rules, single=single)}")
    needs = any(is_strict(tool) for tool in allowed) or len(allowed) < len(tools)
    marker = marker_of(syntax)
    if choice.mode == "none" or not needs or not marker:
        return None
    return rules.written(f"{before}{_text_and_calls(syntax, allowed, rules, marker, single=single)}")


def marker_of(syntax: Syntax) -> str:
    """With what calls always begin; "" if they can begin without."""
    first = syntax.wrapping.before + syntax.wrapping.each_before
    return next((mark for mark in syntax.opens if first.startswith(mark)), "")


def is_strict(tool: Tool) -> bool:
    return tool["function"].get("strict") is True


def one_of(syntax: Syntax, tools: Sequence[Tool], rules: Rules, *, lax: bool) -> str:
    """One call of any of these. `lax`: only strict tools are held to their schema."""
    calls = [
        rules.add("call", syntax.call_rule(tool, ANY_OBJECT if lax and not is_strict(tool) else object_of(tool), rules))
        for tool in tools
    ]
    return rules.add("one", " | ".join(calls))


def object_of(tool: Tool) -> Mapping[str, object]:
    """The parameters' schema; arguments are an object, whether it says so or not."""
    return {"type": "object", **parameters_of(tool)}


def _calls(syntax: Syntax, tools: Sequence[Tool], rules: Rules, *, single: bool, after: str = "") -> str:
    """One call or several, with all that stands around them. `after`: the marker in front was written already; then
    only strict tools are held to their schema."""
    own = syntax.wrapping
    one = one_of(syntax, tools, rules, lax=bool(after))
    first = f"{rules.literal((own.before + own.each_before).removeprefix(after))} {one} {rules.literal(own.each_after)}"
    again = f"{rules.literal(own.between + own.each_before)} {one} {rules.literal(own.each_after)}"
    more = "" if single else f" ({again})*"
    return f"{first}{more} {rules.literal(own.after)}"


def _text_and_calls(syntax: Syntax, tools: Sequence[Tool], rules: Rules, marker: str, *, single: bool) -> str:
    """Free text in which calls may stand: what follows their marker is a call."""
    text = rules.text_until(marker, syntax.opens)
    calls = rules.add("calls", _calls(syntax, tools, rules, single=single, after=marker))
    return f"({text} {calls})" + ("?" if single else "*") + f" {rules.text(syntax.opens)}"


def _reasoning(rules: Rules, think: Tags, syntax: Syntax) -> str:
    """Reasoning in front that may be left out. Its first tag may stand in the prompt, unless calls have no marker: then
    it is what tells a thought from a call."""
    start, end = think
    tag = rules.literal(start) if not marker_of(syntax) else f"({rules.literal(start)})?"
    thoughts = f"{tag} {rules.text_until(end, syntax.opens)}"
    return rules.add("reasoning", f'{thoughts} /[ \\n]{{0,4}}/ | ""') + " "
