"""An answer as content blocks of Anthropic's Messages API. Events and the whole answer come from the same blocks."""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

import msgspec

from sensorium.api.ids import new_id
from sensorium.prompt.formats.base import Arguments, Call, Delta, Reasoning, Text

Event = dict[str, Any]


class Content:
    """Give it every delta in order, then `finish`. One block is open at a time; `blocks` are those that are closed.

    Spaces and line breaks between thoughts, text and calls are no block: clients send blocks back, and an empty text is
    refused by Anthropic's own API. `cut`: the answer did not end by itself, so its last call may be no JSON.
    """

    def __init__(self, signing_key: bytes) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.has_calls = False
        self._signing_key = signing_key
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []  # of the open block
        self._spaces = ""  # text with which no block was begun

    def push(self, deltas: Iterable[Delta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            match delta:
                case Text(text):
                    self._text(text, events)
                case Reasoning(text):
                    self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""}, events)
                    self._grow("thinking_delta", "thinking", text, events)
                case Call(_, name):
                    self._close(events)
                    self.has_calls = True
                    identity = new_id("toolu")
                    self._begin("call", {"type": "tool_use", "id": identity, "name": name, "input": {}}, events)
                case Arguments(_, text):
                    self._grow("input_json_delta", "partial_json", text, events)
        return events

    def finish(self, *, cut: bool) -> list[Event]:
        """`cut`: the answer did not end by itself."""
        events: list[Event] = []
        self._close(events, cut=cut)
        if not self.blocks:
            self._begin("text", {"type": "text", "text": ""}, events)
            if self._spaces:
                self._grow("text_delta", "text", self._spaces, events)
            self._close(events)
        return events

    def _text(self, text: str, events: list[Event]) -> None:
        if self._open is None or self._open["type"] != "text":
            text, self._spaces = self._spaces + text, ""
            if not text.strip():
                self._spaces = text
                return
            self._begin("text", {"type": "text", "text": ""}, events)
        self._grow("text_delta", "text", text, events)

    def _begin(self, kind: str, block: dict[str, Any], events: list[Event]) -> None:
        if self._open is not None and kind != "call" and self._open["type"] == kind:
            return
        self._close(events)
        self._open = block
        events.append({"type": "content_block_start", "index": len(self.blocks), "content_block": {**block}})

    def _grow(self, kind: str, field: str, text: str, events: list[Event]) -> None:
        """One event for what came at once."""
        self._pieces.append(text)
        last = events[-1] if events else None
        if last is not None and last["type"] == "content_block_delta" and last["index"] == len(self.blocks):
            last["delta"][field] += text
            return
        delta = {"type": kind, field: text}
        events.append({"type": "content_block_delta", "index": len(self.blocks), "delta": delta})

    def _close(self, events: list[Event], *, cut: bool = False) -> None:
        block, self._open = self._open, None
        if block is None:
            return
        self._spaces = ""
        text, self._pieces = "".join(self._pieces), []
        index = len(self.blocks)
        match block["type"]:
            case "thinking":
                block |= {"thinking": text, "signature": self._signature(text)}
                delta = {"type": "signature_delta", "signature": block["signature"]}
                events.append({"type": "content_block_delta", "index": index, "delta": delta})
            case "tool_use":
                block["input"] = arguments_object(text, cut=cut)
            case _:
                block |= {"text": text, "citations": None}
        self.blocks.append(block)
        events.append({"type": "content_block_stop", "index": index})

    def _signature(self, thoughts: str) -> str:
        """By which thoughts that come back can be told from others'."""
        return b64encode(hmac.digest(self._signing_key, thoughts.encode("utf-8", "replace"), "sha256")).decode()


def arguments_object(arguments: str, *, cut: bool) -> dict[str, Any]:
    """What a call is given: always an object, as clients expect."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        return {} if cut else {"raw": arguments}
    return found if isinstance(found, dict) else {"raw": arguments}
