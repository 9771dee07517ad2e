"""The bodies of Ollama's routes. Options are fields of their own kind: `options.temperature` and so on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from sensorium.api.protocol.common import Body, Name, Nested, Text, TokenId, UnknownFields
from sensorium.api.protocol.content import Conversation, Url, media_part
from sensorium.api.protocol.foreign_chat import ForeignChat
from sensorium.api.protocol.other_servers import (
    ANSWERS,
    BEAMS,
    OLLAMA,
    OLLAMA_OPTIONS,
    PENALTY_WINDOWS,
    VECTORS,
    Foreign,
)
from sensorium.api.protocol.pooling import InputBody
from sensorium.api.protocol.sampling import MANY_STOPS, StopField, check_alternatives, check_stop_count
from sensorium.api.protocol.structured import json_form
from sensorium.api.protocol.tools import MAX_TOOLS, Function, JsonObject, ToolEntry, ToolName
from sensorium.api.protocol.turns import Part, Turns
from sensorium.config import Limits
from sensorium.errors import RequestError, UnsupportedFieldError
from sensorium.media.source import MediaSource
from sensorium.prompt.forms import Form
from sensorium.prompt.messages import TextPart
from sensorium.types import INT32_MAX, Modality, PoolingParams

Images = Annotated[list[Url], Field(max_length=4096)]


_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = r"[0-9.]+(ns|us|µs|ms|s|m|h)"


class Options(Nested):
    """Of sampling. Those of a machine (`num_gpu`) change nothing here."""

    model_config = ConfigDict(extra="allow")

    num_predict: Annotated[int, Field(ge=-2, le=INT32_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopField | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    def check(self, limits: Limits, unknown: UnknownFields) -> None:
        stops = self.stops
        check_stop_count(stops, limits, "options.stop", MANY_STOPS)
        if any(len(stop.encode()) > limits.max_stop_bytes for stop in stops):
            raise RequestError(f"A stop string must have at most {limits.max_stop_bytes} bytes.", param="options.stop")
        if self.num_predict == 0:
            raise RequestError(
                "`options.num_predict` must be at least 1, or -1 or -2 for all that fits.", param="options.num_predict"
            )
        for name, value in (self.model_extra or {}).items():
            self._check_other(name, value, unknown)

    def _check_other(self, name: str, value: Any, unknown: UnknownFields) -> None:
        foreign = ANSWERS.get(name) or BEAMS.get(name)
        if foreign is None:
            if name not in OLLAMA_OPTIONS:
                unknown.note(f"options.{name}")
        elif not foreign.allows(value) and not (name in PENALTY_WINDOWS and not self._penalizes):
            raise UnsupportedFieldError(
                f"`options.{name}` is not supported by this server: {foreign.advice}.", param=f"options.{name}"
            )

    @property
    def _penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repeat_penalty not in (None, 1.0)

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def most_tokens(self) -> int | None:
        """-1 and -2 are as many as the context has room for. None: as the checkpoint says, else the same."""
        return INT32_MAX if self.num_predict in (-1, -2) else self.num_predict

    def fields(self) -> dict[str, Any]:
        """As a chat completion has them."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": self.stops or None,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


def kept_s(keep_alive: Any) -> float | None:
    """How long a model is to stay: seconds, or a duration as Go writes it (10m, 1h30m, 0, -1). Infinite if negative;
    None if nothing is said."""
    text = str(keep_alive).strip() if isinstance(keep_alive, str | int | float) else ""
    sign, text = text.startswith("-"), text.removeprefix("-")
    if not re.fullmatch(rf"[0-9.]+|({_DURATION})+", text):
        return None
    try:
        parts = [(float(number), unit) for number, unit in re.findall(r"([0-9.]+)([a-zµ]*)", text)]
    except ValueError:
        return None
    seconds = sum(number * _UNITS_S[unit or "s"] for number, unit in parts)
    return math.inf if sign and seconds else seconds


def _form_kind(value: Any) -> str:
    return "<schema>" if isinstance(value, dict) else "<name>"


def _think_kind(value: Any) -> str:
    return "<level>" if isinstance(value, str) else "<switch>"


FormatField = Annotated[
    Annotated[Literal["json", ""], Tag("<name>")] | Annotated[JsonObject, Tag("<schema>")], Discriminator(_form_kind)
]
ThinkField = Annotated[
    Annotated[bool, Tag("<switch>")] | Annotated[Literal["low", "medium", "high", "max"], Tag("<level>")],
    Discriminator(_think_kind),
]


class AnsweredBody(Body):
    """What /api/chat and /api/generate share. Answers are streamed unless the request says otherwise."""

    foreign: ClassVar[Mapping[str, Foreign]] = OLLAMA

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    format: FormatField | None = None
    options: Options | None = None
    think: ThinkField | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    keep_alive: Any = None

    def check(self, limits: Limits, unknown: UnknownFields) -> None:
        if self.options is not None:
            self.options.check(limits, unknown)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("`top_logprobs` needs `logprobs`: true.", param="top_logprobs")
        check_alternatives(self.top_logprobs, limits, "top_logprobs")

    @property
    def streams(self) -> bool:
        return self.stream is not False

    @property
    def unloads(self) -> bool:
        """Asked to forget the model."""
        return kept_s(self.keep_alive) == 0

    def _form(self) -> Form | None:
        if not self.format:
            return None
        return json_form({"type": "object"} if self.format == "json" else self.format, "format")

    def _fields(self) -> dict[str, Any]:
        options = self.options or Options()
        return {
            **options.fields(),
            "model": self.model,
            "stream": self.streams,
            "most_tokens": options.most_tokens,
            "form": self._form(),
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "enable_thinking": None if self.think is None else bool(self.think),
            "reasoning_effort": self.think if isinstance(self.think, str) else None,
        }


class CalledTool(Nested):
    name: ToolName
    arguments: JsonObject | None = None


class Called(Nested):
    id: Annotated[str, Field(max_length=256)] | None = None
    function: CalledTool


class OllamaMessage(Nested):
    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    images: Images | None = None
    thinking: Text | None = None
    tool_calls: Annotated[list[Called], Field(max_length=MAX_TOOLS)] | None = None
    tool_name: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_\-. ]*$")] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class OllamaTool(Nested):
    type: Annotated[str, Field(max_length=64)] = "function"
    function: Function


class OllamaChatRequest(AnsweredBody):
    messages: Annotated[list[OllamaMessage], Field(max_length=8192)] | None = None
    tools: Annotated[list[OllamaTool], Field(max_length=MAX_TOOLS)] | None = None

    def check(self, limits: Limits, unknown: UnknownFields) -> None:
        super().check(limits, unknown)
        for index, message in enumerate(self.messages or ()):
            if message.tool_calls and message.role != "assistant":
                where = f"messages[{index}].tool_calls"
                raise RequestError("Only assistant messages have `tool_calls`.", param=where)
        if self._last is not None and self._last.tool_calls:
            raise RequestError(
                "The last message calls a tool: send its result in a message with the role tool after it.",
                param=f"messages[{len(self.messages or ()) - 1}].tool_calls",
            )

    @property
    def _last(self) -> OllamaMessage | None:
        return self.messages[-1] if self.messages else None

    def as_chat(self) -> ForeignChat:
        tools = [ToolEntry(type=tool.type, function=tool.function) for tool in self.tools or ()]
        continues = self._last is not None and self._last.role == "assistant"
        chat = ForeignChat.of(self, **self._fields(), tools=tools or None, continue_final_message=continues or None)
        chat.check_tools()
        return chat

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        messages = self.messages or []
        if len(messages) > limits.max_messages:
            raise RequestError(f"`messages` must have at most {limits.max_messages} entries.", param="messages")
        turns = Turns()
        calls: list[tuple[str, str]] = []  # id and name of those without a result, the first one first
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            parts, media = _parts(message.content, message.images, where, modalities)
            if message.role == "tool":
                call_id, name = _answered(message, calls)
                turns.add_result(call_id, parts, media, where, name)
                continue
            turns.add(message.role, parts, media, thoughts=message.thinking or "")
            for number, call in enumerate(message.tool_calls or ()):
                call_id = call.id or f"call_{index}_{number}"
                calls.append((call_id, call.function.name))
                turns.add_call(call_id, call.function.name, call.function.arguments or {}, f"{where}.tool_calls")
        return turns.conversation()


def _answered(message: OllamaMessage, calls: list[tuple[str, str]]) -> tuple[str, str | None]:
    """Which call a result is of: Ollama's messages name the tool at most, and results come in the order of calls."""
    for found in calls:
        if message.tool_call_id == found[0] or (not message.tool_call_id and message.tool_name in (None, "", found[1])):
            calls.remove(found)
            return found[0], message.tool_name or found[1]
    return message.tool_call_id or "", message.tool_name or None


def _parts(
    text: str | None, images: Sequence[str] | None, where: str, modalities: frozenset[Modality]
) -> tuple[list[Part], list[MediaSource]]:
    """Images stand before the text."""
    media: list[MediaSource] = []
    place = f"{where}." if where else ""
    parts: list[Part] = [
        media_part("image", MediaSource("image", f"{place}images[{number}]", data=image), modalities, media)
        for number, image in enumerate(images or ())
    ]
    if text or (text is not None and not parts):
        parts.append(TextPart(text))
    return parts, media


class GenerateRequest(AnsweredBody):
    prompt: Text | None = None
    suffix: Text | None = None
    system: Text | None = None
    template: Text | None = None
    context: Annotated[list[TokenId], Field(max_length=2**20)] | None = None
    images: Images | None = None
    raw: bool | None = None

    def check(self, limits: Limits, unknown: UnknownFields) -> None:
        super().check(limits, unknown)
        for name, advice in (
            ("suffix", "put both halves into `prompt` as the model was trained to have them, with `raw`"),
            ("template", "the model's own chat template is used; with `raw` there is none"),
            ("context", "send the conversation to /api/chat"),
        ):
            if getattr(self, name):
                raise UnsupportedFieldError(f"`{name}` is not supported by this server: {advice}.", param=name)
        if self.raw:
            for name in ("images", "system"):
                if getattr(self, name):
                    raise RequestError(f"`{name}` does not go with `raw`.", param=name)

    @property
    def loads(self) -> bool:
        return not self.prompt and not self.images

    def as_chat(self) -> ForeignChat:
        return ForeignChat.of(self, **self._fields())

    def conversation(self, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        if len(self.images or ()) > limits.max_parts:
            raise RequestError(f"`images` must have at most {limits.max_parts} entries.", param="images")
        turns = Turns()
        if self.system:
            turns.add("system", [TextPart(self.system)], [])
        parts, media = _parts(self.prompt, self.images, "", modalities)
        turns.add("user", parts, media)
        return turns.conversation()


class ShowRequest(Body):
    model: Name | None = None
    name: Name | None = None  # what it was called first
    verbose: bool | None = None


class OllamaEmbedRequest(InputBody):
    foreign: ClassVar[Mapping[str, Foreign]] = VECTORS
    cut_by: ClassVar[str] = "`truncate`: true"

    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    options: JsonObject | None = None  # of a machine; nothing is sampled
    keep_alive: Any = None

    @property
    def most_tokens(self) -> int | None:
        return super().most_tokens if self.truncate is False else -1

    def params(self) -> PoolingParams:
        return PoolingParams("embed", dimensions=self.dimensions)


class OllamaEmbeddingsRequest(OllamaEmbedRequest):
    """Of one text."""

    input_name: ClassVar[str] = "prompt"

    input: Text | None = Field(None, alias="prompt")
