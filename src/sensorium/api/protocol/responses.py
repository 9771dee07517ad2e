"""The body of POST /v1/responses, and the chat that it is: items become messages, flat tools become nested ones."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from sensorium.api.protocol.chat import ChatRequest, ProcessorKwargs, TemplateKwargs
from sensorium.api.protocol.common import Name, Nested, Text, UnknownFields
from sensorium.api.protocol.content import AudioData, ChatMessage, Url
from sensorium.api.protocol.foreign_chat import FormedChat
from sensorium.api.protocol.other_servers import RESPONSES, Foreign
from sensorium.api.protocol.sampling import LogprobCount, SamplingBody
from sensorium.api.protocol.structured import StructuredBody, json_form
from sensorium.api.protocol.tools import MAX_TOOLS, JsonObject, ToolName, hosted_only
from sensorium.api.protocol.unions import LIST_OR_TEXT, TEXT_OR_OBJECT, by_type, kind_of
from sensorium.config import Limits, ServerConfig
from sensorium.errors import MissingFieldError, NotFoundError, RequestError, UnsupportedFieldError
from sensorium.prompt.forms import Form
from sensorium.types import INT32_MAX

MAX_ITEMS = 8192
SEALED = b"\x01"
"""Before the reasoning in `encrypted_content`: a version. It is the client's own text, so nothing is hidden in it."""

Kind = Annotated[str, Field(max_length=64)]
Id = Annotated[str, Field(max_length=256)]


class InputText(Nested):
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: Text


class Refusal(Nested):
    type: Literal["refusal"]
    refusal: Text


class InputImage(Nested):
    type: Literal["input_image"]
    image_url: Url | None = None
    file_id: Id | None = None


class InputVideo(Nested):
    type: Literal["input_video"]
    video_url: Url


class InputAudio(Nested):
    type: Literal["input_audio"]
    input_audio: AudioData


class OtherPart(Nested):
    type: Kind


_PARTS = {
    **dict.fromkeys(("input_text", "output_text", "text", "reasoning_text", "summary_text"), "<text>"),
    "refusal": "<refusal>",
    "input_image": "<image>",
    "input_video": "<video>",
    "input_audio": "<audio>",
}


Part = Annotated[
    Annotated[InputText, Tag("<text>")]
    | Annotated[Refusal, Tag("<refusal>")]
    | Annotated[InputImage, Tag("<image>")]
    | Annotated[InputVideo, Tag("<video>")]
    | Annotated[InputAudio, Tag("<audio>")]
    | Annotated[OtherPart, Tag("<other>")],
    by_type(_PARTS),
]


Content = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[Part], Field(max_length=4096), Tag("<list>")], LIST_OR_TEXT
]
Parts = Annotated[list[Part], Field(max_length=4096)]


class MessageItem(Nested):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(Nested):
    type: Literal["function_call"]
    call_id: Id
    name: ToolName
    arguments: Text
    namespace: ToolName | None = None


class CustomCallItem(Nested):
    type: Literal["custom_tool_call"]
    call_id: Id
    name: ToolName
    input: Text


class OutputItem(Nested):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Id
    output: Content


class ReasoningItem(Nested):
    type: Literal["reasoning"]
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: Text | None = None


class OtherItem(Nested):
    type: Kind


_ITEMS = {
    "message": "<message>",
    "function_call": "<call>",
    "custom_tool_call": "<custom call>",
    "function_call_output": "<output>",
    "custom_tool_call_output": "<output>",
    "reasoning": "<reasoning>",
}
_HISTORY_ONLY = frozenset(
    {"web_search_call", "file_search_call", "mcp_list_tools", "mcp_call", "image_generation_call"}
)
"""Items of tools that others ran, of which the model is told nothing."""


def _item_form(value: Any) -> str:
    is_message = isinstance(value, MessageItem) or (isinstance(value, dict) and "role" in value)
    return _ITEMS.get(kind_of(value) or ("message" if is_message else ""), "<other>")


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<call>")]
    | Annotated[CustomCallItem, Tag("<custom call>")]
    | Annotated[OutputItem, Tag("<output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[OtherItem, Tag("<other>")],
    Discriminator(_item_form),
]


Input = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS), Tag("<list>")],
    LIST_OR_TEXT,
]


class ToolFormat(Nested):
    """Of a custom tool's text. Rules in Lark cannot be held inside of a call's JSON: the model is told them."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: Text | None = None


class InnerTool(Nested):
    type: Kind
    name: ToolName | None = None
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    format: ToolFormat | None = None


class ToolItem(InnerTool):
    """Any tool; a namespace holds more of them."""

    tools: Annotated[list[InnerTool], Field(max_length=MAX_TOOLS)] | None = None


class NamedChoice(Nested):
    type: Kind
    name: ToolName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[InnerTool], Field(max_length=MAX_TOOLS)] | None = None


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")] | Annotated[NamedChoice, Tag("<object>")],
    TEXT_OR_OBJECT,
]


class TextFormat(Nested):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Text | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextSettings(Nested):
    format: TextFormat | None = None
    verbosity: Name | None = None


class ReasoningSettings(Nested):
    effort: Name | None = None
    summary: Name | None = None
    generate_summary: Name | None = None


_NOT_CHATS = frozenset({"stream_options", *StructuredBody.model_fields})
"""Fields of sampling that the chat which is made does not get: its form is made here."""
_NO_PLACE = ("echo", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids")

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


@dataclass(slots=True)
class Names:
    """What a tool that was shown to the model as a function is called in the client's own terms."""

    custom: set[str] = field(default_factory=set)
    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)  # shown name -> (namespace, name)


class ResponsesRequest(SamplingBody):
    foreign: ClassVar[Mapping[str, Foreign]] = RESPONSES

    input: Input
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    top_logprobs: LogprobCount | None = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[ToolItem], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    include: Annotated[list[Name], Field(max_length=64)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def seals_reasoning(self) -> bool:
        """Does reasoning come in a form too that the client sends back as it is?"""
        return "reasoning.encrypted_content" in (self.include or ())

    @property
    def summarizes(self) -> bool:
        """Are reasoning's events those of summaries too? Some clients show only these."""
        settings = self.reasoning
        return settings is not None and (settings.summary or settings.generate_summary) is not None

    def names(self) -> Names:
        found = Names()
        for tool in self.tools or ():
            if tool.type == "custom" and tool.name is not None:
                found.custom.add(tool.name)
            for inner in tool.tools or ():
                if tool.type == "namespace" and tool.name is not None and inner.name is not None:
                    found.namespaces[f"{tool.name}__{inner.name}"] = (tool.name, inner.name)
        return found

    def chat(self, limits: Limits, server: ServerConfig, unknown: UnknownFields) -> ChatRequest:
        """The chat that this is, checked. Its messages know where they stand here."""
        if self.choices > 1:
            raise RequestError("`n` must be 1: a response has one answer.", param="n")
        for name in _NO_PLACE:
            value = getattr(self, name)
            if value is not None and value is not False:  # 0 asks for the prompt's own
                raise UnsupportedFieldError(
                    f"`{name}` is not supported here: a response has no place for what it asks for; "
                    "/v1/chat/completions has.",
                    param=name,
                )
        settings = self.reasoning or ReasoningSettings()
        own = {name: getattr(self, name) for name in SamplingBody.model_fields if name not in _NOT_CHATS}
        fields: dict[str, Any] = {
            **{name: value for name, value in own.items() if value is not None},
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "reasoning_effort": settings.effort,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
            "mm_processor_kwargs": self.mm_processor_kwargs,
            "enable_thinking": self.enable_thinking,
            "include_reasoning": self.include_reasoning,
            "tools": self._tools() or None,
            "tool_choice": self._tool_choice(),
            **({"logprobs": True, "top_logprobs": self.top_logprobs} if self.wants_logprobs else {}),
        }
        given = {name: value for name, value in fields.items() if value is not None}
        request = FormedChat.validated(given, self.form())
        request.check_fields(unknown)
        request.check(limits, server)
        return request

    def _forms(self) -> Iterator[Form]:
        found = self.text.format if self.text is not None else None
        if found is not None and found.type == "json_object":
            yield json_form({"type": "object"}, "text.format")
        elif found is not None and found.type == "json_schema":
            if found.schema_ is None:
                raise MissingFieldError("text.format.schema")
            yield json_form(found.schema_, "text.format.schema")
        yield from super()._forms()

    # Tools.

    def _tools(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for index, tool in enumerate(self.tools or ()):
            if tool.type == "namespace":
                inner = tool.tools or ()
                found += [_function(one, f"{tool.name}__{one.name}") for one in inner if one.type == "function"]
            elif tool.type in ("function", "custom"):
                if tool.name is None:
                    raise MissingFieldError(f"tools[{index}].name")
                if tool.format is not None and tool.format.type == "grammar":
                    for field in ("syntax", "definition"):
                        if getattr(tool.format, field) is None:
                            raise MissingFieldError(f"tools[{index}].format.{field}")
                found.append(_function(tool, tool.name))
        if self.tools and not found and self.tool_choice != "none":
            raise hosted_only("tools[0]", self.tools[0].type, "of type function")
        return found  # hosted tools beside others are left out, as some clients always send them

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, NamedChoice):
            return choice
        if choice.type == "allowed_tools":
            tools = [_named(tool.name) for tool in choice.tools or ()]
            allowed = {"mode": choice.mode or "auto", "tools": tools}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        if choice.type not in ("function", "custom") or choice.name is None:
            raise UnsupportedFieldError(
                "`tool_choice` must name a function or custom tool: this server runs no tools itself.",
                param="tool_choice",
            )
        return _named(choice.name)

    # Items.

    def _messages(self) -> list[ChatMessage]:
        made = _Messages()
        if self.instructions is not None:
            made.add("instructions", {"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            made.add("input", {"role": "user", "content": self.input})
        else:
            for index, item in enumerate(self.input):
                made.take(item, f"input[{index}]")
        made.end_turn()
        if not made.messages:
            raise RequestError("`input` has nothing to answer.", param="input")
        return made.messages


class _Messages:
    """Items -> messages. What the assistant thought, said and called in a row is one turn of its."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._turn: dict[str, Any] = {}
        self._place = ""

    def add(self, place: str, fields: dict[str, Any]) -> None:
        self.end_turn()
        self.messages.append(ChatMessage.placed(place, fields))

    def end_turn(self) -> None:
        turn, self._turn = self._turn, {}
        if turn.keys() - {"reasoning"}:  # thoughts that led to nothing are left out
            self.messages.append(ChatMessage.placed(self._place, {"role": "assistant", **turn}))

    def take(self, item: Any, place: str) -> None:
        match item:
            case MessageItem(role="assistant"):
                if self._turn.keys() - {"reasoning"}:
                    self.end_turn()
                self._open(place)["content"] = _content(item.content, place)
            case MessageItem():
                self.add(place, {"role": item.role, "content": _content(item.content, place)})
            case FunctionCallItem():
                name = f"{item.namespace}__{item.name}" if item.namespace else item.name
                self._call(place, item.call_id, name, item.arguments)
            case CustomCallItem():
                self._call(place, item.call_id, item.name, {"input": item.input})
            case OutputItem():
                content = _content(item.output, place, "output")
                self.add(place, {"role": "tool", "tool_call_id": item.call_id, "content": content})
            case ReasoningItem():
                if self._turn.keys() - {"reasoning"}:
                    self.end_turn()
                thoughts = self._turn.get("reasoning", "") + _thoughts(item, place)
                if thoughts:
                    self._open(place)["reasoning"] = thoughts
            case OtherItem():
                _refuse_item(item.type, place)

    def _open(self, place: str) -> dict[str, Any]:
        self._place = place if not self._turn else self._place
        return self._turn

    def _call(self, place: str, call_id: str, name: str, arguments: Any) -> None:
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._open(place).setdefault("tool_calls", []).append(call)


def _refuse_item(kind: str, place: str) -> None:
    if kind in _HISTORY_ONLY:
        return
    if kind == "item_reference":
        raise NotFoundError(
            "Nothing is stored here: send the item itself instead of a reference (`store`: false in clients that "
            "believe otherwise).",
            param=place,
            code="item_not_found",
        )
    raise UnsupportedFieldError(f"Items of the type {kind!r} are not understood here.", param=f"{place}.type")


def _thoughts(item: ReasoningItem, place: str) -> str:
    """A reasoning item's text: its content, else what was sealed. Summaries are not reasoning."""
    if item.content:
        return "".join(part.text for part in item.content if isinstance(part, InputText))
    if not item.encrypted_content:
        return ""
    try:
        raw = base64.b64decode(item.encrypted_content, validate=True)
        return raw[1:].decode() if raw[:1] == SEALED else ""
    except (binascii.Error, UnicodeDecodeError):
        raise RequestError(
            "`encrypted_content` is not what this server gave out.", param=f"{place}.encrypted_content"
        ) from None


def sealed(reasoning: str) -> str:
    """`encrypted_content` of a reasoning item."""
    return base64.b64encode(SEALED + reasoning.encode()).decode()


def _function(tool: InnerTool, name: str) -> dict[str, Any]:
    """A tool as chats have them. What a custom tool is given is one text, held to its regular expression."""
    parameters, description, strict = tool.parameters, tool.description, tool.strict
    if tool.type == "custom":
        text = {"type": "string"}
        rules = tool.format.definition if tool.format is not None else None
        syntax = tool.format.syntax if tool.format is not None else None
        if rules is not None and syntax == "regex":
            text, strict = {"type": "string", "pattern": f"^(?:{rules})$"}, True
        elif rules is not None:
            description = "\n\n".join(filter(None, (description, f"The input follows this Lark grammar:\n{rules}")))
        properties = {"input": text}
        parameters = {"type": "object", "properties": properties, "required": ["input"], "additionalProperties": False}
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def _named(name: str | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _content(content: str | Sequence[Any], place: str, where: str = "content") -> str | list[dict[str, Any]]:
    """Content as chats have it."""
    if isinstance(content, str):
        return content
    return [_part(part, f"{place}.{where}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, place: str) -> dict[str, Any]:
    match part:
        case InputText():
            return {"type": "text", "text": part.text}
        case Refusal():
            return {"type": "text", "text": part.refusal}
        case InputImage():
            if part.image_url is None:
                raise UnsupportedFieldError(
                    "Files are not stored here: send the image as `image_url`, which may be a data: URL.",
                    param=f"{place}.file_id" if part.file_id is not None else f"{place}.image_url",
                )
            return {"type": "image_url", "image_url": part.image_url}
        case InputVideo():
            return {"type": "video_url", "video_url": part.video_url}
        case InputAudio():
            return {"type": "input_audio", "input_audio": part.input_audio.model_dump(exclude_none=True)}
    raise RequestError(
        "A part must be input_text, output_text, input_image, input_audio or input_video.",
        param=f"{place}.type",
        code="unsupported_content_part",
    )
