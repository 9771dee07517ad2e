"""Several models behind one address: reads which one a request names, and hands it on to a replica of that model.

Knows nothing of Ray: whoever answers is a `Backend`. A request is handed on whole, with its headers, and the replica
checks everything; here only its key, its path and its size are looked at before its body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from sensorium.api.error_forms import error_form
from sensorium.api.guards.admission import PendingBody, PendingBytes
from sensorium.api.guards.auth import Keys
from sensorium.api.guards.in_flight import InFlightRequests
from sensorium.api.routes import ROUTES, Route, Router, canonical
from sensorium.api.transport.asgi import Call, Message, Receive, Scope, Send
from sensorium.api.transport.body import declared_length, receive_body
from sensorium.api.transport.errors import errors_answered
from sensorium.api.transport.multipart import FormReader, boundary_of
from sensorium.cluster.replica import Page, accept_lifespan, replica_routes
from sensorium.config import Limits, ServerConfig
from sensorium.errors import ModelNotFoundError, UnavailableError
from sensorium.serving.entry import spellings

SESSION_HEADER = b"x-session-id"
LISTS = {"/v1/models": "data", "/api/tags": "models", "/api/ps": "models"}
"""What every model has a part of, and the field that has it."""
ASKS_ALL = frozenset({"/readyz", "/health", "/ping"})
RECORDINGS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
"""What takes as long as a recording is: only the replica knows that it progresses, and ends it if it does not."""
_CROSSING = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client", "server")
_MODEL_PATH = "/v1/models/"


class Backend(Protocol):
    """The replicas of one model."""

    def answer(self, scope: Scope, body: bytes, session: str) -> AsyncIterator[list[Message]]:
        """As `Replica.answer`, by the replica that has the session, if there is one. UnavailableError when the replica
        is lost."""


class _Named(msgspec.Struct):
    model: Any = None


_NAMED = msgspec.json.Decoder(_Named)


class Relay:
    """An ASGI application over backends by the names of their models; the first answers what names no model."""

    def __init__(self, backends: Mapping[str, Backend], server: ServerConfig, limits: Limits, page: Page) -> None:
        self._by_name = dict(backends)
        self._distinct = list(dict.fromkeys(backends.values()))
        self._keys = Keys(server.api_key, server.operator_key)
        self._root_path = server.root_path.rstrip("/")
        self._limits = limits
        self._router = Router(ROUTES)
        self._own = {route.path: route for route in replica_routes(page) if route.path in ("/livez", "/metrics")}
        self._in_flight = InFlightRequests()
        self._pending = PendingBytes(limits.max_pending_bytes, lambda reason: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await accept_lifespan(receive, send, self._close)
            return
        call = Call(scope, receive, send, root_path=self._root_path)
        async with errors_answered(call):
            call.errors = error_form(canonical(call.path))
            if call.method != "OPTIONS":
                self._keys.authenticate(call)
            await self._answer(call)

    async def _answer(self, call: Call) -> None:
        route = self._router.find(call) if call.method != "OPTIONS" else None
        if call.path in self._own:
            await self._own[call.path].endpoint(None, call)  # type: ignore[arg-type]  # neither looks at a context
        elif call.path in LISTS and call.method in ("GET", "HEAD"):
            await self._lists(call)
        elif call.path in ASKS_ALL:
            await self._ask_all(call)
        else:
            with self._pending.open() as pending:
                body = await self._body(call, pending)
                backend = self._find(_model_of(call, route, body))
                most_s = None if canonical(call.path) in RECORDINGS else self._limits.request_timeout_s
                async with self._in_flight.open(call.receive, most_s):
                    await self._relay(call, backend, bytes(body))

    async def _body(self, call: Call, pending: PendingBody) -> bytearray:
        body = bytearray()

        def take(piece: bytes) -> None:
            pending.add(len(piece))
            body.extend(piece)

        most = max(self._limits.max_body_bytes, self._limits.max_upload_bytes)
        await receive_body(call.receive, most, self._limits, take, declared_bytes=declared_length(call))
        return body

    def _find(self, name: str | None) -> Backend:
        if name is None:
            return self._distinct[0]
        for known in spellings(name):
            if known in self._by_name:
                return self._by_name[known]
        names = ", ".join(self._by_name)
        raise ModelNotFoundError(
            f"The model {name!r} does not exist; there are {names} (GET /v1/models).", param="model"
        )

    async def _relay(self, call: Call, backend: Backend, body: bytes) -> None:
        session = (call.header(SESSION_HEADER) or b"").decode("latin-1")
        async for lot in backend.answer(_crossing(call), body, session):
            for message in lot:
                if message["type"] == "http.response.start":
                    call.status = message["status"]
                    call.streaming = _is_stream(message["headers"])
                else:
                    call.streaming = call.streaming and message.get("more_body", False)  # else nothing may follow
                await call.send(message)

    async def _ask_all(self, call: Call) -> None:
        """Ready when every model is."""
        answers = await asyncio.gather(*(_whole(backend, call) for backend in self._distinct))
        status, body = max(answers, key=lambda answer: answer[0])
        if status != 200:
            raise UnavailableError("Not every model is ready.")
        await call.respond(body)

    async def _lists(self, call: Call) -> None:
        """One list of all models'; those that do not answer now are not in it."""
        field = LISTS[call.path]
        answers = await asyncio.gather(*(_whole(backend, call) for backend in self._distinct))
        pages = [msgspec.json.decode(body) for status, body in answers if status == 200]
        if not pages:
            raise UnavailableError("No model is ready.")
        rows = [row for page in pages for row in page[field]]
        merged = {**pages[0], field: rows}
        if "last_id" in merged:
            merged["last_id"] = rows[-1]["id"]
        await call.respond(msgspec.json.encode(merged))

    async def _close(self) -> None:
        await self._in_flight.drain(self._limits.drain_timeout_s)


async def _whole(backend: Backend, call: Call) -> tuple[int, bytes]:
    """The status and body of an answer that is no stream; 503 where nobody answers."""
    status, pieces = 503, []
    try:
        async for lot in backend.answer({**_crossing(call), "method": "GET"}, b"", ""):
            for message in lot:
                status = message.get("status", status)
                pieces.append(message.get("body", b""))
    except UnavailableError:
        return 503, b""
    return status, b"".join(pieces)


def _crossing(call: Call) -> dict[str, Any]:
    """What of a scope may leave this process."""
    return {name: call.scope[name] for name in _CROSSING if name in call.scope}


def _is_stream(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _model_of(call: Call, route: Route | None, body: bytearray) -> str | None:
    """The name in the path, the JSON or the form; None where there is none, or the body is for the model to refuse."""
    if call.path.startswith(_MODEL_PATH):
        return call.path.removeprefix(_MODEL_PATH)
    if route is None or not body:
        return None
    if route.file is not None:
        reader = FormReader(boundary_of(call), route.file)
        reader.feed(bytes(body))
        name: Any = next(iter(reader.finish().fields.get("model", [])), None)
    else:
        try:
            name = _NAMED.decode(body).model
        except msgspec.DecodeError:
            return None
    return name if isinstance(name, str) and name else None
