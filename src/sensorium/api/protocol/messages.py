"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sensorium.api.protocol.chat import TemplateKwargs
from sensorium.api.protocol.common import Body, Nested, Text, UnknownFields
from sensorium.api.protocol.content import Conversation
from sensorium.api.protocol.foreign_chat import ForeignChat
from sensorium.api.protocol.message_blocks import InputMessage, Kind, SystemContent, ToolUseBlock
from sensorium.api.protocol.message_turns import turns_of
from sensorium.api.protocol.other_servers import COMPACTED, MESSAGES, Foreign
from sensorium.api.protocol.sampling import MANY_STOPS, Stop, check_stop_count
from sensorium.api.protocol.structured import json_form
from sensorium.api.protocol.tools import (
    MAX_TOOLS,
    Function,
    JsonObject,
    NamedFunction,
    NamedTool,
    ToolChoiceField,
    ToolEntry,
    ToolName,
    hosted_only,
)
from sensorium.config import Limits
from sensorium.errors import MissingFieldError, RequestError, UnsupportedFieldError
from sensorium.prompt.forms import Form
from sensorium.types import INT32_MAX, Modality

MIN_BUDGET_TOKENS = 1024
_DROPPED = ("web_search", "web_fetch", "code_execution", "tool_search_tool")
"""Tools that Anthropic's servers run: a model that has others answers as well as it can without them."""


class Tool(Nested):
    type: Kind | None = None
    name: ToolName
    description: Text | None = None
    input_schema: JsonObject | None = None
    strict: bool | None = None

    @property
    def is_dropped(self) -> bool:
        return self.type is not None and self.type.startswith(_DROPPED)

    def entry(self, where: str) -> ToolEntry:
        """As a chat has it."""
        if self.type not in (None, "custom"):
            raise UnsupportedFieldError(
                f"Tools of type {self.type!r} have a meaning to Anthropic's own models only: describe the tool with "
                "`input_schema` and without `type`.",
                param=f"{where}.type",
            )
        if self.input_schema is None:
            raise MissingFieldError(f"{where}.input_schema")
        if self.input_schema.get("type", "object") != "object":
            raise RequestError(f"`{where}.input_schema.type` must be object.", param=f"{where}.input_schema.type")
        function = Function(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return ToolEntry(type="function", function=function)


class Choice(Nested):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Nested):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[int, Field(ge=MIN_BUDGET_TOKENS, le=INT32_MAX)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Nested):
    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Nested):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class CountTokensRequest(Body):
    """What both endpoints read."""

    foreign: ClassVar[Mapping[str, Foreign]] = MESSAGES

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=8192)]
    system: SystemContent | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # what output_config.format was called first
    chat_template_kwargs: TemplateKwargs | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = None

    def check_fields(self, unknown: UnknownFields) -> None:
        super().check_fields(unknown)
        for tool in self.tools or ():
            if tool.is_dropped:
                unknown.note(f"tools: {tool.type}")

    def check(self, limits: Limits) -> None:
        """Everything that can be refused before a prompt is made."""
        last = self.messages[-1]
        if last.role == "assistant" and any(isinstance(block, ToolUseBlock) for block in last.content):
            raise RequestError(
                "The last message calls a tool: send the tool_result in a user message after it.",
                param=f"messages[{len(self.messages) - 1}]",
            )
        if self.output_config is not None and self.output_config.format is not None and self.output_format is not None:
            raise RequestError("`output_format` and `output_config.format` exclude each other.", param="output_format")

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        return turns_of(self.system, self.messages, modalities, limits)

    def as_chat(self) -> ForeignChat:
        return ForeignChat.of(self, **self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        """What is called otherwise in a chat."""
        tools = self._tools()
        thinking, output = self.thinking, self.output_config
        return {
            "model": self.model,
            "form": self._form(),
            "tools": tools or None,
            "tool_choice": self._tool_choice([tool.function.name for tool in tools if tool.function is not None]),
            "parallel_tool_calls": False if self.tool_choice and self.tool_choice.disable_parallel_tool_use else None,
            "enable_thinking": None if thinking is None else thinking.type != "disabled",
            "include_reasoning": False if thinking is not None and thinking.display == "omitted" else None,
            "thinking_token_budget": thinking.budget_tokens if thinking is not None else None,
            "reasoning_effort": output.effort if output is not None else None,
            "continue_final_message": self.messages[-1].role == "assistant" or None,
            "chat_template_kwargs": self.chat_template_kwargs,
            "cache_salt": self.cache_salt,
        }

    def _form(self) -> Form | None:
        """What the answer is to be held to."""
        config = self.output_config.format if self.output_config is not None else None
        found, where = (config, "output_config.format") if config is not None else (self.output_format, "output_format")
        if found is None:
            return None
        return json_form(found.schema_, f"{where}.schema")

    def _tools(self) -> list[ToolEntry]:
        places: dict[str, str] = {}
        found: list[ToolEntry] = []
        for index, tool in enumerate(self.tools or ()):
            where = f"tools[{index}]"
            if tool.name in places:
                raise RequestError(f"Two tools have the name {tool.name!r}.", param=f"{where}.name")
            places[tool.name] = where
            if not tool.is_dropped:
                found.append(tool.entry(where))
        if self.tools and not found and (self.tool_choice is None or self.tool_choice.type != "none"):
            raise hosted_only("tools[0]", self.tools[0].type, "with `input_schema` and without `type`")
        return found

    def _tool_choice(self, names: list[str]) -> ToolChoiceField | None:
        choice = self.tool_choice
        if choice is None or choice.type == "none":
            return None if choice is None else "none"
        if choice.type == "auto":
            return "auto" if names else None
        if not names:
            raise RequestError("`tool_choice` needs `tools`.", param="tool_choice")
        if choice.type == "any":
            return "required"
        if choice.name is None:
            raise MissingFieldError("tool_choice.name")
        if choice.name not in names:
            raise RequestError(
                f"`tool_choice` names {choice.name!r}, which is none of `tools`.", param="tool_choice.name"
            )
        return NamedTool(type="function", function=NamedFunction(name=choice.name))


class MessagesRequest(CountTokensRequest):
    foreign: ClassVar[Mapping[str, Foreign]] = COMPACTED

    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)]
    stop_sequences: Annotated[list[Stop], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    stream: bool | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        stops = self.stop_sequences or ()
        check_stop_count(stops, limits, "stop_sequences", MANY_STOPS)
        for index, stop in enumerate(stops):
            if len(stop.encode()) > limits.max_stop_bytes:
                where = f"stop_sequences[{index}]"
                raise RequestError(f"`{where}` must have at most {limits.max_stop_bytes} bytes.", param=where)
        self._check_thinking()

    def _check_thinking(self) -> None:
        thinking = self.thinking
        if thinking is None or thinking.type != "enabled":
            return
        if thinking.budget_tokens is None:
            raise MissingFieldError("thinking.budget_tokens")
        if thinking.budget_tokens >= self.max_tokens:
            raise RequestError(
                f"`thinking.budget_tokens` ({thinking.budget_tokens}) must be less than `max_tokens` "
                f"({self.max_tokens}).",
                param="thinking.budget_tokens",
            )

    def as_chat(self) -> ForeignChat:
        return ForeignChat.of(
            self,
            most_tokens=self.max_tokens,
            **self._chat_fields(),
            stop=list(self.stop_sequences or ()) or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stream=self.stream,
        )
