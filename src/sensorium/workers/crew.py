"""Worker processes that answer short jobs for the event loop: no thread waits for them, and keys are served in turn.

Few are started; more come when none has answered for a moment, so that jobs which take long do not stop the others.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from sensorium.errors import ServerError
from sensorium.workers.frames import HEAD, READY, FrameError
from sensorium.workers.process import START_TIMEOUT_S, WorkerProcess

FIRST_BYTES, PIECE_BYTES = 1 << 14, 1 << 18  # a large buffer costs more than a short job
STUCK_S = 0.05  # without any reply, after which one more worker is started
GROWTH_S = 0.3  # between two such starts: a worker imports meanwhile
START_TRIES = 2
EXIT_POLL_S, EXIT_POLLS = 0.005, 100
Reply = tuple[int, bytes]  # kind and body of a frame


class WorkerLost(Exception):
    """The process did not answer. `by_job`: it ended by what it was doing, and not by a signal or load from outside."""

    def __init__(self, *, by_job: bool) -> None:
        super().__init__()
        self.by_job = by_job


@dataclass(slots=True)
class _Job:
    frames: bytes
    key: bytes
    reply: asyncio.Future[Reply]
    is_retried: bool = False


class Crew:
    """`start` makes one process. Used on one event loop, but for `start_early` and `ask_now`, which come before it."""

    def __init__(
        self,
        start: Callable[[], WorkerProcess],
        *,
        deadline_s: float,
        max_reply_bytes: int,
        fewest: int,
        most: int,
        patience_s: float | None = None,
    ) -> None:
        """`fewest` are started at the first job, up to `most` when they are stuck; one key holds all but one.
        `patience_s` bounds a job's time in the queue and with a worker, `deadline_s` the latter."""
        self._start = start
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._max_reply_bytes = max_reply_bytes
        self._fewest, self._most = fewest, most
        self._spare: list[WorkerProcess] = []  # started, with no task of its own yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers: set[WorkerProcess] = set()
        self._free: list[asyncio.Future[_Job]] = []  # tasks that wait for a job; the last used one is taken first
        self._waiting: OrderedDict[bytes, deque[_Job]] = OrderedDict()  # by key, the next one's first
        self._held: Counter[bytes] = Counter()  # jobs that run, by key
        self._growth: asyncio.TimerHandle | None = None
        self._replied_s = 0.0
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in (*self._spare, *self._workers)]

    def start_early(self) -> None:
        """Start one process; it imports while the caller goes on."""
        self._spare.append(self._start())

    def ask_now(self, frames: bytes) -> Reply:
        """`ask` before there is a loop."""
        worker = self._spare.pop() if self._spare else self._start()
        try:
            worker.wait_ready()
            worker.link.set_deadline(self._deadline_s)
            worker.link.send(frames)
            kind, length = worker.link.receive_head()
            if length > self._max_reply_bytes:
                raise FrameError("reply too long")
            body = bytearray(length)
            worker.link.fill(memoryview(body))
        except FrameError:
            time.sleep(EXIT_POLL_S)
            is_hung = worker.process.poll() is None
            worker.kill()
            raise WorkerLost(by_job=not is_hung and worker.process.returncode != -signal.SIGKILL) from None
        self._spare.append(worker)
        return kind, bytes(body)

    async def ask(self, frames: bytes, key: bytes) -> Reply:
        """The frame with which a worker answers these frames. WorkerLost if it does not, ServerError if none can be
        started. A job whose worker was killed from outside is tried again, once."""
        if self._is_closed:
            raise ServerError
        job = _Job(frames, key, asyncio.get_running_loop().create_future())
        self._put(job)
        try:
            async with asyncio.timeout(self._patience_s):
                return await job.reply
        except TimeoutError:
            raise WorkerLost(by_job=False) from None

    async def aclose(self) -> None:
        """Kill all; jobs that wait or run fail with ServerError."""
        self._is_closed = True
        if self._growth is not None:
            self._growth.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._spare:
            self._spare.pop().kill()

    # Jobs find workers.

    def _put(self, job: _Job) -> None:
        while len(self._tasks) < self._fewest:
            self._hire()
        while self._free and self._held[job.key] < self._most - 1:
            free = self._free.pop()
            if not free.done():
                self._held[job.key] += 1
                free.set_result(job)
                return
        self._waiting.setdefault(job.key, deque()).append(job)
        if self._growth is None:
            self._growth = asyncio.get_running_loop().call_later(STUCK_S, self._grow)

    async def _next(self) -> _Job:
        for key in list(self._waiting):
            if self._held[key] >= self._most - 1:
                continue
            jobs = deque(job for job in self._waiting.pop(key) if not job.reply.done())  # others were given up
            if not jobs:
                continue
            job = jobs.popleft()
            if jobs:
                self._waiting[key] = jobs  # behind the other keys
            self._held[key] += 1
            return job
        free: asyncio.Future[_Job] = asyncio.get_running_loop().create_future()
        self._free.append(free)
        return await free

    def _grow(self) -> None:
        self._growth = None
        if not self._waiting or self._is_closed:
            return
        if time.monotonic() - self._replied_s >= STUCK_S and len(self._tasks) < self._most:
            self._hire()
        self._growth = asyncio.get_running_loop().call_later(GROWTH_S, self._grow)

    def _hire(self) -> None:
        task = asyncio.get_running_loop().create_task(self._work())
        self._tasks.add(task)
        task.add_done_callback(self._dismiss)

    def _dismiss(self, task: asyncio.Task[None]) -> None:
        """Nobody waits for a task that failed."""
        self._tasks.discard(task)
        if not self._tasks:
            for job in (job for jobs in self._waiting.values() for job in jobs):
                _fail(job, ServerError())
            self._waiting.clear()

    def _done(self, job: _Job) -> None:
        self._held[job.key] -= 1
        if not self._held[job.key]:
            del self._held[job.key]
        self._replied_s = time.monotonic()

    # One worker's task.

    async def _work(self) -> None:
        while True:
            worker = await self._started()
            if worker is None and len(self._tasks) > 1:
                return
            if worker is None:  # the last one's start that fails fails a job: no loop that starts processes
                job = await self._next()
                self._done(job)
                _fail(job, ServerError())
                continue
            try:
                while await self._do(worker, await self._next()):
                    pass
            finally:
                self._workers.discard(worker)
                await _end(worker)

    async def _started(self) -> WorkerProcess | None:
        for _ in range(START_TRIES):
            try:
                worker = self._spare.pop() if self._spare else self._start()
            except OSError:
                return None
            self._workers.add(worker)
            try:
                if not worker.is_ready:
                    worker.is_ready = (await self._receive(worker, START_TIMEOUT_S))[0] == READY
                return worker
            except FrameError:
                pass
            finally:
                if not worker.is_ready:
                    self._workers.discard(worker)
                    await _end(worker)
        return None

    async def _do(self, worker: WorkerProcess, job: _Job) -> bool:
        """One job; False if the worker is of no more use."""
        if worker.process.poll() is not None:  # killed while it had nothing to do
            self._done(job)
            self._put(job)
            return False
        try:
            reply = await self._receive(worker, self._deadline_s, job.frames)
        except FrameError:
            await self._lost(worker, job)
            return False
        except asyncio.CancelledError:
            _fail(job, ServerError())
            raise
        finally:
            self._done(job)
        if not job.reply.done():
            job.reply.set_result(reply)
        return True

    async def _lost(self, worker: WorkerProcess, job: _Job) -> None:
        code = await _exit_code(worker)
        if code == -signal.SIGKILL and not job.is_retried:
            job.is_retried = True
            self._put(job)
        else:
            _fail(job, WorkerLost(by_job=code not in (None, -signal.SIGKILL)))

    async def _receive(self, worker: WorkerProcess, deadline_s: float, frames: bytes = b"") -> Reply:
        """The next frame, after these are sent."""
        loop, sock = asyncio.get_running_loop(), worker.link.sock
        sock.setblocking(False)
        try:
            async with asyncio.timeout(deadline_s):
                await loop.sock_sendall(sock, frames)
                data = bytearray()
                while len(data) < HEAD.size or len(data) < HEAD.size + self._length(data):
                    piece = await loop.sock_recv(sock, PIECE_BYTES if data else FIRST_BYTES)
                    if not piece:
                        raise FrameError("closed")
                    data += piece
        except OSError:  # TimeoutError is one
            raise FrameError("no answer") from None
        return data[0], bytes(memoryview(data)[HEAD.size :])

    def _length(self, data: bytearray) -> int:
        length: int = HEAD.unpack_from(data)[1]
        if length > self._max_reply_bytes:
            raise FrameError("reply too long")
        return length


def _fail(job: _Job, error: Exception) -> None:
    if not job.reply.done():
        job.reply.set_exception(error)


async def _exit_code(worker: WorkerProcess) -> int | None:
    """How the process ended; None if it still runs."""
    for _ in range(EXIT_POLLS):
        if (code := worker.process.poll()) is not None:
            return code
        await asyncio.sleep(EXIT_POLL_S)
    return None


async def _end(worker: WorkerProcess) -> None:
    worker.link.sock.close()
    worker.process.kill()
    await _exit_code(worker)
