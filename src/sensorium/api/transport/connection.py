"""One client connection: bytes to requests under limits (size and number of headers, length of the request line, time
until headers are complete, number of chunks), and answers in the order of their requests.

What cannot be answered any more ends the connection; what is refused is refused after the answers before it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from sensorium.api.transport.asgi import Scope
from sensorium.api.transport.errors import HeadersTooLargeError, UrlTooLongError, error_body
from sensorium.api.transport.exchange import CONTINUE, Exchange, status_line
from sensorium.api.transport.writing import OutputProgress
from sensorium.config import Limits
from sensorium.errors import BodyTooLargeError, RequestError, RequestTimeoutError, SensoriumError

log = logging.getLogger("sensorium.api")
_MAX_PIPELINED = 32
_PROBE_S = 1.5
_LINGER_S = 1.0
"""How long an upload that was answered early goes on being read: closing at once would lose the answer on its way."""


class _Refused(Exception):
    """Ends the parser's work on what has come."""


class Connection(asyncio.Protocol):
    """`limited(limits)` makes the class that uvicorn is given."""

    limits: Limits

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._app = config.loaded_app
        self._keep_alive_s = config.timeout_keep_alive
        self._server = server_state
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # what follows is looked at, not believed
        self.transport: asyncio.Transport
        self.output: OutputProgress
        self._exchanges: deque[Exchange] = deque()  # not answered yet, in order; the first is being worked on
        self._current: Exchange | None = None  # whose body is being read
        self._deaf = False  # nothing that still comes is a request
        self._refusal: SensoriumError | None = None  # to be written when everything before it is answered
        self._in_head = True
        self._begun = False  # has the head that is waited for begun to come?
        self._quiet_bytes = 0  # received since the parser last came forward
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._url_bytes = self._fields_bytes = self._num_headers = self._chunks = 0
        self._raw_body_bytes = 0  # of a body that the parser does not read, still to come
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None  # an answer is out, its request's body is not all here
        self._writable = asyncio.Event()
        self._writable.set()
        self._reads = True
        self._eof_s: float | None = None  # when the client has said its last

    @classmethod
    def limited(cls, limits: Limits) -> type[Connection]:
        return type("LimitedConnection", (cls,), {"limits": limits})

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's
        self.output = OutputProgress(self.transport, self._loop.time())
        self._server.connections.add(self)  # type: ignore[arg-type]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._deaf = True
        for timer in (self._head_timer, self._idle_timer, self._rest_timer):
            if timer is not None:
                timer.cancel()
        for exchange in self._exchanges:
            exchange.abandon()
        self._exchanges.clear()
        self._writable.set()

    def eof_received(self) -> bool:
        """The client sends nothing more. It may still read: what it asked for is answered, then the connection ends."""
        self._deaf = True
        self._cancel_head_timer()
        broken, self._current = self._current, None
        if broken is not None:
            self._drop(broken)
        if not self._exchanges:
            return False
        self._eof_s = self._loop.time()
        self._exchanges[-1].keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        if self._raw_body_bytes:
            self._take_raw_body(data)
            return
        self._cancel_idle_timer()
        if self._in_head and self._head_timer is None:
            self._expect_head()
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._ignore_upgrade(data[offer.args[0] :])
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, _Refused):
                raise
        except httptools.HttpParserError:
            self._refuse(RequestError("This is not a valid HTTP request.", code="invalid_http"))
        # Heads, trailers and chunk extensions of any length would pile up in the parser.
        if self._quiet_bytes > self.limits.max_header_bytes + self.limits.max_request_line_bytes:
            self._refuse(self._head_error())

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def shutdown(self) -> None:
        """The server ends: no request after those that are here."""
        if self._exchanges:
            self._exchanges[-1].keep_alive = False
        else:
            self.transport.close()

    # The parser's side

    def on_message_begin(self) -> None:
        if self._exchanges and not self._exchanges[-1].keep_alive:  # the last one said that nothing follows
            self._deaf = True
            raise _Refused
        self._cancel_idle_timer()
        self._in_head = self._begun = True
        self._url, self._headers = b"", []
        self._quiet_bytes = self._url_bytes = self._fields_bytes = self._num_headers = self._chunks = 0
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._url_bytes += len(url)
        if self._url_bytes > self.limits.max_request_line_bytes:
            self._stop(self._head_error())
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: what comes after the body says nothing about the request
        self._fields_bytes += len(name) + len(value) + 4
        self._num_headers += 1
        if self._fields_bytes > self.limits.max_header_bytes or self._num_headers > self.limits.max_headers:
            self._stop(self._head_error())
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._quiet_bytes = 0
        self._head_done()
        if len(self._exchanges) > _MAX_PIPELINED:
            self._stop(RequestError("Too many requests were sent without waiting for answers.", code="invalid_http"))
        if not self._url.startswith(b"/"):
            self._stop(RequestError("The request's target must be a path.", code="invalid_http"))
        version = self._parser.get_http_version()
        exchange = Exchange(
            self,
            self._scope(version),
            keep_alive=version != "1.0" and self._parser.should_keep_alive(),
            expects_continue=any(
                name == b"expect" and value.lower() == b"100-continue" for name, value in self._headers
            ),
        )
        self._current = exchange
        self._exchanges.append(exchange)
        if len(self._exchanges) == 1:
            self._start(exchange)

    def on_chunk_header(self) -> None:
        self._quiet_bytes = 0
        self._chunks += 1
        if self._chunks > self.limits.max_body_messages:
            self._stop(BodyTooLargeError("The body came in too many small pieces; send larger ones."))

    def on_body(self, body: bytes) -> None:
        self._quiet_bytes = 0
        exchange = self._current
        if exchange is not None and not exchange.ended:
            exchange.feed(body)
            if exchange.is_full and self._reads:
                self._reads = False
                self.transport.pause_reading()

    def on_message_complete(self) -> None:
        self._quiet_bytes = 0
        self._in_head = True
        exchange, self._current = self._current, None
        if exchange is None:
            return
        exchange.complete()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
            self._end_or_wait(exchange)

    def _scope(self, version: str) -> Scope:
        path, _, query = self._url.partition(b"#")[0].partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": self._parser.get_method().decode("latin-1"),
            "scheme": "http",
            "root_path": "",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "headers": self._headers,
        }

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer in HTTP/1.1 whoever offers another protocol, as Java's client does with HTTP/2 on every first request.

        The parser takes what follows the head for the other protocol, so the body is read here.
        """
        if self._deaf or not self._exchanges:
            return
        exchange = self._exchanges[-1]
        exchange.keep_alive = False
        lengths = [value for name, value in exchange.scope["headers"] if name == b"content-length"]
        if lengths and int(lengths[0]) > 0:
            exchange.receives = True
            self._current = exchange
            self._raw_body_bytes = int(lengths[0])
            self._take_raw_body(rest)
        elif any(name == b"transfer-encoding" for name, _ in exchange.scope["headers"]):
            self._current = exchange
            self._refuse(RequestError("An upgrade cannot be offered with a chunked body.", code="invalid_http"))
        else:
            self._deaf = True

    def _take_raw_body(self, data: bytes) -> None:
        piece = data[: self._raw_body_bytes]
        self._raw_body_bytes -= len(piece)
        if piece:
            self.on_body(piece)
        if not self._raw_body_bytes:
            self._deaf = True  # the parser is of no more use
            self.on_message_complete()

    # The exchanges' side

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.output.written += len(data)
            self.transport.write(data)

    async def until_writable(self) -> None:
        await self._writable.wait()

    def resume_reading(self) -> None:
        if not self._reads and not self.transport.is_closing():
            self._reads = True
            self.transport.resume_reading()

    def on_answered(self, exchange: Exchange) -> None:
        """An answer is out, at least as far as the transport. The next request has its turn, or the connection ends."""
        if not self._exchanges or self._exchanges[0] is not exchange:
            return
        self._exchanges.popleft()
        self.resume_reading()
        if exchange is self._current and not self._deaf and not self.transport.is_closing():
            self._rest_timer = self._loop.call_later(_LINGER_S, self._linger)
        else:
            self._end_or_wait(exchange)

    def on_exchange_left(self, exchange: Exchange) -> None:
        """Nobody works on it any more. Without an answer there is none to come."""
        if exchange.ended or self.transport.is_closing():
            return
        if exchange.gone and not exchange.started:
            self._drop(exchange)
            self._end_or_wait(exchange)
        else:
            self.transport.close()

    # The watch's side

    def look(self, now_s: float) -> None:
        """End the connection if its client reads nothing, or has left without the event loop's noticing.

        A client that has gone looks like one that has only stopped sending until it is written to. So after a while
        it is told, as HTTP/1.1 allows, that its request is worked on.
        """
        if self.output.stalled_s(now_s) > self.limits.write_timeout_s:
            log.info("a client that read nothing for %g s was disconnected", self.limits.write_timeout_s)
            self.transport.abort()
        elif self._exchanges and self._eof_s is not None:
            first = self._exchanges[0]
            if self.output.is_broken():
                self.transport.abort()
            elif now_s - self._eof_s > _PROBE_S and not (first.started or first.is_old):
                self._eof_s = math.inf  # once
                self.write(CONTINUE)

    # Own

    def _start(self, exchange: Exchange) -> None:
        task = self._loop.create_task(exchange.run(self._app))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    def _drop(self, exchange: Exchange) -> None:
        """It cannot be answered: its request is broken."""
        exchange.abandon()
        if exchange in self._exchanges and (exchange is not self._exchanges[0] or exchange.started):
            self._exchanges.remove(exchange)

    def _end_or_wait(self, done: Exchange) -> None:
        """After an exchange: the next one, the refusal that was put off, the end, or a while for another request."""
        if self.transport.is_closing():
            return
        if self._exchanges and self._exchanges[0] is done:
            self._exchanges.popleft()
        if self._exchanges:
            self._start(self._exchanges[0])
        elif self._refusal is not None:
            self._write_refusal(self._refusal)
        elif not done.keep_alive or self._deaf:
            self.transport.close()
        elif self._idle_timer is None:
            self._idle_timer = self._loop.call_later(self._keep_alive_s, self.transport.close)

    def _linger(self) -> None:
        """The rest of an unwanted body did not come in a moment; it is thrown away for another one, then the connection
        ends. Ending it at once would fail the client's next request, since the answer had not said so."""
        self._rest_timer = None
        self._deaf = True
        self._end_softly()

    def _end_softly(self) -> None:
        if not self.transport.is_closing():
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._loop.call_later(_LINGER_S, self.transport.close)

    def _expect_head(self) -> None:
        self._head_timer = self._loop.call_later(self.limits.header_timeout_s, self._head_late)

    def _head_done(self) -> None:
        self._in_head = self._begun = False
        self._cancel_head_timer()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self._begun:
            self._refuse(RequestTimeoutError("The request's headers were not complete in time."))
        elif not self._exchanges:
            self.transport.close()

    def _head_error(self) -> SensoriumError:
        if self._url_bytes > self.limits.max_request_line_bytes:
            return UrlTooLongError(f"The request line is longer than {self.limits.max_request_line_bytes} bytes.")
        return HeadersTooLargeError(
            f"The headers are larger than {self.limits.max_header_bytes} bytes or more than {self.limits.max_headers}."
        )

    def _stop(self, error: SensoriumError) -> None:
        """Refuse from within the parser, which then looks at nothing more."""
        self._refuse(error)
        raise _Refused

    def _refuse(self, error: SensoriumError) -> None:
        """Read no more. The error answers the request that is being read, when those before it are answered."""
        if self._deaf:
            return
        self._deaf = True
        self._head_done()
        self._cancel_idle_timer()
        broken, self._current = self._current, None
        if broken is not None and broken.started:  # it has another answer already, or the beginning of one
            self._end_softly()
            broken.abandon()
            return
        self._refusal = error
        if broken is not None:
            self._drop(broken)
        if not self._exchanges:
            self._write_refusal(error)

    def _write_refusal(self, error: SensoriumError) -> None:
        """Answer at the lowest level and end the connection."""
        body = error_body(error)
        self.write(
            b"".join(
                (
                    status_line(error.status),
                    b"content-type: application/json\r\ncontent-length: ",
                    str(len(body)).encode(),
                    b"\r\nconnection: close\r\n\r\n",
                    body,
                )
            )
        )
        self._end_softly()
