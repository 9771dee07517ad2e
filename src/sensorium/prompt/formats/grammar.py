"""`tool_choice` as a grammar, in the model's own way of writing calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.errors import RequestError
from sensorium.prompt.formats.base import Tool, ToolChoice
from sensorium.prompt.formats.lark import ANY_OBJECT, Rules
from sensorium.prompt.formats.syntax import Syntax, parameters_of
from sensorium.prompt.grammars import nested
from sensorium.prompt.schema import SchemaRefused, ready
from sensorium.types import Grammar


def choice_grammar(
    syntax: Syntax,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    thoughts: Thoughts | None,
    tokens: Mapping[str, int],
    held: bool = False,
) -> str | None:
    """Lark; None where the answer is free. `thoughts`: the reasoning that it begins with.

    "auto" holds an answer only where a tool is strict or not every tool may be called; then the arguments of tools that
    are not strict may be any object. `held`: it holds every call, arguments as far as a grammar can. Calls without a
    marker cannot be told from text, so "auto" leaves them free."""
    allowed = choice.of(tools)
    rules = Rules(tokens)
    before = "" if thoughts is None else f"{thoughts.rule(rules)} "
    single = choice.mode == "named" or not parallel
    if choice.mode in ("required", "named"):
        return rules.written(f"{before}{_calls(syntax, allowed, rules, single=single)}")
    needs = held or any(is_strict(tool) for tool in allowed) or len(allowed) < len(tools)
    marker = marker_of(syntax)
    without = (*syntax.opens, *(() if thoughts is None else (thoughts.start,)))
    if choice.mode == "none" or not needs or not marker:
        return None
    return rules.written(
        f"{before}{_text_and_calls(syntax, allowed, rules, marker, without, single=single, lax=not held)}"
    )


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


class CheckedSchema(dict[str, Any]):
    """A tool's parameters as they compile: not made ready again."""


def object_of(tool: Tool, *, loose: bool = False) -> Mapping[str, Any]:
    """The parameters' schema, as it is compiled: arguments are an object, whether it says so or not. What a schema asks
    that no grammar can hold is a RequestError for a strict tool; another's arguments may then be any object."""
    parameters = parameters_of(tool)
    if isinstance(parameters, CheckedSchema):
        return parameters
    try:
        return ready({"type": "object", **parameters}, loose=loose)
    except SchemaRefused as error:
        if not is_strict(tool):
            return ANY_OBJECT
        raise strict_refused(tool, f"`parameters{error.path}` {error.reason}.") from None


def strict_refused(tool: Tool, reason: str) -> RequestError:
    return RequestError(
        f"The parameters of the strict tool {tool['function']['name']!r} cannot be held to: {reason}",
        param="tools",
        code="invalid_json_schema",
    )


def arguments_grammar(schema: Mapping[str, Any]) -> str:
    """A tool's arguments alone, as they stand in the grammar of a call."""
    rules = Rules({})
    return rules.written(rules.json(schema))


def with_schema(tool: Tool, schema: Mapping[str, Any]) -> Tool:
    """The tool with parameters that are compiled as they are."""
    return {**tool, "function": {**tool["function"], "parameters": CheckedSchema(schema)}}


def _calls(
    syntax: Syntax, tools: Sequence[Tool], rules: Rules, *, single: bool, after: str = "", lax: bool = False
) -> str:
    """One call or several, with all that stands around them. `after`: the marker in front was written already. `lax`:
    only strict tools are held to their schema."""
    own = syntax.wrapping
    one = one_of(syntax, tools, rules, lax=lax)
    first = f"{rules.literal((own.before + own.each_before).removeprefix(after))} {one} {rules.literal(own.each_after)}"
    again = f"{rules.literal(own.between + own.each_before)} {one} {rules.literal(own.each_after)}"
    more = "" if single else f" ({again})*"
    return f"{first}{more} {rules.literal(own.after)}"


def _text_and_calls(
    syntax: Syntax,
    tools: Sequence[Tool],
    rules: Rules,
    marker: str,
    without: tuple[str, ...],
    *,
    single: bool,
    lax: bool,
) -> str:
    """Free text in which calls may stand: what follows their marker is a call. `without`: what the text cannot say."""
    text = rules.text_until(marker, without)
    calls = rules.add("calls", _calls(syntax, tools, rules, single=single, after=marker, lax=lax))
    return f"({text} {calls})" + ("?" if single else "*") + f" {rules.text(without)}"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Reasoning at the beginning of an answer, of at most `budget` tokens. `is_open`: its first tag stands in the
    prompt; else the model may leave it out. `frame`: what may stand before content."""

    start: str
    end: str
    is_open: bool
    budget: int | None = None
    frame: str = ""

    def rule(self, rules: Rules) -> str:
        """Lark of it, with the white space behind."""
        thoughts = f"{rules.text_until(self.end, budget=self.budget)} /[ \\n]{{0,4}}/"
        return thoughts if self.is_open else f"({rules.literal(self.start)} {thoughts})?"


def budget_grammar(thoughts: Thoughts, markers: Iterable[str], tokens: Mapping[str, int]) -> str:
    """Lark of an answer that is free but for its reasoning's budget. The rest may have any of `markers` but the first
    tag."""
    rules = Rules(tokens)
    others = [rules.literal(token) for token in markers if token in tokens and token not in thoughts.start]
    rest = rules.add("rest", " | ".join([rules.text((thoughts.start,)), *others]))
    return rules.written(f"{thoughts.rule(rules)} {rest}*")


def after_reasoning(grammar: Grammar, thoughts: Thoughts, tokens: Mapping[str, int]) -> Grammar:
    """A grammar for content with reasoning in front."""
    rules = Rules(tokens)
    frame = f" ({rules.literal(thoughts.frame)} /[ \\n]{{0,4}}/)?" if thoughts.frame else ""
    return Grammar("lark", f"{rules.written(f'{thoughts.rule(rules)}{frame} form')}\nform: {nested(grammar)}")
