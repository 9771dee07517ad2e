"""One request and its answer on a connection, as the application sees them: ASGI's `receive` and `send`.

An answer of unknown length is chunked for HTTP/1.1 and ends with the connection for HTTP/1.0.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sensorium.api.transport.asgi import Message, Scope

if TYPE_CHECKING:
    from sensorium.api.transport.connection import Connection

_UNREAD_BYTES = 64 * 1024
"""Of a body that the application does not take; then no more is read of the connection."""
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


class Exchange:
    """`ended`: the answer is out. `gone`: the client is, or the request was broken; nothing more can be answered."""

    def __init__(self, connection: Connection, scope: Scope, *, keep_alive: bool, expects_continue: bool) -> None:
        self.scope = scope
        self.keep_alive = keep_alive
        self.is_old = scope["http_version"] == "1.0"
        self.receives = True  # not all of the body is here
        self.started = self.ended = self.gone = False
        self._connection = connection
        self._expects_continue = expects_continue and not self.is_old
        self._news = asyncio.Event()
        self._body = bytearray()
        self._head = b""  # held back until there is something of the body, so that both are one packet
        self._chunked = False
        self._bodiless = False
        self._left: int | None = None  # bytes of the answer still to come, if it said how many

    # The connection's side

    def feed(self, piece: bytes) -> None:
        self._body += piece
        self._news.set()

    @property
    def is_full(self) -> bool:
        return len(self._body) > _UNREAD_BYTES

    def complete(self) -> None:
        """All of the request is here."""
        self.receives = False
        self._news.set()

    def abandon(self) -> None:
        """Whoever works for it is told that the client has gone."""
        self.gone = True
        self._body.clear()
        self._news.set()

    async def run(self, app: Any) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        finally:
            self._connection.on_exchange_left(self)

    # The application's side

    async def receive(self) -> Message:
        if self._expects_continue and not self.started and not self.gone:
            self._connection.write(CONTINUE)
        self._expects_continue = False
        if not self.gone and not self.ended:
            self._connection.resume_reading()
            await self._news.wait()
            self._news.clear()
        if self.gone or self.ended:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.receives}

    async def send(self, message: Message) -> None:
        """Waits while the client does not read. What is sent to a client that has gone is dropped."""
        await self._connection.until_writable()
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], message["headers"])
        else:
            self._continue(message.get("body", b""), more=message.get("more_body", False))

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self.started:
            raise RuntimeError("an answer was started twice")
        self.started = True
        self._expects_continue = False
        lengths = [int(value) for name, value in headers if name == b"content-length"]
        self._bodiless = self.scope["method"] == "HEAD" or status in (204, 304)
        self._left = lengths[0] if lengths else None
        self._chunked = not lengths and not self._bodiless and not self.is_old
        lines = [name + b": " + value for name, value in headers]
        if not self.keep_alive:
            lines.append(b"connection: close")
        if self._chunked:
            lines.append(b"transfer-encoding: chunked")
        if any(b"\r" in line or b"\n" in line for line in lines):
            raise RuntimeError("a header has a line break")
        self._head = status_line(status) + b"\r\n".join(lines) + b"\r\n\r\n"

    def _continue(self, body: bytes, *, more: bool) -> None:
        if not self.started or self.ended:
            raise RuntimeError("an answer's body has no place there")
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("an answer has another length than it said")
        head, self._head = self._head, b""
        if self._bodiless:
            body = b""
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        if head and len(body) > _UNREAD_BYTES:
            self._connection.write(head)
            head = b""
        self._connection.write(head + body)
        if not more:
            self.ended = True
            self._news.set()
            self._connection.on_answered(self)
