"""Pieces of a streamed body that come within a few milliseconds go out together.

What carries a piece to the client (Ray, a proxy, the sockets between) costs by the piece. The first piece, and one that
comes after a pause, waits for nothing: so a model that takes longer than `GATHER_S` for a token streams as ever.
"""

from __future__ import annotations

import asyncio

from sensorium.api.transport.asgi import Message, Send

GATHER_S = 0.01
MOST_BYTES = 64 << 10  # that wait, beyond which the writer waits for its reader


class Gathered:
    """Implements `Send` over another one. Several tasks may write. `close` it when nothing more is written."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # of who sends
        self._pieces = bytearray()
        self._sent_s = -GATHER_S
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        """Raises what sending earlier pieces raised."""
        if self._flushing is not None and self._flushing.done():
            self._flushing.result()
        if not message.get("more_body", False):  # a head, or the end
            self._stop()
            async with self._turn:
                if message["type"] == "http.response.body" and self._pieces:
                    message = {**message, "body": bytes(self._pieces + message.get("body", b""))}
                    self._pieces.clear()
                await self._send(message)
            return
        self._pieces += message["body"]
        wait_s = self._sent_s + GATHER_S - self._loop.time()
        if wait_s <= 0 or len(self._pieces) >= MOST_BYTES:
            await self._flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(wait_s, self._flush_later)

    def close(self) -> None:
        """What still waits is for nobody."""
        self._stop()
        if self._flushing is not None and not self._flushing.cancel() and not self._flushing.cancelled():
            self._flushing.exception()  # seen, if by nobody else

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush_later(self) -> None:
        self._timer = None
        if self._flushing is None or self._flushing.done():  # else it sends these, too
            self._flushing = self._loop.create_task(self._flush())

    async def _flush(self) -> None:
        async with self._turn:
            while self._pieces:  # what came while the reader was slow goes next
                self._stop()
                body = bytes(self._pieces)
                self._pieces.clear()
                self._sent_s = self._loop.time()
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
