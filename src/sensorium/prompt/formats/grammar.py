"""`tool_choice` as a grammar, in the model's own way of writing calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sensorium.errors import RequestError
from sensorium.prompt.formats.base import Tool, ToolChoice
from sensorium.prompt.formats.lark import ANY_OBJECT, Rules
from sensorium.prompt.formats.syntax import Syntax, parameters_of
from sensorium.prompt.grammars import nested
from sensorium.prompt.schema import SchemaRefused, ready
from sensorium.types import Grammar

Tags = tuple[str, str]


def choice_grammar(
    syntax: Syntax,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    think: Tags | None,
    tokens: Mapping[str, int],
    budget: int | None = None,
) -> str | None:
    """Lark; None where the answer is free. `think`: the tags between which the answer may begin with reasoning, of at
    most `budget` tokens.

    "auto" holds an answer only where a tool is strict or not every tool may be called; then the arguments of tools that
    are not strict may be any object. Calls without a marker cannot be told from text, so "auto" leaves them free."""
    allowed = choice.of(tools)
    rules = Rules(tokens)
    before = _reasoning(rules, think, syntax, budget) if think is not None else ""
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


def object_of(tool: Tool) -> Mapping[str, Any]:
    """The parameters' schema, as it is compiled: arguments are an object, whether it says so or not. What a schema asks
    that no grammar can hold is a RequestError for a strict tool; another's arguments may then be any object."""
    try:
        return ready({"type": "object", **parameters_of(tool)})
    except SchemaRefused as error:
        if not is_strict(tool):
            return ANY_OBJECT
        name = tool["function"]["name"]
        raise RequestError(
            f"The parameters of the strict tool {name!r} cannot be held to: `parameters{error.path}` {error.reason}.",
            param="tools",
            code="invalid_json_schema",
        ) from None


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


def _reasoning(rules: Rules, think: Tags, syntax: Syntax, budget: int | None) -> str:
    """Reasoning in front that may be left out. Its first tag may stand in the prompt, unless calls have no marker: then
    it is what tells a thought from a call."""
    start, end = think
    tag = rules.literal(start) if not marker_of(syntax) else f"({rules.literal(start)})?"
    thoughts = f"{tag} {rules.text_until(end, syntax.opens, budget)}"
    return rules.add("reasoning", f'{thoughts} /[ \\n]{{0,4}}/ | ""') + " "


def budget_grammar(
    think: Tags, budget: int, markers: Iterable[str], tokens: Mapping[str, int], *, is_open: bool
) -> str:
    """Lark of an answer that is free but for its reasoning, which has at most so many tokens. The end tag is one of
    `tokens`, the others are those that the rest may have."""
    start, end = think
    rules = Rules(tokens)
    others = [rules.literal(token) for token in markers if token in tokens and token not in start]
    rest = rules.add("rest", " | ".join([rules.text(), *others]))
    thoughts = rules.text_until(end, budget=budget)
    if is_open:
        return rules.written(f"{thoughts} {rest}*")
    return rules.written(f"({rules.literal(start)} {thoughts})? {rest}*")


def after_reasoning(
    grammar: Grammar, think: Tags, budget: int | None, tokens: Mapping[str, int], *, is_open: bool
) -> Grammar:
    """A grammar for content with reasoning in front: reasoning that the prompt opened, or that may be left out."""
    start, end = think
    rules = Rules(tokens)
    thoughts = f"{rules.text_until(end, budget=budget)} /[ \\n]{{0,4}}/"
    head = thoughts if is_open else f"({rules.literal(start)} {thoughts})?"
    return Grammar("lark", f"{rules.written(f'{head} form')}\nform: {nested(grammar)}")
