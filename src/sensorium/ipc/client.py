"""The HTTP process's half of the engine: starts the child, sends requests, hands out their outputs, watches over it.

Torch-free. One socket, one reader callback: a token costs a dictionary look-up and an append, no task. When the child
is lost its requests end with `UnavailableError` and another child is started, a few times.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Coroutine
from time import monotonic
from types import TracebackType
from typing import Literal

from sensorium.config import EngineConfig
from sensorium.errors import StartupError, UnavailableError
from sensorium.ipc import ahead, messages
from sensorium.ipc.liveness import BEAT_S, Silence
from sensorium.ipc.messages import Kind, ProtocolError
from sensorium.ipc.transfers import Outgoing
from sensorium.system.nursery import ForkedProcess, Nursery
from sensorium.types import EngineOutput, EngineReady, EngineRequest, EngineStats, Vocabulary

State = Literal["loading", "ready", "restarting", "failed", "closed"]
Progress = Callable[[str, float], None]
Child = subprocess.Popen[bytes] | ForkedProcess

MAX_RESTARTS = 3
RESTART_WINDOW_S = 300.0
SHUTDOWN_GRACE_S = 5.0  # for a child that was told to stop, before it is killed
BUFFER_BYTES = 1024 * 1024  # in the transport, before writing pauses

logger = logging.getLogger(__name__)


class OutputStream:
    """Outputs of one request, in order. Tokens that came since the last look are one output.

    Ends after an output with a finish reason; raises `UnavailableError` if the engine is lost. Leaving `async with`
    early aborts.
    """

    __slots__ = ("_client", "_done", "_error", "_items", "_waiter", "id")

    def __init__(self, client: EngineClient, request_id: int) -> None:
        self.id = request_id
        self._client = client
        self._items: deque[int | EngineOutput] = deque()  # plain tokens as they are
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._done = False  # nothing more will be put in

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> EngineOutput:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._done:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._take()

    def _take(self) -> EngineOutput:
        items = self._items
        first = items.popleft()
        if not isinstance(first, int):
            return first
        if not items or not isinstance(items[0], int):
            return EngineOutput(self.id, (first,))
        tokens = [first]
        while items and isinstance(items[0], int):
            tokens.append(items[0])
            items.popleft()
        return EngineOutput(self.id, tuple(tokens))

    async def __aenter__(self) -> OutputStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Stop the request; whoever waits gets one last output that says so. Nothing happens if it has ended."""
        if not self._done:
            self._client._abort(self.id)
            self._put(EngineOutput(self.id, finish_reason="abort"))
            self._done = True

    # The client's side

    def _put(self, item: int | EngineOutput) -> None:
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._done = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class _Link(asyncio.Protocol):
    """One child's connection. Writes no more at a time than the transport takes."""

    def __init__(self, owner: EngineClient) -> None:
        self._owner = owner
        self._reader = messages.FrameReader()
        self._transport: asyncio.Transport | None = None
        self._pending = Outgoing()
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream socket gives a Transport
        self._transport.set_write_buffer_limits(high=BUFFER_BYTES)  # type: ignore[union-attr]
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._owner._heard()
        try:
            for kind, payload in self._reader.feed(data):
                self._owner._receive(kind, payload)
        except ProtocolError as error:
            logger.error("the engine process sent what it must not: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pending.clear()
        self._owner._lost(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def write(self, frame: messages.Buffer) -> None:
        if not self._pending and not self._paused and self._transport is not None:
            self._transport.write(frame)
            return
        self._pending.add(frame)
        self._flush()

    def request(self, request: EngineRequest, pieces: list[messages.Buffer]) -> None:
        if len(pieces) == 1:
            self.write(pieces[0])
            return
        self._pending.add_request(request.id, pieces, request.turn)
        self._flush()

    def abort(self, request_id: int) -> None:
        if self._pending.take_back(request_id):
            self._flush()
        else:
            self.write(messages.encode_abort([request_id]))

    def _flush(self) -> None:
        while self._pending and not self._paused and self._transport is not None:
            for piece in self._pending.next():
                self._transport.write(piece)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class EngineClient:
    """One engine process. Everything but `start` belongs to one event loop."""

    def __init__(
        self, config: EngineConfig, *, on_progress: Progress | None = None, nursery: Nursery | None = None
    ) -> None:
        """With a `nursery` the child shares what it imports with other engines."""
        self._nursery = nursery
        self.config = config
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self.state: State = "loading"
        self.vocabulary: Vocabulary | None = None  # set before the first request with a grammar
        self._on_progress = on_progress
        self._process: Child | None = None
        self._socket: socket.socket | None = None  # until an event loop takes it
        self._link: _Link | None = None
        self._streams: dict[int, OutputStream] = {}
        self._ids = itertools.count(1)
        self._adapters: dict[int, str] = {}  # folders of those that are loaded, by number
        self._awaited: dict[int, asyncio.Future[tuple[str, int]]] = {}  # adapters that are being loaded
        self._fatal = ""
        self._lost_rank = ""  # and why, of the child that is ending
        self._became_ready: asyncio.Event | None = None
        self._restarts: deque[float] = deque()
        self._silence = Silence(config.hang_after_s)
        self._hung = False  # the child that is being replaced
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def next_id(self) -> int:
        return next(self._ids)

    def start(self) -> None:
        """Start the child at once; needs no event loop and imports nothing heavy."""
        if self._nursery is None:
            self._process, ours = ahead.take()
        else:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = self._nursery.spawn(theirs)
        ours.sendall(messages.encode_config(self.config))  # fits into the socket's buffer
        ours.setblocking(False)
        self._socket = ours
        if self.state == "closed":  # meanwhile
            self._process.kill()
            ours.close()

    async def wait_ready(self) -> EngineReady:
        """Until the model is loaded. StartupError says in one line why it could not be."""
        await self._attach()
        if self._became_ready is not None:
            await self._became_ready.wait()
        if self.ready is None or self.state not in ("ready", "restarting"):
            raise StartupError(self._fatal or await self._exit_reason())
        return self.ready

    async def _exit_reason(self) -> str:
        """How the child ended, for a child that could not say it."""
        await self._reap()
        code = None if self._process is None else self._process.returncode
        if code == -signal.SIGKILL:
            return "the engine process was killed while it was loading (out of memory?)"
        return f"the engine process ended while it was loading (exit code {code})"

    async def load_adapter(self, number: int, folder: str) -> int:
        """Until requests may name it: the bytes of memory that it takes. StartupError says in one line why it cannot
        be loaded; UnavailableError when there is no engine."""
        if self.state != "ready" or self._link is None:
            raise UnavailableError(_UNAVAILABLE[self.state])
        answer: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
        self._awaited[number] = answer
        self._link.write(messages.encode_load_adapter(number, folder))
        try:
            error, nbytes = await answer
            if error:
                raise StartupError(error)
        except asyncio.CancelledError:  # nobody will ask for it, and nobody would unload it
            if self._link is not None:
                self._link.write(messages.encode_unload_adapter(number))
            raise
        finally:
            del self._awaited[number]
        self._adapters[number] = folder
        return nbytes

    def unload_adapter(self, number: int) -> None:
        """Sequences that have it keep it."""
        if self._adapters.pop(number, None) is not None and self._link is not None:
            self._link.write(messages.encode_unload_adapter(number))

    def submit(self, request: EngineRequest) -> OutputStream:
        """Send a request. UnavailableError when there is no engine to compute it."""
        if self.state != "ready" or self._link is None:
            raise UnavailableError(_UNAVAILABLE[self.state])
        stream = OutputStream(self, request.id)
        pieces = messages.encode_request(request)
        self._streams[request.id] = stream
        self._link.request(request, pieces)
        return stream

    async def aclose(self) -> None:
        """End all streams and the child; returns when it is gone."""
        if self.state == "closed":
            return
        self.state = "closed"
        self._fail_all(UnavailableError("The server is shutting down."))
        self._signal_ready()
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            self._link.write(messages.frame(Kind.SHUTDOWN))
        if self._socket is not None:
            self._socket.close()
        process = self._process
        if process is not None:
            await asyncio.get_running_loop().run_in_executor(None, _end, process)
        if self._link is not None:
            self._link.close()

    # Connection

    async def _attach(self) -> None:
        """Give the child's socket to this event loop."""
        sock, self._socket = self._socket, None
        if sock is None:
            return
        loop = asyncio.get_running_loop()
        if self._became_ready is None:
            self._became_ready = asyncio.Event()
        self._heard()
        # Before the connection is made: a child that is ready already is heard before this goes on.
        self._link = link = _Link(self)
        await loop.create_unix_connection(lambda: link, sock=sock)
        if not self._tasks:
            self._spawn(self._watch())

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self) -> None:
        self._silence.heard()

    def _receive(self, kind: int, payload: memoryview) -> None:
        if kind == Kind.OUTPUTS:
            self._hand_out(payload)
        elif kind == Kind.STATS:
            self.stats = messages.decode_stats(payload)
        elif kind == Kind.PROGRESS:
            if self._on_progress is not None:
                self._on_progress(*messages.decode_progress(payload))
        elif kind == Kind.READY and self.state != "closed":  # else it had been loading when it was told to end
            self.ready = messages.decode_ready(payload)
            self.state = "ready"
            if self.vocabulary is not None and self._link is not None:
                self._link.write(messages.encode_vocabulary(self.vocabulary))
            for number, folder in self._adapters.items():  # of the child before this one
                if self._link is not None:
                    self._link.write(messages.encode_load_adapter(number, folder))
            self._signal_ready()
        elif kind == Kind.ADAPTER:
            self._adapter_loaded(*messages.decode_adapter(payload))
        elif kind == Kind.FATAL:
            self._fatal = messages.decode_fatal(payload)
            if self.ready is not None:  # before that, `wait_ready` raises it
                logger.error("engine: %s", self._fatal)
        elif kind == Kind.LOST:
            self._lost_rank = messages.decode_lost(payload)
            self._fatal = self._fatal or self._lost_rank
            logger.error("engine: %s", self._lost_rank)
        elif kind not in (Kind.BEAT, Kind.READY):
            raise ProtocolError(f"message of kind {kind}")

    def _adapter_loaded(self, number: int, error: str, nbytes: int) -> None:
        answer = self._awaited.get(number)
        if answer is not None and not answer.done():
            answer.set_result((error, nbytes))
        elif error:
            logger.error("engine: an adapter is lost: %s", error)

    def _hand_out(self, payload: memoryview) -> None:
        outputs = messages.decode_outputs(payload)
        streams = self._streams
        for request_id, token in zip(outputs.ids, outputs.token_ids, strict=True):
            stream = streams.get(request_id)
            if stream is not None:  # else aborted a moment ago
                stream._items.append(token)
                waiter = stream._waiter
                if waiter is not None and not waiter.done():
                    waiter.set_result(None)
        for output in outputs.full:
            stream = streams.get(output.id)
            if stream is not None:
                if output.finish_reason is not None:
                    stream._done = True
                    del streams[output.id]
                stream._put(output)

    def _abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None and self._link is not None:
            self._link.abort(request_id)

    # Loss and restart

    def _lost(self, link: _Link) -> None:
        if link is not self._link or self.state == "closed":
            return
        self._link = None
        hung, self._hung = self._hung, False
        why, self._lost_rank = f" ({self._lost_rank})" if self._lost_rank else "", ""
        error = f"The engine was lost while it computed this request{why}; it is being replaced."
        self._fail_all(UnavailableError(error))
        now = monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        is_first = self.state == "loading"
        if (is_first and not hung) or len(self._restarts) >= MAX_RESTARTS:
            if hung:
                self._fatal = "the engine process gives no sign of life while it loads"
            self.state = "failed"
            self._signal_ready()
            self._spawn(self._reap())
            return
        self._restarts.append(now)
        if not is_first:
            self.state = "restarting"
        logger.error("the engine process was lost; starting it again")
        self._spawn(self._restart())

    async def _reap(self) -> None:
        process = self._process
        if process is not None:
            await asyncio.get_running_loop().run_in_executor(None, _kill, process)

    async def _restart(self) -> None:
        await self._reap()
        self.stats = EngineStats()
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.start)
            await self._attach()
        except OSError as error:
            logger.error("the engine cannot be started again: %s", error)
            self.state = "failed"

    async def _watch(self) -> None:
        """Replace a child that gives no sign of life, whether it has work or not, is ready or still loading."""
        while True:
            await asyncio.sleep(min(BEAT_S, self.config.hang_after_s / 4))
            silence_s = self._silence.too_long_s(self.pid)
            if self._link is not None and silence_s is not None:
                logger.error("the engine process has given no sign of life for %.0f s: it is replaced", silence_s)
                self._replace()

    def _replace(self) -> None:
        """Break with the child now: one that cannot even be killed must not keep its requests waiting."""
        self._hung = True
        if self._process is not None:
            self._process.kill()
        if self._link is not None:
            self._link.close()  # `_lost` does the rest

    def _fail_all(self, error: Exception) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._fail(error)
        for answer in self._awaited.values():
            if not answer.done():
                answer.set_exception(error)

    def _signal_ready(self) -> None:
        if self._became_ready is not None:
            self._became_ready.set()


_UNAVAILABLE: dict[State, str] = {
    "loading": "The model is still loading.",
    "ready": "The engine is not connected.",
    "restarting": "The engine was lost and is being replaced.",
    "failed": "The engine is lost.",
    "closed": "The server is shutting down.",
}


def _end(process: Child) -> None:
    """Wait for a child that was told to stop; do not wait for ever."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SHUTDOWN_GRACE_S)
        return
    _kill(process)


def _kill(process: Child) -> None:
    """One that waits for a device that never answers cannot be killed; nobody waits for it."""
    process.kill()
    try:
        process.wait(SHUTDOWN_GRACE_S)
    except subprocess.TimeoutExpired:
        logger.error("the engine process %s cannot be killed: it waits for a device or a file", process.pid)
