"""The ASGI application: guards, then routing; whatever goes wrong becomes an answer, and every request a log line."""

from __future__ import annotations

import logging
import time

from sensorium.api.context import Context
from sensorium.api.error_forms import error_form
from sensorium.api.guards.auth import Keys
from sensorium.api.guards.origin import OriginCheck
from sensorium.api.routes import ROUTES, Route, Router, canonical
from sensorium.api.transport.asgi import Call, Receive, Scope, Send
from sensorium.api.transport.errors import errors_answered

log = logging.getLogger("sensorium.access")
METRICS_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
_MAX_LOGGED_CHARS = 256


class App:
    """One listener's application. The order of the guards is the order in which things are refused."""

    def __init__(self, context: Context, routes: tuple[Route, ...], keys: Keys, origin: OriginCheck) -> None:
        self.context = context
        self._router = Router(routes)
        self._keys, self._origin = keys, origin
        self._log_requests = not context.server.disable_log_requests
        self._root_path = context.server.root_path.rstrip("/")

    @classmethod
    def of(cls, context: Context, routes: tuple[Route, ...] = ROUTES) -> App:
        """Everything that a server answers."""
        context.routes = routes
        return cls(context, routes, context.keys, context.origin)

    @classmethod
    def of_metrics(cls, context: Context) -> App:
        """What --metrics-port answers: figures and health, to anybody who reaches it."""
        routes = tuple(route for route in ROUTES if route.path in METRICS_PATHS)
        return cls(context, routes, Keys(()), OriginCheck(context.server.metrics_host, has_keys=False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        call = Call(scope, receive, send, root_path=self._root_path)
        route: Route | None = None
        async with errors_answered(call):
            call.errors = error_form(canonical(call.path))
            self._origin.check(call)
            call.add_headers(self._origin.headers(call))
            if (preflight := self._origin.preflight(call)) is not None:
                await call.respond(b"", status=204, headers=preflight)
            else:
                self._keys.authenticate(call)
                route = self._router.find(call)
                if route.is_operators:
                    self._keys.check_operator(call)
                if route.needs_engine:
                    self.context.catalog.check_any_ready()
                await route.endpoint(self.context, call)
        self._note(call, route)

    def _note(self, call: Call, route: Route | None) -> None:
        name = route.path if route is not None else "unknown"
        method = call.method if route is not None else "any"
        if call.path in METRICS_PATHS:
            return
        seconds = time.perf_counter() - call.started_s
        self.context.metrics.answered(method, name, call.status, seconds)
        if self._log_requests:
            log.info(
                "%s %s %d %.1f ms %s %s",
                call.method,
                printable(call.path),
                call.status,
                1000 * seconds,
                call.request_id,
                call.note,
            )


def printable(text: str) -> str:
    """Client text for one log line: control characters escaped, cut."""
    short = text[:_MAX_LOGGED_CHARS]
    if short.isascii() and short.isprintable():
        return short
    return short.encode("unicode_escape").decode()[:_MAX_LOGGED_CHARS]
