"""Fields of requests that offer tools: what may be called, and whether something must be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.common import Nested, Text
from sensorium.api.protocol.unions import kind_of
from sensorium.errors import MissingFieldError, RequestError, UnsupportedFieldError
from sensorium.prompt.formats.base import ToolChoice

MAX_TOOLS = 512

ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-]+$")]
"""OpenAI's rule, and dots: names stand in prompts and grammars."""


JsonObject = Annotated[dict[Annotated[str, Field(max_length=4096)], Any], Field(max_length=4096)]


class Function(Nested):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolEntry(Nested):
    type: Annotated[str, Field(max_length=64)]
    function: Function | None = None


class NamedFunction(Nested):
    name: ToolName


class NamedTool(Nested):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Nested):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Nested):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_form(value: Any) -> str:
    if isinstance(value, str):
        return "<string>"
    return "<allowed>" if kind_of(value) == "allowed_tools" else "<named>"


ToolChoiceField = Annotated[
    Annotated[Literal["none", "auto", "required", "any"], Tag("<string>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")]
    | Annotated[NamedTool, Tag("<named>")],
    Discriminator(_choice_form),
]


class ToolFields:
    """The fields of chats by which a model is given tools."""

    tools: list[ToolEntry] | None
    tool_choice: ToolChoiceField | None
    parallel_tool_calls: bool | None

    def check_tools(self) -> None:
        """RequestError for tools that are none, or a choice among tools that are not there. [] is no tools."""
        names = [self._name(tool, index) for index, tool in enumerate(self.tools or ())]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise RequestError(f"Two tools have the name {name!r}.", param=f"tools[{index}].function.name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise RequestError("`tool_choice` needs `tools`.", param="tool_choice")
        for name in self.tool_choice_of().names:
            if name not in names:
                raise RequestError(f"`tool_choice` names {name!r}, which is none of `tools`.", param="tool_choice")

    def tool_choice_of(self) -> ToolChoice:
        """What is to be called."""
        match self.tool_choice:
            case NamedTool():
                return ToolChoice("named", (self.tool_choice.function.name,))
            case AllowedToolsChoice():
                allowed = self.tool_choice.allowed_tools
                return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))
            case "auto" | "required" if self.tools:
                return ToolChoice(self.tool_choice)
            case "any" if self.tools:  # Mistral's word
                return ToolChoice("required")
            case None if self.tools:
                return ToolChoice("auto")
        return ToolChoice("none")

    @cached_property
    def tool_objects(self) -> list[dict[str, Any]]:
        """The tools as OpenAI writes them, without what is null. Not to be changed: made once for all who ask."""
        return [
            {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
            for tool in self.tools or ()
            if tool.function is not None
        ]

    def _name(self, tool: ToolEntry, index: int) -> str:
        if tool.type != "function":
            raise UnsupportedFieldError(
                "Tools are functions here: `type` must be function.", param=f"tools[{index}].type"
            )
        if tool.function is None:
            raise MissingFieldError(f"tools[{index}].function")
        return tool.function.name


class CalledFunction(Nested):
    name: ToolName
    arguments: Text | JsonObject | None = None


class ToolCallEntry(Nested):
    """A call in the history."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Annotated[str, Field(max_length=64)] | None = None
    function: CalledFunction


ToolCalls = Annotated[list[ToolCallEntry], Field(max_length=MAX_TOOLS)]


def hosted_only(where: str, kind: str | None, form: str) -> UnsupportedFieldError:
    """The refusal of a request that has no tools but those that its API's own servers would run. `form`: what a tool
    of this server's clients looks like."""
    return UnsupportedFieldError(
        f"`{where}` is of type {kind!r}, and this server runs no tools itself: describe one that you run as a tool "
        f"{form}, or leave `tools` out.",
        param=f"{where}.type",
    )


def call_objects(calls: Sequence[ToolCallEntry]) -> list[dict[str, Any]]:
    """Calls of the history as OpenAI writes them. `arguments` stay as the client sent them: text, or an object."""
    return [
        {
            "id": call.id or "",
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments or "{}"},
        }
        for call in calls
    ]
