"""Chat messages: strings or parts, text and media anywhere. Turned into prompt messages and media sources, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from sensorium.api.protocol.common import Nested, Text
from sensorium.api.protocol.tools import ToolCalls, call_objects
from sensorium.api.protocol.unions import LIST_OR_TEXT, TEXT_OR_OBJECT, by_type, tags_of
from sensorium.config import Limits
from sensorium.errors import MissingFieldError, RequestError, UnsupportedFieldError, UnsupportedModalityError
from sensorium.media.source import MediaSource
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.types import Modality

Url = Annotated[str, Field(min_length=1, max_length=2**28)]
"""Long, because `data:` URLs are URLs; the body's limit is the smaller one."""


class UrlObject(Nested):
    url: Url | None = None
    detail: Annotated[str, Field(max_length=16)] | None = None


class AudioData(Nested):
    data: Url | None = None
    format: Annotated[str, Field(max_length=16)] | None = None


UrlField = Annotated[Annotated[Url, Tag("<string>")] | Annotated[UrlObject, Tag("<object>")], TEXT_OR_OBJECT]


class TextContent(Nested):
    type: Literal["text"]
    text: Text


class MediaContent(Nested):
    """A media item. Under a `uuid` that was sent before it may come without the item."""

    uuid: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class ImageContent(MediaContent):
    type: Literal["image_url"]
    image_url: UrlField | None = None


class VideoContent(MediaContent):
    type: Literal["video_url"]
    video_url: UrlField | None = None


class AudioContent(MediaContent):
    type: Literal["audio_url"]
    audio_url: UrlField | None = None


class InputAudioContent(MediaContent):
    type: Literal["input_audio"]
    input_audio: AudioData | None = None


class OtherContent(Nested):
    """A part of a kind that we do not have; refused by name when messages are made."""

    type: Annotated[str, Field(max_length=64)]


Part = Annotated[
    Annotated[TextContent, Tag("<text>")]
    | Annotated[ImageContent, Tag("<image_url>")]
    | Annotated[VideoContent, Tag("<video_url>")]
    | Annotated[AudioContent, Tag("<audio_url>")]
    | Annotated[InputAudioContent, Tag("<input_audio>")]
    | Annotated[OtherContent, Tag("<other>")],
    by_type(tags_of("text image_url video_url audio_url input_audio")),
]


Content = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[Part], Field(max_length=4096), Tag("<list>")], LIST_OR_TEXT
]


class ChatMessage(Nested):
    """One message. Roles and names are plain words: they stand in the prompt outside the text that is escaped."""

    role: Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[A-Za-z][A-Za-z0-9_\-]*$")]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_\-. ]*$")] | None = None
    tool_calls: ToolCalls | None = None
    function_call: Any = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    thinking: Text | None = None
    prefix: bool | None = None  # Mistral's and DeepSeek's: the answer goes on where this last message ends
    _place: str = ""

    @classmethod
    def placed(cls, place: str, fields: Mapping[str, Any]) -> ChatMessage:
        """A message made of another API's: `place` is where that stands in the request."""
        message = cls.model_validate(fields)
        message._place = place
        return message

    @property
    def place(self) -> str:
        """Where it stands in a request of another API; "" if it is one of `messages`."""
        return self._place

    @property
    def extra(self) -> dict[str, Any]:
        """What a template may read of it beside role, name and content. What the assistant thought stands under one
        name, whichever of the three the client uses."""
        found: dict[str, Any] = {}
        if self.tool_calls:
            found["tool_calls"] = call_objects(self.tool_calls)
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        thoughts = self.reasoning_content or self.reasoning or self.thinking
        if thoughts:
            found["reasoning_content"] = thoughts
        return found


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=8192)]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the prompt layer is given: messages with a `MediaPart` wherever the next media item of that kind belongs.
    `tool_place` is where the request first has a call or a result; "" without any."""

    messages: tuple[Message, ...]
    media: tuple[MediaSource, ...]
    tool_place: str = ""

    @property
    def last_text(self) -> str:
        return "".join(part.text for part in self.messages[-1].content if isinstance(part, TextPart))


def conversation(
    messages: Sequence[ChatMessage], modalities: frozenset[Modality], limits: Limits, *, where: str = "messages"
) -> Conversation:
    """Check a chat's messages against the limits and the model, and make the project's own types of them."""
    if len(messages) > limits.max_messages:
        raise RequestError(f"`{where}` must have at most {limits.max_messages} entries.", param=where)
    media: list[MediaSource] = []
    made: list[Message] = []
    tool_place = ""
    for index, message in enumerate(messages):
        place = message.place or f"{where}[{index}]"
        _check_message(message, place, limits)
        parts = tuple(
            _part(part, f"{place}.content[{number}]", modalities, media) for number, part in enumerate(_parts(message))
        )
        made.append(Message(message.role, parts, name=message.name or None, extra=message.extra))
        if not tool_place and (message.tool_calls or message.role == "tool"):
            tool_place = f"{place}.tool_calls" if message.tool_calls else f"{place}.role"
    return Conversation(tuple(made), tuple(media), tool_place)


def message_of_parts(parts: Sequence[Any], where: str, modalities: frozenset[Modality], limits: Limits) -> Conversation:
    """Parts without a chat around them, as what a user says."""
    if len(parts) > limits.max_parts:
        raise RequestError(f"`{where}` must have at most {limits.max_parts} parts.", param=where)
    media: list[MediaSource] = []
    made = tuple(_part(part, f"{where}[{number}]", modalities, media) for number, part in enumerate(parts))
    return Conversation((Message("user", made),), tuple(media))


def _check_message(message: ChatMessage, where: str, limits: Limits) -> None:
    if message.role == "function" or message.function_call:
        raise UnsupportedFieldError(
            "Function calls are called `tool_calls` here, and their results have the role `tool`.",
            param=f"{where}.function_call" if message.function_call else f"{where}.role",
        )
    if message.tool_calls and message.role != "assistant":
        raise RequestError("Only assistant messages have `tool_calls`.", param=f"{where}.tool_calls")
    if message.content is None and message.role != "assistant":
        raise MissingFieldError(f"{where}.content")
    if isinstance(message.content, list) and len(message.content) > limits.max_parts:
        raise RequestError(f"`{where}.content` must have at most {limits.max_parts} parts.", param=f"{where}.content")


def _parts(message: ChatMessage) -> Sequence[Any]:
    if isinstance(message.content, str):
        return (TextContent(type="text", text=message.content),)
    return message.content or ()


def _part(part: Any, where: str, modalities: frozenset[Modality], media: list[MediaSource]) -> TextPart | MediaPart:
    """One part; a media item's source is appended to `media`."""
    match part:
        case TextContent():
            return TextPart(part.text)
        case ImageContent():
            return media_part("image", _source("image", part, part.image_url, where), modalities, media)
        case VideoContent():
            return media_part("video", _source("video", part, part.video_url, where), modalities, media)
        case AudioContent():
            return media_part("audio", _source("audio", part, part.audio_url, where), modalities, media)
        case InputAudioContent():
            return media_part("audio", _source("audio", part, part.input_audio, where), modalities, media)
    raise RequestError(
        "A content part must be text, image_url, video_url, audio_url or input_audio.",
        param=f"{where}.type",
        code="unsupported_content_part",
    )


def _source(kind: Modality, part: MediaContent, value: str | UrlObject | AudioData | None, where: str) -> MediaSource:
    """Where an item comes from. RequestError if it has neither content nor a name."""
    field = f"{where}.{part.type}"  # type: ignore[attr-defined]  # every kind of part has one
    match value:
        case str():
            return MediaSource(kind, field, url=value, uuid=part.uuid)
        case UrlObject(url=str(url)):
            return MediaSource(kind, f"{field}.url", url=url, uuid=part.uuid)
        case AudioData(data=str(data)):
            return MediaSource(kind, f"{field}.data", data=data, format=value.format, uuid=part.uuid)
    if part.uuid is not None:
        return MediaSource(kind, f"{where}.uuid", uuid=part.uuid)
    is_null = value is None and part.type in part.model_fields_set  # type: ignore[attr-defined]
    if value is not None:
        field += ".data" if isinstance(value, AudioData) else ".url"
    raise RequestError(
        f"`{field}` is required, or a `uuid` under which it was sent before.",
        param=field,
        code=None if is_null else "missing_required_parameter",
    )


def media_part(
    kind: Modality, source: MediaSource, modalities: frozenset[Modality], media: list[MediaSource]
) -> MediaPart:
    if kind not in modalities:
        raise UnsupportedModalityError(kind, param=source.param, takes=modalities)
    media.append(source)
    return MediaPart(kind)
