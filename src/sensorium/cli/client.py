"""The other end of the API: a small client of OpenAI-compatible servers, for `bench` and `chat`.

Not a general HTTP client: no redirects, proxies or retries. Server-sent events are cut apart as the bytes arrive and
handed to a plain callback, so that a measuring client costs microseconds per token.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from sensorium.errors import SensoriumError

OnEvent = Callable[[bytes], None]
JSON_BODY: Mapping[str, str] = {"Content-Type": "application/json"}


class RemoteError(SensoriumError):
    """The other server refused, broke off or could not be reached."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.remote_status = status


class UnreachableError(RemoteError):
    """There is nobody at that address."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint said, whatever the status."""

    status: int
    headers: dict[bytes, bytes]  # names in lower case
    body: bytes

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()

    @property
    def is_stream(self) -> bool:
        return self.content_type in STREAMS


STREAMS = ("text/event-stream", "application/x-ndjson")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is and what goes into every request's head."""

    host: str
    port: int
    tls: bool
    prefix: str  # path of the API's root, such as /v1
    api_key: str | None

    @classmethod
    def parse(cls, base_url: str, api_key: str | None = None) -> Endpoint:
        """`http://host:8000`, with or without `/v1` at its end."""
        parts = urlsplit(base_url if "://" in base_url else "http://" + base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RemoteError(f"{base_url!r} is not an http(s) address of a server, such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        prefix = path if path.endswith("/v1") else path + "/v1"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, prefix, api_key)

    def head(self, method: str, path: str, size_bytes: int, more: Mapping[str, str] = JSON_BODY) -> bytes:
        """`path` from the host's root; `more` are further headers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            f"Content-Length: {size_bytes}",
            "Accept: */*",
            "User-Agent: sensorium",
            *(f"{name}: {value}" for name, value in more.items()),
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reusable = False
        self._headers: dict[bytes, bytes] = {}
        self._done: asyncio.Future[Answer] | None = None
        self._on_event: OnEvent | None = None
        self._is_stream = False
        self._body = bytearray()
        self._parser: Any = None

    async def exchange(self, request: bytes, on_event: OnEvent | None) -> Answer:
        """Send a request; events go to `on_event`, any other body is the answer's."""
        if self.transport is None:
            raise RemoteError("not connected")
        self._done = asyncio.get_running_loop().create_future()
        self._on_event, self._is_stream, self.reusable = on_event, False, False
        self._body.clear()
        self._headers = {}
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(request)
        return await self._done

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream protocol always gets a Transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # what `on_event` raised is the caller's
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(RemoteError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable, self.transport = False, None
        self._fail(RemoteError("the connection closed before the answer was complete"))

    # httptools' side

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value
        if name.lower() == b"content-type" and value.startswith(b"text/event-stream"):
            self._is_stream = self._on_event is not None

    def on_body(self, chunk: bytes) -> None:
        self._body += chunk
        if self._is_stream:
            self._cut_events()

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(Answer(self._parser.get_status_code(), self._headers, bytes(self._body)))

    def _cut_events(self) -> None:
        if b"\r" in self._body:
            self._body = self._body.replace(b"\r\n", b"\n")
        *blocks, rest = self._body.split(b"\n\n")
        for block in blocks:
            data = b"\n".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
            if data and data != b"[DONE]" and self._on_event is not None:
                self._on_event(bytes(data))
        self._body = bytearray(rest)

    def _fail(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.close()


class Remote:
    """A pool of connections to one server."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 600.0) -> None:
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Remote:
        return self

    async def __aexit__(self, *error: object) -> None:
        for connection in self._idle:
            connection.close()

    async def get(self, path: str) -> Any:
        """`path` is below the API's root, as of all methods but `ask`."""
        return msgspec.json.decode(await self._send("GET", path, b"", None))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        return msgspec.json.decode(await self._send("POST", path, msgspec.json.encode(body), None))

    async def send(self, path: str, body: bytes) -> bytes:
        """POST a body that is JSON already; the whole answer."""
        return await self._send("POST", path, body, None)

    async def stream(self, path: str, body: bytes, on_event: OnEvent) -> None:
        """POST `body`; `on_event` gets the data of every event but the closing [DONE], as it arrives."""
        await self._send("POST", path, body, on_event)

    async def models(self) -> list[str]:
        answer = await self.get("/models")
        return [row["id"] for row in answer["data"]]

    async def ask(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """POST to a path from the server's own root; the answer as it comes. RemoteError if there is none."""
        root = self.endpoint.prefix.removesuffix("/v1")
        return await self._exchange(self.endpoint.head("POST", root + path, len(body), headers) + body, None)

    async def _send(self, method: str, path: str, body: bytes, on_event: OnEvent | None) -> bytes:
        head = self.endpoint.head(method, self.endpoint.prefix + path, len(body))
        answer = await self._exchange(head + body, on_event)
        if answer.status != 200:
            raise RemoteError(message_of(answer), status=answer.status)
        return answer.body

    async def _exchange(self, request: bytes, on_event: OnEvent | None) -> Answer:
        connection = await self._connection()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await connection.exchange(request, on_event)
        except TimeoutError:
            raise RemoteError(f"no complete answer within {self._timeout_s:g} s") from None
        finally:
            if connection.reusable and connection.transport is not None:
                self._idle.append(connection)
            else:
                connection.close()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        tls = ssl.create_default_context() if self.endpoint.tls else None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, self.endpoint.host, self.endpoint.port, ssl=tls
            )
        except OSError as error:
            where = f"{self.endpoint.host}:{self.endpoint.port}"
            raise UnreachableError(f"cannot connect to {where}: {error.strerror or error}") from None
        return connection


def message_of(answer: Answer) -> str:
    """What an answer that is an error says, in one line."""
    try:
        detail = msgspec.json.decode(answer.body)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        detail = answer.body[:200].decode("utf-8", "replace")
    return f"{answer.status}: {detail}"
