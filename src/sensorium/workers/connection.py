"""A worker process on the event loop: frames go out in one write, and whole frames come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from sensorium.workers.frames import HEAD
from sensorium.workers.process import WorkerProcess

Reply = tuple[int, bytes]  # kind and body of a frame


class Unanswered(Exception):
    """A job came to nothing."""


class JobFailed(Unanswered):
    """The job's own doing: it ended its worker, or computed until its time was over."""


class WorkerLost(Unanswered):
    """The worker was killed, stopped or kept from computing by others."""


class TurnMissed(Unanswered):
    """No worker had time for it. `by_key`: most of what held them came from the same key."""

    def __init__(self, *, by_key: bool) -> None:
        super().__init__()
        self.by_key = by_key


@dataclass(slots=True, eq=False)
class Job:
    """`came_s` is the loop's time at which it came; `since_s` leaves out time in which all workers were starting."""

    frames: bytes
    key: bytes
    reply: asyncio.Future[Reply]
    came_s: float
    since_s: float
    is_retried: bool = False

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class Connection(asyncio.Protocol):
    """`on_frame` and `on_lost` are called on the loop; the latter once, and nothing after it."""

    def __init__(
        self,
        worker: WorkerProcess,
        max_reply_bytes: int,
        on_frame: Callable[[Connection, Reply], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self.worker = worker
        self.begun_s = asyncio.get_running_loop().time()
        self.job: Job | None = None  # that the worker has
        self.cpu_s: float | None = None  # the worker's when the job was first seen to take long
        self._max_reply_bytes = max_reply_bytes
        self._on_frame, self._on_lost = on_frame, on_lost
        self._transport: asyncio.Transport | None = None
        self._begun = bytearray()  # of a frame that comes in pieces

    async def open(self) -> None:
        sock = self.worker.link.sock
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)
        except OSError:
            self._on_lost(self)

    def send(self, job: Job) -> None:
        self.job, self.cpu_s = job, None
        if self._transport is not None:
            self._transport.write(job.frames)

    def kill(self) -> None:
        """`on_lost` follows."""
        self.worker.process.kill()
        if self._transport is not None:
            self._transport.abort()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class

    def data_received(self, data: bytes) -> None:
        if self._begun:
            self._begun += data
        view = self._begun or data
        if len(view) < HEAD.size:
            self._begun = bytearray(view)
            return
        kind, length = HEAD.unpack_from(view)
        if length > self._max_reply_bytes or len(view) > HEAD.size + length:  # more than what was asked for
            if self.job is not None:
                self.job.fail(WorkerLost())
            self.kill()
        elif len(view) == HEAD.size + length:
            body = bytes(memoryview(view)[HEAD.size :])
            self._begun = bytearray()
            self._on_frame(self, (kind, body))
        elif not self._begun:
            self._begun = bytearray(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost(self)
