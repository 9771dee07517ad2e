"""What a chat consists of once the API layer has checked it: messages of text and of places for media.

The media themselves travel beside the messages, in order of appearance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sensorium.types import Modality


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    kind: Modality


@dataclass(frozen=True, slots=True)
class Message:
    """`extra` holds what else the template may read: tool calls, reasoning, a tool's name."""

    role: str
    content: tuple[TextPart | MediaPart, ...]
    name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
