"""Anthropic's messages as a conversation: results of tools become messages of their own, turns of one role are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sensorium.api.protocol.content import Conversation, media_part
from sensorium.api.protocol.message_blocks import (
    Base64Source,
    ContentSource,
    DocumentBlock,
    ImageBlock,
    InputMessage,
    SearchResultBlock,
    TextBlock,
    TextSource,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    UrlSource,
)
from sensorium.api.protocol.turns import Turns
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.media.source import MediaSource
from sensorium.prompt.messages import MediaPart, TextPart
from sensorium.types import Modality

BILLING = "x-anthropic-billing-header"
"""Begins a text that is not for the model, and different in every request."""
_IGNORED = frozenset({"redacted_thinking", "tool_addition", "tool_removal"})
_ROLES = {"tool_use": "assistant", "thinking": "assistant", "tool_result": "user"}
"""Whose messages may have these blocks."""

Parts = list[TextPart | MediaPart]


def turns_of(
    system: str | Sequence[TextBlock] | None,
    messages: Sequence[InputMessage],
    modalities: frozenset[Modality],
    limits: Limits,
) -> Conversation:
    """RequestError names the block that is refused."""
    if len(messages) > limits.max_messages:
        raise RequestError(f"`messages` must have at most {limits.max_messages} entries.", param="messages")
    reader = _Reader(modalities, limits)
    if system is not None:
        reader.system(system, "system")
    for index, message in enumerate(messages):
        reader.message(message, f"messages[{index}]")
    return reader.turns.conversation()


class _Reader:
    """Goes through the messages once. Media are kept in the order in which the prompt will have them."""

    def __init__(self, modalities: frozenset[Modality], limits: Limits) -> None:
        self.turns = Turns()
        self._modalities = modalities
        self._limits = limits

    def system(self, content: str | Sequence[Any], where: str) -> None:
        texts = [content] if isinstance(content, str) else [one.text for one in content if isinstance(one, TextBlock)]
        parts = [TextPart(text) for text in map(_without_billing, texts) if text]
        if parts:
            self.turns.add("system", parts, [])

    def message(self, message: InputMessage, where: str) -> None:
        content = message.content
        if isinstance(content, str):
            if message.role == "system":
                self.system(content, where)
            else:
                self.turns.add(message.role, [TextPart(content)], [])
            return
        if len(content) > self._limits.max_parts:
            most = self._limits.max_parts
            raise RequestError(f"`{where}.content` must have at most {most} blocks.", param=f"{where}.content")
        places = [f"{where}.content[{number}]" for number in range(len(content))]
        for block, place in zip(content, places, strict=True):
            _check_place(block, message.role, place)
        if message.role == "system":
            self.system(content, where)
        elif message.role == "assistant":
            self._assistant(content, places)
        else:
            self._user(content, places)

    def _user(self, blocks: Sequence[Any], places: Sequence[str]) -> None:
        """Results first: templates want them directly after the calls."""
        others = []
        for block, place in zip(blocks, places, strict=True):
            if isinstance(block, ToolResultBlock):
                self._result(block, place)
            else:
                others.append((block, place))
        parts, media = self._parts(others)
        if parts or not blocks:
            self.turns.add("user", parts, media)

    def _result(self, block: ToolResultBlock, place: str) -> None:
        content = block.content
        parts: Parts = []
        media: list[MediaSource] = []
        if content is None or isinstance(content, str):
            parts.append(TextPart(content or ""))
        else:
            if len(content) > self._limits.max_parts:
                most, where = self._limits.max_parts, f"{place}.content"
                raise RequestError(f"`{where}` must have at most {most} blocks.", param=where)
            found = [(inner, f"{place}.content[{number}]") for number, inner in enumerate(content)]
            parts, media = self._parts(found)
        if block.is_error:
            parts = _as_error(parts)
        self.turns.add_result(block.tool_use_id, parts, media, place)

    def _assistant(self, blocks: Sequence[Any], places: Sequence[str]) -> None:
        calls = [(block, place) for block, place in zip(blocks, places, strict=True) if isinstance(block, ToolUseBlock)]
        thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
        said = [
            (block, place)
            for block, place in zip(blocks, places, strict=True)
            if not isinstance(block, ToolUseBlock | ThinkingBlock)
        ]
        parts, media = self._parts(said)
        self.turns.add("assistant", parts, media, thoughts=thoughts)
        for call, place in calls:
            self.turns.add_call(call.id, call.name, call.input, place)

    def _parts(self, blocks: Sequence[tuple[Any, str]]) -> tuple[Parts, list[MediaSource]]:
        parts: Parts = []
        media: list[MediaSource] = []
        for block, place in blocks:
            parts.extend(self._block(block, place, media))
        return parts, media

    def _block(self, block: Any, place: str, media: list[MediaSource]) -> Parts:
        match block:
            case TextBlock():
                return [TextPart(block.text)]
            case ImageBlock():
                source = _image(block.source, f"{place}.source")
                return [media_part("image", source, self._modalities, media)]
            case DocumentBlock():
                return self._document(block, place, media)
            case SearchResultBlock():
                lines = [block.title, block.source, *(one.text for one in block.content)]
                return [TextPart("\n".join(line for line in lines if line))]
            case ToolReferenceBlock():
                return [TextPart(block.tool_name)]
        if block.type in _IGNORED:
            return []
        raise RequestError(
            f"There is no place for a block of type {block.type!r} here.",
            param=f"{place}.type",
            code="unsupported_content_part",
        )

    def _document(self, block: DocumentBlock, place: str, media: list[MediaSource]) -> Parts:
        head: Parts = [TextPart(text) for text in (block.title, block.context) if text]
        match block.source:
            case TextSource():
                return [*head, TextPart(block.source.data)]
            case ContentSource():
                content = block.source.content
                if isinstance(content, str):
                    return [*head, TextPart(content)]
                for number, inner in enumerate(content):
                    head.extend(self._block(inner, f"{place}.source.content[{number}]", media))
                return head
        raise RequestError(
            f"Documents are text here, not {block.source.type!r}: send the text as a source of type text, or pages as "
            "images.",
            param=f"{place}.source.type",
            code="unsupported_content_part",
        )


def _as_error(parts: Parts) -> Parts:
    """Templates have no other place for it."""
    if parts and isinstance(parts[0], TextPart):
        return [TextPart(f"Error: {parts[0].text}"), *parts[1:]]
    return [TextPart("Error:"), *parts]


def _without_billing(text: str) -> str:
    """Of a text that goes on, only the first line is dropped."""
    return text.partition("\n")[2] if text.startswith(BILLING) else text


def _check_place(block: Any, role: str, place: str) -> None:
    kind = block.type
    if role == "system" and kind != "text" and kind not in _IGNORED:
        raise RequestError("System messages are text.", param=f"{place}.type", code="unsupported_content_part")
    wanted = _ROLES.get(kind)
    if wanted is not None and wanted != role:
        raise RequestError(f"Only {wanted} messages have {kind} blocks.", param=f"{place}.type")


def _image(source: Any, where: str) -> MediaSource:
    match source:
        case UrlSource():
            return MediaSource("image", f"{where}.url", url=source.url)
        case Base64Source():
            if not source.media_type.startswith("image/"):
                raise RequestError("`media_type` must be an image's, as image/png.", param=f"{where}.media_type")
            return MediaSource("image", f"{where}.data", data=source.data)
    raise RequestError(
        f"Images come as base64 or url here, not as {source.type!r}.",
        param=f"{where}.type",
        code="unsupported_content_part",
    )
