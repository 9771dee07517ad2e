"""The events of a streaming answer as bytes. What never changes in a stream is encoded once; a token costs one string.

The objects are OpenAI's, key by key; `finish_reason` is null until the last one, never missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode
Usage = Callable[[int], dict[str, object]]
"""The figures so far, without that many tokens of which nothing has been sent yet."""


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What all objects of one answer say about it."""

    id: str
    created: int
    model: str


class Frames:
    """Events of one endpoint. `running_usage` is asked for every event if the client wants continuous figures."""

    def __init__(
        self,
        head: StreamHead,
        kind: str,
        *,
        open_text: bytes,
        close_text: bytes,
        include_usage: bool,
        running_usage: Usage | None,
    ) -> None:
        """`open_text` and `close_text` stand around the text in a choice: `"delta":{"content":` and `}`."""
        self._start = (
            b'data: {"id":'
            + _encode(head.id)
            + b',"object":'
            + _encode(kind)
            + b',"created":'
            + str(head.created).encode()
            + b',"model":'
            + _encode(head.model)
            + b',"choices":['
        )
        self._open_text = open_text
        self._close_text = close_text
        self._null_usage = b',"usage":null' if include_usage else b""
        self._running_usage = running_usage
        self._plain_end = close_text + b',"logprobs":null,"finish_reason":null}]' + self._null_usage + b"}\n\n"
        self._choices: dict[int, bytes] = {}

    def _choice(self, index: int) -> bytes:
        if index not in self._choices:
            self._choices[index] = self._start + b'{"index":' + str(index).encode() + b","
        return self._choices[index]

    def text(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        *,
        unsent: int = 0,
        more: dict[str, Any] | None = None,
        beside: dict[str, Any] | None = None,
    ) -> bytes:
        """A piece of an answer. `unsent` tokens are counted already, but come after it. `more` are further fields of
        the choice, `beside` of the event."""
        if logprobs is None and self._running_usage is None and not more and not beside:
            return b"".join((self._choice(index), self._open_text, _encode(text), self._plain_end))
        body = self._open_text + _encode(text) + self._close_text
        return self._event(index, body, logprobs, b"null", _members(more), unsent, beside=_members(beside))

    def delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        *,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        """A piece of a chat answer that is not text."""
        return self._event(index, b'"delta":' + _encode(delta), logprobs, b"null", _members(more))

    def role(self, index: int, unsent: int, *, beside: dict[str, Any] | None = None) -> bytes:
        """The first event of a chat answer. `beside` are further fields of the event."""
        body = b'"delta":{"role":"assistant","content":""}'
        return self._event(index, body, None, b"null", b"", unsent, beside=_members(beside))

    def finish(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str,
        stop_reason: str | int | None,
        *,
        empty: bytes | None = None,
        more: dict[str, Any] | None = None,
        beside: dict[str, Any] | None = None,
    ) -> bytes:
        """The last event of an answer. `empty` replaces an empty text; `more` and `beside` are as above."""
        body = empty if empty is not None and not text else self._open_text + _encode(text) + self._close_text
        members = _members({"stop_reason": stop_reason, **(more or {})})
        return self._event(index, body, logprobs, _encode(reason), members, beside=_members(beside))

    def usage(self, usage: dict[str, object]) -> bytes:
        """The event after the last choice, if the client asked for it."""
        return self._start + b'],"usage":' + _encode(usage) + b"}\n\n"

    def _event(
        self,
        index: int,
        body: bytes,
        logprobs: dict[str, Any] | None,
        reason: bytes,
        more: bytes,
        unsent: int = 0,
        *,
        beside: bytes = b"",
    ) -> bytes:
        usage = self._null_usage
        if self._running_usage is not None:
            usage = b',"usage":' + _encode(self._running_usage(unsent))
        return b"".join(
            (
                self._choice(index),
                body,
                b',"logprobs":',
                _encode(logprobs),
                b',"finish_reason":',
                reason,
                more,
                b"}]",
                beside,
                usage,
                b"}\n\n",
            )
        )


def _members(fields: dict[str, Any] | None) -> bytes:
    """Further members of an object that has some already: `,"name":value` each."""
    return b"," + _encode(fields)[1:-1] if fields else b""


def chat_frames(head: StreamHead, *, include_usage: bool, running_usage: Usage | None) -> Frames:
    return Frames(
        head,
        "chat.completion.chunk",
        open_text=b'"delta":{"content":',
        close_text=b"}",
        include_usage=include_usage,
        running_usage=running_usage,
    )


def completion_frames(head: StreamHead, *, include_usage: bool, running_usage: Usage | None) -> Frames:
    return Frames(
        head,
        "text_completion",
        open_text=b'"text":',
        close_text=b"",
        include_usage=include_usage,
        running_usage=running_usage,
    )
