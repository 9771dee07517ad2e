"""What a model's own format (tool calls, reasoning) means for one chat: what is refused, who reads the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sensorium.api.generated import Asker
from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.content import Conversation
from sensorium.api.protocol.tools import ToolFields
from sensorium.errors import GrammarError, UnsupportedFieldError
from sensorium.prompt.formats.base import OutputFormat, Scanner, Tool, ToolChoice
from sensorium.prompt.formats.grammar import arguments_grammar, is_strict, object_of, strict_refused, with_schema
from sensorium.prompt.formats.lark import ANY_OBJECT
from sensorium.prompt.formats.stream import FirstCall
from sensorium.prompt.formats.syntax import parameters_of
from sensorium.prompt.forms import Form
from sensorium.prompt.grammars import GrammarPool, either
from sensorium.serving.generation import GenerationRequest
from sensorium.serving.model import ServedModel
from sensorium.types import Grammar, SamplingParams


def check_tools(work: Asker, request: ToolFields, conversation: Conversation) -> None:
    """UnsupportedFieldError where a chat has tools and the model cannot call any: it would answer as if there were
    none."""
    found = work.model.format
    if found is not None and found.has_tools:
        return
    param = "tools" if request.tools else conversation.tool_place
    if param:
        raise UnsupportedFieldError(
            f"The model {work.name!r} has no format for tool calls: its chat template does not mention tools. "
            "Leave tools out, or start the server with a --chat-template that has them.",
            param=param,
        )


async def with_format(
    model: ServedModel, request: ChatRequest, asked: GenerationRequest, tail: str, tenant: bytes
) -> GenerationRequest:
    """The request, read and held to by the model's format. `tail` is the end of the rendered prompt."""
    found = model.format
    if found is None:
        return asked
    choice = request.tool_choice_of()
    tools = request.tool_objects if choice.mode != "none" else []
    if not tools and not found.has_reasoning:
        return asked
    ids = model.tokenizer.added_tokens
    ends = [ids[end] for end in found.ends if end in ids]
    calls = await _call_grammar(model, found, request, choice, tail, tenant)
    prompts = tuple(
        (prompt, _held(params, ends, _whole(params.grammar, calls, found, request, tail)))
        for prompt, params in asked.prompts
    )

    def scanner() -> Scanner:
        made = found.scanner(tail, tools)
        return FirstCall(made) if request.parallel_tool_calls is False else made

    return replace(
        asked,
        prompts=prompts,
        scanner=scanner,
        markers=frozenset(_ids(ids, found.markers if tools else found.reasoning_markers)),
        hides_reasoning=request.include_reasoning is False,
        call_reason="stop" if choice.mode == "named" else "tool_calls",  # as OpenAI says it
    )


def _ids(ids: dict[str, int], markers: Iterable[str]) -> Iterable[int]:
    return (ids[marker] for marker in markers if marker in ids)


async def _call_grammar(
    model: ServedModel, found: OutputFormat, request: ChatRequest, choice: ToolChoice, tail: str, tenant: bytes
) -> Grammar | None:
    """What holds the answer to the choice of tools. Beside a form that the answer is to have, that is calls only."""
    tools = request.tool_objects
    if not tools or choice.mode == "none":
        return None
    if request.form() is not None and choice.mode == "auto":
        choice = replace(choice, mode="required")

    async def held_to(tools: Sequence[Tool]) -> Grammar | None:
        source = found.tool_grammar(
            tools,
            choice,
            parallel=request.parallel_tool_calls is not False,
            thinking=found.thinking(tail),
            budget=request.thinking_token_budget,
            held=model.checkpoint.generation.get("strict_tools") is True,
        )
        return await model.grammars.held(None if source is None else Form("lark", source, "tools"), tenant)

    try:
        return await held_to(tools)
    except GrammarError:
        pass  # some tool's schema does not compile, or all together are too much
    checked = [await _checked_tool(model.grammars, tool, tenant) for tool in tools]
    try:
        return await held_to(checked)
    except GrammarError:
        return await held_to([tool if is_strict(tool) else with_schema(tool, ANY_OBJECT) for tool in checked])


async def _checked_tool(grammars: GrammarPool, tool: Tool, tenant: bytes) -> Tool:
    """The tool with parameters that compile. Where they do not, the arguments may be any object, or the tool is strict
    and this is a RequestError that names it."""
    refused = ""
    for loose in (False, True):
        schema = object_of(tool, loose=loose)
        try:
            await grammars.held(Form("lark", arguments_grammar(schema), "parameters"), tenant)
            return with_schema(tool, schema)
        except GrammarError as error:
            refused = error.message
    if not is_strict(tool):
        return with_schema(tool, ANY_OBJECT)
    try:  # as a schema alone it is told which part is wrong
        await grammars.held(Form("json", json.dumps(parameters_of(tool)), "parameters"), tenant)
    except GrammarError as error:
        refused = error.message
    raise strict_refused(tool, refused)


def _whole(
    form: Grammar | None, calls: Grammar | None, found: OutputFormat, request: ChatRequest, tail: str
) -> Grammar | None:
    """The answer is of its form or calls tools, after its reasoning, which may have a budget; where it must call, the
    form has no place in it."""
    budget = request.thinking_token_budget
    if calls is not None and request.tool_choice_of().mode in ("required", "named"):
        return calls
    if form is not None:
        form = found.form_grammar(form, tail, budget=budget)
    if calls is not None:
        return calls if form is None else either(calls, form)
    if form is None and budget is not None and (source := found.budget_grammar(tail, budget)) is not None:
        return Grammar("lark", source)
    return form


def _held(params: SamplingParams, ends: list[int], grammar: Grammar | None) -> SamplingParams:
    """`ends` are tokens that end an answer in this format, unless the request looks past ends."""
    stops = tuple(dict.fromkeys((*params.stop_token_ids, *ends))) if params.stop_token_ids else ()
    return replace(params, stop_token_ids=stops, grammar=grammar)
