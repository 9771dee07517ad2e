"""Content blocks of Anthropic's Messages API, as requests bring them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from sensorium.api.protocol.common import Name, Nested, Text
from sensorium.api.protocol.content import Url
from sensorium.api.protocol.tools import JsonObject, ToolName
from sensorium.api.protocol.unions import LIST_OR_TEXT, by_type, tags_of

MAX_BLOCKS = 4096
Kind = Annotated[str, Field(max_length=64)]


class TextBlock(Nested):
    type: Literal["text"]
    text: Text


class Base64Source(Nested):
    type: Literal["base64"]
    media_type: Kind
    data: Url


class UrlSource(Nested):
    type: Literal["url"]
    url: Url


class TextSource(Nested):
    type: Literal["text"]
    data: Text


class Other(Nested):
    """What is of a kind that is not known here; refused by its name."""

    type: Kind


ImageSource = Annotated[
    Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")] | Annotated[Other, Tag("<other>")],
    by_type(tags_of("base64 url")),
]


class ImageBlock(Nested):
    type: Literal["image"]
    source: ImageSource


InnerBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")] | Annotated[Other, Tag("<other>")],
    by_type(tags_of("text image")),
]


class ContentSource(Nested):
    type: Literal["content"]
    content: Annotated[
        Annotated[Text, Tag("<string>")] | Annotated[list[InnerBlock], Field(max_length=MAX_BLOCKS), Tag("<list>")],
        LIST_OR_TEXT,
    ]


class DocumentBlock(Nested):
    type: Literal["document"]
    source: Annotated[
        Annotated[TextSource, Tag("<text>")]
        | Annotated[ContentSource, Tag("<content>")]
        | Annotated[Other, Tag("<other>")],
        by_type(tags_of("text content")),
    ]
    title: Name | None = None
    context: Text | None = None


class SearchResultBlock(Nested):
    type: Literal["search_result"]
    source: Text
    title: Text
    content: Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)]


class ToolReferenceBlock(Nested):
    type: Literal["tool_reference"]
    tool_name: Name


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SearchResultBlock, Tag("<search_result>")]
    | Annotated[ToolReferenceBlock, Tag("<tool_reference>")]
    | Annotated[Other, Tag("<other>")],
    by_type(tags_of("text image document search_result tool_reference")),
]


class ToolUseBlock(Nested):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: ToolName
    input: JsonObject


class ToolResultBlock(Nested):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)]
    content: (
        Annotated[
            Annotated[Text, Tag("<string>")]
            | Annotated[list[ResultBlock], Field(max_length=MAX_BLOCKS), Tag("<list>")],
            LIST_OR_TEXT,
        ]
        | None
    ) = None
    is_error: bool | None = None


class ThinkingBlock(Nested):
    type: Literal["thinking"]
    thinking: Text


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[DocumentBlock, Tag("<document>")]
    | Annotated[SearchResultBlock, Tag("<search_result>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[Other, Tag("<other>")],
    by_type(tags_of("text image document search_result tool_use tool_result thinking")),
]
Content = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[Block], Field(max_length=MAX_BLOCKS), Tag("<list>")], LIST_OR_TEXT
]
SystemContent = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS), Tag("<list>")],
    LIST_OR_TEXT,
]


class InputMessage(Nested):
    role: Literal["user", "assistant", "system"]
    content: Content
