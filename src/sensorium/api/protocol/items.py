"""One input of a pooling endpoint as Jina's, Cohere's, SGLang's and llama.cpp's clients write it: an object that has a
text, media, or both."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sensorium.api.protocol.common import Nested, Text
from sensorium.api.protocol.content import Conversation, Part, TextContent, Url, media_part, message_of_parts
from sensorium.config import Limits
from sensorium.media.source import MediaSource
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.types import Modality

KINDS: tuple[Modality, ...] = ("image", "video", "audio")


class InputItem(Nested):
    """Either `content`, the parts of a message, or any of the other fields: media are a URL or base64."""

    text: Text | None = None
    image: Url | None = None
    video: Url | None = None
    audio: Url | None = None
    content: Annotated[list[Part], Field(min_length=1, max_length=4096)] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> InputItem:
        fields = [name for name in ("text", *KINDS) if getattr(self, name) is not None]
        if bool(fields) == (self.content is not None):
            raise PydanticCustomError("own", "must have `text`, `image`, `video` or `audio`, or else `content`")
        return self

    @property
    def plain(self) -> str | None:
        """The text, where there is nothing else."""
        if self.content is None:
            return self.text if all(getattr(self, kind) is None for kind in KINDS) else None
        if not all(isinstance(part, TextContent) for part in self.content):
            return None
        return "\n".join(part.text for part in self.content if isinstance(part, TextContent))

    def conversation(self, where: str, modalities: frozenset[Modality], limits: Limits) -> Conversation:
        """What a user says, media before the text, for models that see it through their chat template."""
        if self.content is not None:
            return message_of_parts(self.content, f"{where}.content", modalities, limits)
        media: list[MediaSource] = []
        parts: list[TextPart | MediaPart] = [
            media_part(kind, _source(kind, getattr(self, kind), f"{where}.{kind}"), modalities, media)
            for kind in KINDS
            if getattr(self, kind) is not None
        ]
        if self.text:
            parts.append(TextPart(self.text))
        return Conversation((Message("user", tuple(parts)),), tuple(media))


def _source(kind: Modality, value: str, where: str) -> MediaSource:
    """A URL, or base64, which has no colon."""
    return MediaSource(kind, where, url=value) if ":" in value[:16] else MediaSource(kind, where, data=value)


def is_item(value: Any) -> bool:
    return isinstance(value, dict | InputItem)
