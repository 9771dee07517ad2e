"""One HTTP request as the rest of `api` sees it: who asks, what for, and the only two ways to answer.

Plain ASGI, no framework: a response is either one JSON (or text) body or a stream of server-sent events. `Call` keeps
what has been sent so far, so that an error always takes the form that is still possible.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, Protocol

from sensorium.errors import SensoriumError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
_NOSNIFF: Header = (b"x-content-type-options", b"nosniff")


class ClientGone(Exception):
    """The client closed the connection. Nothing can be answered; whoever works for it stops."""


class ErrorForm(Protocol):
    """How one API writes errors."""

    def body(self, error: SensoriumError, call: Call) -> bytes:
        """Instead of an answer."""

    def headers(self, call: Call) -> list[Header]:
        """Of every answer of the API, beside those that all answers have."""

    def event(self, error: SensoriumError, call: Call) -> bytes:
        """The end of a stream that has begun."""


class Call:
    """One request. `tenant` is set by `auth`: b"" without keys, else a digest that stands for the key. `errors` is how
    its API writes errors, if not as OpenAI's."""

    __slots__ = (
        "_is_echoed",
        "_name",
        "errors",
        "method",
        "note",
        "path",
        "receive",
        "request_id",
        "scope",
        "send",
        "started_s",
        "status",
        "streaming",
        "tenant",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, root_path: str = "") -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        self.path = _below(root_path, scope["path"])
        echoed = self._echoed_id()
        self.request_id = echoed or "req-" + secrets.token_hex(12)
        self._is_echoed = bool(echoed)
        self._name = ""
        self.tenant = b""
        self.errors: ErrorForm | None = None
        self.started_s = time.perf_counter()
        self.status = 0  # 0: nothing sent yet
        self.streaming = False
        self.note = ""  # for the log line: tokens, sizes

    @property
    def turn(self) -> bytes:
        """Who takes turns with others for decoders and threads: the key, or without keys the address it comes from
        (of IPv6 the /64 that one site has)."""
        client = self.scope.get("client")
        return self.tenant or (_site(client[0]) if client else b"")

    def headers(self, name: bytes) -> list[bytes]:
        """Every value of a header; names arrive in lower case."""
        return [value for key, value in self.scope["headers"] if key == name]

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.scope["headers"] if key == name), None)

    def add_headers(self, headers: Sequence[Header]) -> None:
        """Further headers of whatever is answered."""
        if not headers:
            return
        send = self.send

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        self.send = with_headers

    def take_name(self, name: str | None) -> None:
        """The body's `request_id`: part of the answer's id, and without the header X-Request-Id that, too."""
        self._name = name or ""
        if name and not self._is_echoed:
            self.request_id = name

    def answer_id(self, prefix: str) -> str:
        """An id for what is answered, after a prefix with its hyphen or underscore: of the name that the body gives the
        request, else a random one."""
        return prefix + (self._name or secrets.token_hex(12))

    def _echoed_id(self) -> str:
        value = self.header(b"x-request-id")
        return value.decode("ascii") if value is not None and _SANE_ID.fullmatch(value) else ""

    async def respond(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: bytes = JSON,
        cache: bytes = b"no-store",
        headers: Iterable[Header] = (),
    ) -> None:
        """The whole answer at once. A 204 or 304 has no body, and the length that it would name is another
        answer's."""
        self.status = status
        has_body = status not in (204, 304)
        length = str(len(body)).encode()
        described = ((b"content-type", content_type), (b"content-length", length)) if has_body else ()
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    *described,
                    (b"x-request-id", self.request_id.encode()),
                    _NOSNIFF,
                    (b"cache-control", cache),
                    *self._own_headers(),
                    *headers,
                ],
            }
        )
        await self.send({"type": "http.response.body", "body": body})

    async def start_events(self, content_type: bytes = EVENTS) -> None:
        """Status 200 and the headers of an event stream; only once the first event is known."""
        self.status = 200
        self.streaming = True
        await self.send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", content_type),
                    (b"x-accel-buffering", b"no"),
                    (b"x-request-id", self.request_id.encode()),
                    _NOSNIFF,
                    (b"cache-control", b"no-store"),
                    *self._own_headers(),
                ],
            }
        )

    def _own_headers(self) -> list[Header]:
        return self.errors.headers(self) if self.errors is not None else []


def _site(host: str) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.encode()
    if isinstance(address, ipaddress.IPv6Address):
        return address.packed[:8] if address.ipv4_mapped is None else address.ipv4_mapped.packed
    return address.packed


def _below(root_path: str, path: str) -> str:
    """The path below `--root-path`, whether or not the proxy has already cut it off."""
    if root_path and path.startswith(root_path + "/"):
        return path[len(root_path) :]
    return path
