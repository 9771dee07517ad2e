"""uvicorn's connection with the limits that its parser lacks: size and number of headers, length of the request line,
time until headers are complete, number of chunks, and an end to uploads that nobody reads any more.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sensorium.api.errors import HeadersTooLargeError, UrlTooLongError, error_body
from sensorium.config import Limits
from sensorium.errors import BodyTooLargeError, RequestError, RequestTimeoutError, SensoriumError

_MAX_PIPELINED = 32
_LINGER_S = 1.0
"""How long an upload that was answered early goes on being read: closing at once would lose the answer on its way."""


class Connection(HttpToolsProtocol):
    """One client connection. `limited(limits)` makes the class that uvicorn is given."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._begun = False  # has the head that is waited for begun to come?
        self._quiet_bytes = 0  # received since the parser last came forward
        self._url_bytes = 0
        self._fields_bytes = 0
        self._chunks = 0
        self._refused = False
        self._raw_body_bytes = 0  # of a body that the parser does not read, still to come
        self._head_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None  # an answer is out, its request's body is not all here

    @classmethod
    def limited(cls, limits: Limits) -> type[Connection]:
        return type("LimitedConnection", (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        self._rest_done()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._raw_body_bytes:
            self._take_raw_body(data)
            return
        self._unset_keepalive_if_required()
        if self._in_head and self._head_timer is None:
            self._expect_head()
        self._quiet_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade(data[offer.args[0]:])
        except httptools.HttpParserError:
            self._refuse(RequestError("This is not a valid HTTP request.", code="invalid_http"))
        # Heads, trailers and chunk extensions of any length would pile up in the parser.
        if self._quiet_bytes > self.limits.max_header_bytes + self.limits.max_request_line_bytes:
            self._refuse(self._head_error())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head = self._begun = True
        self._quiet_bytes = self._url_bytes = self._fields_bytes = self._chunks = 0
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._url_bytes += len(url)
        if self._url_bytes <= self.limits.max_request_line_bytes:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: what comes after the body says nothing about the request
        self._fields_bytes += len(name) + len(value) + 4
        if self._fields_bytes <= self.limits.max_header_bytes and len(self.headers) <= self.limits.max_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._quiet_bytes = 0
        self._head_done()
        if self._refused:
            return
        limits = self.limits
        too_large = (self._url_bytes > limits.max_request_line_bytes or self._fields_bytes > limits.max_header_bytes
                     or len(self.headers) > limits.max_headers)
        if too_large:
            self._refuse(self._head_error())
        elif len(self.pipeline) >= _MAX_PIPELINED:
            self._refuse(RequestError("Too many requests were sent without waiting for answers.", code="invalid_http"))
        elif not self.url.startswith(b"/"):
            self._refuse(RequestError("The request's target must be a path.", code="invalid_http"))
        else:
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._quiet_bytes = 0
        self._chunks += 1
        if self._chunks > self.limits.max_body_messages and not self._refused:
            self._refuse(BodyTooLargeError("The body came in too many small pieces; send larger ones."))

    def on_body(self, body: bytes) -> None:
        self._quiet_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._quiet_bytes = 0
        self._in_head = True
        if self._rest_done():
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive,
                                                                self.timeout_keep_alive_handler)
        elif not self._refused:
            super().on_message_complete()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer in HTTP/1.1 whoever offers another protocol, as Java's client does with HTTP/2 on every first request.

        The parser takes what follows the head for the other protocol, so the body is read here.
        """
        if self._refused:
            return
        self.cycle.keep_alive = False
        lengths = [value for name, value in self.headers if name == b"content-length"]
        if lengths and int(lengths[0]) > 0:
            self.cycle.more_body = True
            self._raw_body_bytes = int(lengths[0])
            self._take_raw_body(rest)
        elif any(name == b"transfer-encoding" for name, _ in self.headers):
            self._refuse(RequestError("An upgrade cannot be offered with a chunked body.", code="invalid_http"))

    def _take_raw_body(self, data: bytes) -> None:
        piece = data[:self._raw_body_bytes]
        self._raw_body_bytes -= len(piece)
        if piece:
            self.on_body(piece)
        if not self._raw_body_bytes:
            self.on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is not None and self.cycle.response_complete and self.cycle.more_body \
                and not self.transport.is_closing():
            self._rest_timer = self.loop.call_later(_LINGER_S, self._linger)

    def _rest_done(self) -> bool:
        """Whether the rest of a body that nobody reads was waited for."""
        if self._rest_timer is None:
            return False
        self._rest_timer.cancel()
        self._rest_timer = None
        return True

    def _linger(self) -> None:
        """The rest of an unwanted body did not come in a moment; it is thrown away for another one, then the connection
        ends. Ending it at once would fail the client's next request, since the answer had not said so."""
        self._rest_timer = None
        self._refused = True
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.transport.close)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self._head_late)

    def _head_done(self) -> None:
        self._in_head = self._begun = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        if self._begun:
            self._refuse(RequestTimeoutError("The request's headers were not complete in time."))
        else:
            self.transport.close()

    def _head_error(self) -> SensoriumError:
        if self._url_bytes > self.limits.max_request_line_bytes:
            return UrlTooLongError(f"The request line is longer than {self.limits.max_request_line_bytes} bytes.")
        return HeadersTooLargeError(f"The headers are larger than {self.limits.max_header_bytes} bytes or more than "
                                    f"{self.limits.max_headers}.")

    def _refuse(self, error: SensoriumError) -> None:
        """Answer at the lowest level, if no answer has begun, and end the connection."""
        if self._refused:
            return
        self._refused = True
        self._head_done()
        cycle = self.cycle
        if not self.transport.is_closing() and (cycle is None or cycle.response_complete or not cycle.response_started):
            body = error_body(error)
            self.transport.write(b"".join((
                STATUS_LINE[error.status], b"content-type: application/json\r\ncontent-length: ",
                str(len(body)).encode(), b"\r\nconnection: close\r\n\r\n", body)))
            if self.transport.can_write_eof():
                self.transport.write_eof()
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.loop.call_later(_LINGER_S, self.transport.close)
