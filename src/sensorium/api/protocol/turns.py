"""Builds a conversation out of another API's messages: turns of one role that follow each other become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sensorium.api.protocol.content import Conversation
from sensorium.media.source import MediaSource
from sensorium.prompt.messages import MediaPart, Message, TextPart

Part = TextPart | MediaPart


@dataclass(slots=True)
class _Turn:
    role: str
    parts: list[Part] = field(default_factory=list)
    media: list[MediaSource] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    answers: str = ""  # the id of the call that it is the result of
    name: str | None = None

    def message(self) -> Message:
        extra: dict[str, Any] = {}
        if self.calls:
            extra["tool_calls"] = self.calls
        if self.role == "tool":
            extra["tool_call_id"] = self.answers
        if self.thoughts:
            extra["reasoning_content"] = "\n".join(self.thoughts)
        return Message(self.role, tuple(self.parts), name=self.name, extra=extra)


class Turns:
    """Add what was said, in the order in which the prompt is to have it."""

    def __init__(self) -> None:
        self._turns: list[_Turn] = []
        self._tool_place = ""

    def add(self, role: str, parts: Sequence[Part], media: Sequence[MediaSource], *, thoughts: str = "") -> None:
        """What the user, the assistant or the operator says. `media` are those of `parts`, in order."""
        turn = self._turns[-1] if self._turns and self._turns[-1].role == role else None
        if turn is None:
            turn = _Turn(role)
            self._turns.append(turn)
        turn.parts.extend(parts)
        turn.media.extend(media)
        if thoughts:
            turn.thoughts.append(thoughts)

    def add_call(self, call_id: str, name: str, arguments: Mapping[str, Any], place: str) -> None:
        """In the assistant's turn, which is the last. `place` is where it stands in the request."""
        self._tool_place = self._tool_place or place
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        self._turns[-1].calls.append(call)

    def add_result(
        self, call_id: str, parts: Sequence[Part], media: Sequence[MediaSource], place: str, name: str | None = None
    ) -> None:
        """What a tool answered, a turn of its own. `name` is the tool's, where the request says it."""
        self._tool_place = self._tool_place or place
        self._turns.append(_Turn("tool", list(parts), list(media), answers=call_id, name=name))

    def conversation(self) -> Conversation:
        media = tuple(source for turn in self._turns for source in turn.media)
        return Conversation(tuple(turn.message() for turn in self._turns), media, self._tool_place)


def system_first(conversation: Conversation) -> Conversation:
    """The same for templates that take one system message, at the start. Users' turns that it stood between are one."""
    messages = conversation.messages
    system = [part for message in messages if message.role == "system" for part in message.content]
    made = [Message("system", tuple(system))] if system else []
    for message in (message for message in messages if message.role != "system"):
        last = made[-1] if made else None
        if last is not None and last.role == message.role == "user" and not (last.extra or message.extra):
            made[-1] = replace(last, content=(*last.content, *message.content))
        else:
            made.append(message)
    return replace(conversation, messages=tuple(made))


def has_late_system(conversation: Conversation) -> bool:
    return any(message.role == "system" for message in conversation.messages[1:])
