"""One replica: the server's application in a process that somebody else started and ends, and that has no port of its
own. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from sensorium.api.app import App
from sensorium.api.context import Context
from sensorium.api.metrics import CONTENT_TYPE
from sensorium.api.routes import ROUTES, Route
from sensorium.api.transport.asgi import Call, Message, Receive, Scope, Send
from sensorium.cluster.gathered import Gathered
from sensorium.config import ServePlan
from sensorium.errors import ForbiddenError, UnavailableError
from sensorium.startup.catalog import catalog_of, prepare

Page = Callable[[], Awaitable[bytes]]
QUEUED_MESSAGES = 256  # of an answer, until whoever reads it takes them
log = logging.getLogger("sensorium.cluster")


class Replica:
    """An ASGI application. `start` it before the first request."""

    def __init__(self, plan: ServePlan, metrics_page: Page) -> None:
        """`metrics_page` is what /metrics shows: the figures of all replicas."""
        self._plan = plan
        self._metrics_page = metrics_page
        self._stack = AsyncExitStack()
        self._app: App | None = None

    @property
    def app(self) -> App:
        if self._app is None:
            raise UnavailableError("The model is still loading.")
        return self._app

    @property
    def context(self) -> Context:
        return self.app.context

    async def start(self) -> None:
        """Until requests are answered. StartupError says why they cannot be."""
        prepared = await asyncio.to_thread(prepare, self._plan, _show)
        try:
            catalog = await self._stack.enter_async_context(
                catalog_of(prepared, lambda name, phase, fraction: _show(phase, fraction))
            )
            common = prepared.common
            context = Context(catalog, common.server, common.limits)
            await catalog.start()
        except BaseException:
            await self._stack.aclose()
            raise
        self._app = App.of(context, replica_routes(self._metrics_page))

    def check(self) -> None:
        """UnavailableError once the engine is lost for good: the replica is of no use then."""
        for entry in self.context.catalog.entries:
            if entry.state == "failed":
                raise UnavailableError(entry.reason)

    async def close(self) -> None:
        """Let requests end, as many as --drain-timeout-s allows, then everything else."""
        if self._app is not None:
            await self._app.context.drain()
        await self._stack.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await accept_lifespan(receive, send, self.close)
            return
        gathered = Gathered(send)
        try:
            await self.app(scope, receive, gathered)
        finally:
            gathered.close()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """One request of which everything is there, answered in lots of ASGI messages. It ends when its reader does."""
        lots = _Lots()
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            if (message := next(given, None)) is not None:
                return message
            await asyncio.Event().wait()  # whoever reads the answer cancels
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.app(scope, receive, lots.put))
        task.add_done_callback(lambda done: lots.end())
        try:
            async for lot in lots.read():
                yield lot
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Lots:
    """Messages from a writer to a reader; the writer waits while the reader is far behind."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()
        self._has_ended = False

    async def put(self, message: Message) -> None:
        self._messages.append(message)
        self._arrived.set()
        while len(self._messages) >= QUEUED_MESSAGES:
            self._taken.clear()
            await self._taken.wait()

    def end(self) -> None:
        self._has_ended = True
        self._arrived.set()

    async def read(self) -> AsyncIterator[list[Message]]:
        """What has come since the last lot, as soon as there is something."""
        while self._messages or not self._has_ended:
            await self._arrived.wait()
            self._arrived.clear()
            lot, self._messages = self._messages, []
            self._taken.set()
            if lot:
                yield lot


def replica_routes(metrics_page: Page) -> tuple[Route, ...]:
    """A server's routes, but for those that would tell of this replica alone, or change it alone."""

    async def metrics(context: Context, call: Call) -> None:
        await call.respond(await metrics_page(), content_type=CONTENT_TYPE)

    changed = {"/metrics": metrics}
    return tuple(
        replace(route, endpoint=_change_of_one if route.is_operators else changed.get(route.path, route.endpoint))
        for route in ROUTES
    )


async def _change_of_one(context: Context, call: Call) -> None:
    raise ForbiddenError(
        "Replicas are all alike, and this would change one of them: deploy again with other models or --lora.",
        code="not_with_replicas",
    )


async def accept_lifespan(receive: Receive, send: Send, close: Callable[[], Awaitable[None]]) -> None:
    """ASGI's start and end of an application that has been started already."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await close()
    await send({"type": "lifespan.shutdown.complete"})


def _show(phase: str, fraction: float) -> None:
    if not fraction:
        log.info("%s", phase)
