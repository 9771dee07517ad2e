"""Calls the application in this process, without a port: for commands that need a server's answers, not a server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from sensorium.api.app import App
from sensorium.api.transport.server import build_app
from sensorium.cli.client import JSON_BODY, STREAMS, Answer, OnEvent, RemoteError, message_of
from sensorium.config import Limits, ServePlan
from sensorium.serving.catalog import Catalog
from sensorium.startup.catalog import Prepared

HEADERS = ((b"host", b"localhost"),)
PER_SEQUENCE = 2
"""Requests under way for each sequence that an engine computes at a time: one computes, one is made ready."""
DAYS_S = 30 * 86_400.0


def alone(plan: ServePlan) -> ServePlan:
    """Nobody else is served: no keys, no queue that is full, no deadline but one that was asked for."""
    common = plan.common
    limits = replace(common.limits, max_waiting=max(len(plan.models), 1) * 2**20)
    if limits.request_timeout_s == Limits().request_timeout_s:
        limits = replace(limits, request_timeout_s=DAYS_S)
    server = replace(common.server, api_key=(), operator_key=(), disable_log_requests=True)
    return replace(plan, common=replace(common, server=server, limits=limits))


def at_once(prepared: Prepared) -> int:
    """Requests that keep the engines of a plan full."""
    return PER_SEQUENCE * sum(source.max_num_seqs for source in prepared.sources)


async def started_app(catalog: Catalog, prepared: Prepared) -> App:
    """The application over a catalogue, once its models are loaded."""
    app = build_app(catalog, prepared.common.server, prepared.common.limits)
    await catalog.start()
    return app


class AppCaller:
    """An `Ask` of the batch."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        exchange = _Exchange(body)
        given = tuple((name.lower().encode(), value.encode()) for name, value in headers.items())
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [*HEADERS, *given, (b"content-length", b"%d" % len(body))],
        }
        await self._app(scope, exchange.receive, exchange.send)
        return Answer(exchange.status, exchange.headers, b"".join(exchange.pieces))


class AppServer:
    """The same as a `bench.Server`, below /v1."""

    def __init__(self, app: App) -> None:
        self._ask = AppCaller(app)

    async def send(self, path: str, body: bytes) -> bytes:
        answer = await self._ask("/v1" + path, JSON_BODY, body)
        if answer.status != 200:
            raise RemoteError(message_of(answer), status=answer.status)
        return answer.body

    async def stream(self, path: str, body: bytes, on_event: OnEvent) -> None:
        """Sent whole, and told as one event: nobody listens between."""
        asked = msgspec.json.decode(body)
        asked.pop("stream_options", None)
        on_event(await self.send(path, msgspec.json.encode({**asked, "stream": False})))


class _Exchange:
    """Both directions of one request. Who answers in a stream is told at once that nobody listens."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            if self.headers.get(b"content-type", b"").decode().partition(";")[0] in STREAMS:
                self._gone.set()
        elif not self._gone.is_set():
            self.pieces.append(message.get("body", b""))
