"""Runs the HTTP side of a server: listens at once, answers 503 until the models are there, drains when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass

import uvicorn

from sensorium.api.app import App
from sensorium.api.context import Context
from sensorium.api.transport import unix_socket, writing
from sensorium.api.transport.connection import Connection
from sensorium.config import Limits, ServerConfig
from sensorium.errors import StartupError
from sensorium.serving.catalog import Catalog

log = logging.getLogger("sensorium.server")
_CLOSE_S = 5.0  # for connections that do not end by themselves after their answers have
_MAX_FILES = 65536
_BACKLOG = 2048


def build_app(catalog: Catalog, server: ServerConfig, limits: Limits) -> App:
    """The ASGI application."""
    return App.of(Context(catalog, server, limits))


def listen(server: ServerConfig) -> socket.socket:
    """The listening socket, so that a taken port is found before anything is loaded."""
    if server.uds is not None:
        return unix_socket.listen(server.uds, _BACKLOG)
    return _listen(server.host, server.port)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise StartupError(f"Cannot listen on {host} port {port}: {error.strerror}.") from None
    writing.prepare(listener)
    return listener


class HttpServer:
    """uvicorn around an app, without its signal handling and its own idea of shutting down."""

    def __init__(self, app: App, limits: Limits, listener: socket.socket) -> None:
        self._app = app
        self._limits = limits
        self.listener = listener
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=Connection.limited(limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(_CLOSE_S),
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._release = unix_socket.remover(listener)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; a Unix socket's path and 0."""
        name = self.listener.getsockname()
        return (name, 0) if isinstance(name, str) else (name[0], name[1])

    async def start(self) -> None:
        self._watching = asyncio.create_task(writing.watch(lambda: self._uvicorn.connections))
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[self.listener]))
        while not self._uvicorn.started and not self._serving.done():
            await asyncio.sleep(0.001)
        if self._serving.done():
            await self._serving

    async def drain(self) -> None:
        """Requests in progress may end; new ones are answered with 503. The port stays open meanwhile."""
        await self._app.context.drain()

    async def close(self) -> None:
        """End what is left and the port last."""
        self._app.context.abort()
        self._uvicorn.stop()
        if self._serving is not None:
            await self._serving
        if self._watching is not None:
            self._watching.cancel()
        self._release()


class _Uvicorn(uvicorn.Server):
    """Without signal handlers, and asleep until it is told to stop instead of looking ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    @property
    def connections(self) -> Iterable[Connection]:
        return self.server_state.connections  # type: ignore[return-value]  # made by the class that it was given

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        await self._stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(slots=True)
class _Stop:
    """Which signals came. The first SIGTERM drains; SIGINT or a second signal ends everything now."""

    first: asyncio.Event
    now: asyncio.Event
    exit_code: int = 0

    def on_signal(self, number: int) -> None:
        if number == signal.SIGINT and not self.first.is_set():
            self.exit_code = 130
        if number == signal.SIGINT or self.first.is_set():
            self.now.set()
        self.first.set()


async def serve(
    catalog: Catalog,
    server: ServerConfig,
    limits: Limits,
    on_ready: Callable[[str], None],
    *,
    listener: socket.socket | None = None,
) -> int:
    """Serve until a signal comes; the process's exit code. `on_ready` is given the base URL once requests are answered.

    Raises StartupError if no model can be loaded. Whoever made the catalogue closes it afterwards.
    """
    _raise_file_limit()
    app = build_app(catalog, server, limits)
    http = HttpServer(app, limits, listener or listen(server))
    stop = _Stop(asyncio.Event(), asyncio.Event())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.on_signal, number)
    await http.start()
    metrics = None
    try:
        metrics = await _start_metrics(app.context)
        if await _unless(stop.first, catalog.start()):
            on_ready(url_of(http.listener, server))
            if await _unless(stop.first, catalog.wait_failed()):
                log.error("an engine was lost and could not be started again")
                return 1
        if not stop.now.is_set():
            await _unless(stop.now, http.drain())
        return stop.exit_code
    finally:
        await http.close()
        if metrics is not None:
            await metrics.close()


async def _start_metrics(context: Context) -> HttpServer | None:
    """What listens on --metrics-port; it answers while requests are drained, too."""
    host, port = context.server.metrics_host, context.server.metrics_port
    if port is None:
        return None
    metrics = HttpServer(App.of_metrics(context), context.limits, _listen(host, port))
    await metrics.start()
    log.info("metrics and health without a key at %s", _url(host, metrics.listener))
    return metrics


async def _unless(event: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Run `work` until it is done (true) or the event comes first (false). Its errors are raised."""
    task, waiter = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
        waiter.cancel()


def url_of(listener: socket.socket, server: ServerConfig) -> str:
    """Its address as clients of this machine write it; unix:PATH of a Unix socket."""
    if server.uds is not None:
        return f"unix:{server.uds}"
    return _url(server.host, listener)


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104 - names what is bound, binds nothing
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _raise_file_limit() -> None:
    """Every connection is a file; the usual soft limit of 1024 is reached by idle clients alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
