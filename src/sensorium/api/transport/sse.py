"""Server-sent events, the only writer of them: bytes in, bytes out, with a comment when nothing was said for long.

The status line goes out with the first event, so that whatever fails before it still has a status of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import msgspec

from sensorium.api.transport.asgi import EVENTS, Call

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


def named_event(event: Mapping[str, Any]) -> bytes:
    """An event that is named by its `type`, for clients that look at the name."""
    kind: str = event["type"]
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(event))


class EventStream:
    """The body of one streaming answer. Several tasks may write; each `write` is whole events.

    `done` is the marker after the last one, `comment` what is said in a silence: b"" to say nothing."""

    def __init__(
        self,
        call: Call,
        keep_alive_s: float,
        *,
        done: bytes = DONE,
        comment: bytes = COMMENT,
        content_type: bytes = EVENTS,
    ) -> None:
        self._call = call
        self._send = call.send
        self._keep_alive_s = keep_alive_s if comment else 0.0
        self._done = done
        self._silence = comment
        self._content_type = content_type
        self._loop = asyncio.get_running_loop()
        self._written_s = 0.0
        self._starting = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
        self.started = False

    async def write(self, events: bytes) -> None:
        if not self.started:
            await self._start()
        self._written_s = self._loop.time()
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self, events: bytes) -> None:
        """The last events and the marker after them."""
        if not self.started:
            await self._start()
        await self._send({"type": "http.response.body", "body": events + self._done})

    async def _start(self) -> None:
        async with self._starting:
            if not self.started:
                await self._call.start_events(self._content_type)
                self.started = True
                if self._keep_alive_s > 0:
                    self._timer = self._loop.call_later(self._keep_alive_s, self._tick)

    def _tick(self) -> None:
        silent_s = self._loop.time() - self._written_s
        if silent_s >= self._keep_alive_s:
            if self._comment is None or self._comment.done():  # else the client does not even read comments
                self._comment = self._loop.create_task(self.write(self._silence))
            silent_s = 0.0
        self._timer = self._loop.call_later(self._keep_alive_s - silent_s, self._tick)

    async def __aenter__(self) -> EventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
