"""Worker processes that answer short jobs for the event loop: no thread waits for them, and keys are served in turn.

Few are started; more come when none has answered for a moment, so that jobs which take long do not stop the others.
A job that a worker is free for costs one write and one read: no task and no timer of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from sensorium.errors import ServerError
from sensorium.workers.connection import Connection, Job, JobFailed, Reply, TurnMissed, WorkerLost
from sensorium.workers.frames import READY, FrameError
from sensorium.workers.process import REST_S, START_TIMEOUT_S, WorkerProcess

TICK_S = 0.05  # between two looks at what waits and runs, while there is any
STUCK_S = 0.05  # without any reply, after which one more worker is started
GROWTH_S = 0.3  # between two such starts: a worker imports meanwhile
SLOW_START_S = 3.0  # of all that are there, after which one more is started beside them: they may be stopped
START_TRIES = 3  # without one that succeeds
COMPUTING_S = 0.1  # of processor time: more than a good job takes
EXIT_POLL_S, EXIT_POLLS = 0.005, 100
_log = logging.getLogger("sensorium")


@dataclass(frozen=True, slots=True)
class Size:
    """How many workers, and how long a job may take from its coming on."""

    fewest: int  # started at the first job
    most: int  # when they are stuck; one key holds all but one
    turn_s: float  # until a worker has it; while all are being started it does not count, up to START_TIMEOUT_S
    total_s: float  # until it is answered

    def within(self, memory_bytes: int, worker_bytes: int, least_bytes: int) -> tuple[Size, int]:
        """As many workers as `memory_bytes` hold at `least_bytes`, but two (a key leaves one to others), and what each
        may take then, `worker_bytes` at the most."""
        most = min(self.most, max(memory_bytes // least_bytes, 2))
        return (
            replace(self, fewest=min(self.fewest, most - 1), most=most),
            min(worker_bytes, max(memory_bytes // most, least_bytes)),
        )


class Crew:
    """`start` makes one process. Used on one event loop, but for `start_early` and `ask_now`, which come before it."""

    def __init__(
        self, start: Callable[[], WorkerProcess], size: Size, *, max_reply_bytes: int, rests: bool = False
    ) -> None:
        """`rests`: all but one end when there was no job for a while."""
        self._start = start
        self._size = size
        self._needed = size.fewest  # now
        self._rests = rests
        self._share = size.most - 1
        self._max_reply_bytes = max_reply_bytes
        self._spare: list[WorkerProcess] = []  # started, with no connection yet
        self._all: set[Connection] = set()
        self._free: list[Connection] = []  # the last used one is taken first
        self._waiting: OrderedDict[bytes, deque[Job]] = OrderedDict()  # by key, the next one's first
        self._held: Counter[bytes] = Counter()  # jobs that run, by key
        self._tasks: set[asyncio.Task[None]] = set()  # that open connections and bury workers
        self._tick: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._replied_s = self._grown_s = self._looked_s = self._failed_s = 0.0
        self._failed_starts = 0
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in (*self._spare, *(one.worker for one in self._all))]

    def start_early(self) -> None:
        """Start one process; it imports while the caller goes on."""
        self._spare.append(self._start())

    def ask_now(self, frames: bytes) -> Reply:
        """`ask` before there is a loop."""
        try:
            return self._asked_now(frames)
        except WorkerLost:
            return self._asked_now(frames)

    def _asked_now(self, frames: bytes) -> Reply:
        worker, begun_s = self._spare.pop() if self._spare else self._start(), math.inf
        try:
            worker.wait_ready()
            begun_s = worker.cpu_s() or 0.0
            worker.link.set_deadline(self._size.total_s)
            worker.link.send(frames)
            kind, length = worker.link.receive_head()
            if length > self._max_reply_bytes:
                raise FrameError("reply too long")
            body = bytearray(length)
            worker.link.fill(memoryview(body))
        except FrameError:
            time.sleep(EXIT_POLL_S)
            code = worker.process.poll()
            is_computing = code is None and (worker.cpu_s() or 0.0) - begun_s > COMPUTING_S
            worker.kill()
            raise JobFailed if is_computing or code not in (None, -signal.SIGKILL) else WorkerLost from None
        self._spare.append(worker)
        return kind, bytes(body)

    async def ask(self, frames: bytes, key: bytes) -> Reply:
        """The frame with which a worker answers these frames. Unanswered if it does not, ServerError if none can be
        started. A job whose worker was killed or stopped from outside is tried again, once."""
        if self._is_closed:
            raise ServerError
        loop = asyncio.get_running_loop()
        job = Job(frames, key, loop.create_future(), loop.time(), loop.time())
        self._needed = self._size.fewest
        while len(self._all) < self._needed and self._hire():
            pass
        self._put(job)
        return await job.reply

    async def aclose(self) -> None:
        """Kill all; jobs that wait or run fail with ServerError."""
        self._is_closed = True
        for timer in (self._tick, self._rest):
            if timer is not None:
                timer.cancel()
        self._fail_waiting()
        for one in list(self._all):
            if one.job is not None:
                one.job.fail(ServerError())
            one.kill()
        for _ in range(EXIT_POLLS):
            if not self._all and not self._tasks:
                break
            await asyncio.sleep(EXIT_POLL_S)
        while self._spare:
            self._spare.pop().kill()

    # Jobs find workers.

    def _put(self, job: Job) -> None:
        while self._free and self._held[job.key] < self._share:
            free = self._free.pop()
            if free.worker.process.poll() is None:  # else it was killed while it had nothing to do, and is buried soon
                self._give(free, job)
                break
        else:
            self._waiting.setdefault(job.key, deque()).append(job)
            if not self._all:
                self._fail_waiting()
        self._look_soon()

    def _put_again(self, job: Job) -> None:
        """It waits for a worker that answers, or is ready, from now on. One that has nothing to do may have been killed
        together with the one that the job had, and still seem to run: a killed process takes a moment to end."""
        job.is_retried = True
        self._waiting.setdefault(job.key, deque()).appendleft(job)
        if all(one.worker.is_ready for one in self._all):  # else one that is being started takes it
            if len(self._all) < self._size.most:
                self._hire()
            elif self._free:
                self._free.pop().kill()  # another comes in its place
        if not self._all:
            self._fail_waiting()
        self._look_soon()

    def _look_soon(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._tick is None:
            loop = asyncio.get_running_loop()
            self._looked_s = loop.time()
            self._tick = loop.call_later(TICK_S, self._look)

    def _give(self, free: Connection, job: Job) -> None:
        self._held[job.key] += 1
        free.send(job)

    def _next(self) -> Job | None:
        for key in list(self._waiting):
            if self._held[key] >= self._share:
                continue
            jobs = self._waiting.pop(key)
            while jobs and jobs[0].reply.done():  # given up
                jobs.popleft()
            if not jobs:
                continue
            job = jobs.popleft()
            if jobs:
                self._waiting[key] = jobs  # behind the other keys
            return job
        return None

    def _set_free(self, one: Connection) -> None:
        job = self._next() if self._waiting else None
        if job is None:
            self._free.append(one)
        else:
            self._give(one, job)

    def _done(self, job: Job) -> None:
        self._held[job.key] -= 1
        if not self._held[job.key]:
            del self._held[job.key]
        self._replied_s = asyncio.get_running_loop().time()

    def _fail_waiting(self) -> None:
        for jobs in self._waiting.values():
            for job in jobs:
                job.fail(ServerError())
        self._waiting.clear()

    # What takes long.

    def _look(self) -> None:
        """Jobs whose time is over end, and workers come where all are stuck."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        are_there = any(one.worker.is_ready for one in self._all)
        self._give_up(now) if are_there else self._wait_for_starts(now)
        self._looked_s = now
        for one in list(self._all):
            self._look_at(one, now)
        is_stuck = self._waiting and not self._free and now - self._replied_s >= STUCK_S
        pause_s = GROWTH_S if are_there else SLOW_START_S
        if is_stuck and len(self._all) < self._size.most and now - self._grown_s >= pause_s:
            self._hire()
        is_busy = self._waiting or self._held
        self._tick = loop.call_later(TICK_S, self._look) if is_busy and not self._is_closed else None
        if self._rests and self._tick is None and not self._is_closed:
            self._rest = loop.call_later(REST_S, self.rest)

    def rest(self) -> None:
        """End what has no job, but one: the next job finds it, and others beside it in milliseconds."""
        self._needed = 1
        while len(self._free) > 1:
            self._free.pop(0).kill()  # nobody gives it a job any more

    def _look_at(self, one: Connection, now: float) -> None:
        if one.worker.is_stopped():  # one with nothing to do, too: it would get the next job
            one.kill()
            return
        job = one.job
        if job is None:
            if not one.worker.is_ready and now - one.begun_s >= START_TIMEOUT_S:
                one.kill()
            return
        if one.cpu_s is None:
            one.cpu_s = one.worker.cpu_s()
        if now - job.since_s >= self._size.total_s:
            used_s = (one.worker.cpu_s() or 0.0) - (one.cpu_s or 0.0)
            job.fail(JobFailed() if used_s >= COMPUTING_S else WorkerLost())
            one.kill()

    def _wait_for_starts(self, now: float) -> None:
        """Jobs that have waited longer than a start may take end; for the others this time does not count."""
        for key, jobs in list(self._waiting.items()):
            while jobs and (jobs[0].reply.done() or now - jobs[0].came_s >= START_TIMEOUT_S):
                jobs.popleft().fail(WorkerLost())
            for job in jobs:
                job.since_s += now - self._looked_s
            if not jobs:
                del self._waiting[key]

    def _give_up(self, now: float) -> None:
        """Jobs that have waited too long for their turn."""
        counts = self._held + Counter({key: len(jobs) for key, jobs in self._waiting.items()})
        total = counts.total()
        for key, jobs in list(self._waiting.items()):
            while jobs and (jobs[0].reply.done() or now - jobs[0].since_s >= self._size.turn_s):
                jobs.popleft().fail(TurnMissed(by_key=counts[key] > 1 and 2 * counts[key] > total))
            if not jobs:
                del self._waiting[key]

    # Workers come and go.

    def _hire(self) -> bool:
        try:
            worker = self._spare.pop() if self._spare else self._start()
        except OSError as error:
            _log.warning("A worker cannot be started: %s", error)
            return False
        one = Connection(worker, self._max_reply_bytes, self._received, self._lost)
        self._all.add(one)
        self._grown_s = one.begun_s
        self._in_background(self._open(one))
        return True

    async def _open(self, one: Connection) -> None:
        was_ready = one.worker.is_ready  # its first frame may come before this goes on
        await one.open()
        if was_ready and one in self._all:
            self._set_free(one)

    def _received(self, one: Connection, reply: Reply) -> None:
        job, one.job = one.job, None
        if job is not None:
            self._done(job)
            if not job.reply.done():
                job.reply.set_result(reply)
        elif one.worker.is_ready or reply[0] != READY:
            one.kill()  # nothing was asked
            return
        else:
            one.worker.is_ready = True
            self._failed_starts = 0
        self._set_free(one)

    def _lost(self, one: Connection) -> None:
        self._all.discard(one)
        if one in self._free:
            self._free.remove(one)
        job, one.job = one.job, None
        if job is not None:
            self._done(job)
        self._in_background(self._bury(one.worker, job))
        if self._is_closed:
            return
        if not one.worker.is_ready and one.begun_s >= self._failed_s:  # several that end together are one failure
            self._failed_starts += 1
            self._failed_s = asyncio.get_running_loop().time()
        can_start = self._failed_starts < START_TRIES
        if can_start and (self._waiting or len(self._all) < self._needed):
            self._hire()
        if not self._all:  # the last one's start that fails fails the jobs: no loop that starts processes
            self._failed_starts = 0
            self._fail_waiting()

    async def _bury(self, worker: WorkerProcess, job: Job | None) -> None:
        code = await _exit_code(worker)
        if not worker.is_ready and not self._is_closed:
            _log.warning("A worker ended before it was ready (exit code %s).", code)
        worker.process.kill()
        await _exit_code(worker)
        if job is None or job.reply.done():
            return
        if self._is_closed:
            job.fail(ServerError())
        elif code == -signal.SIGKILL and not job.is_retried:
            self._put_again(job)
        else:
            job.fail(WorkerLost() if code in (None, -signal.SIGKILL) else JobFailed())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _exit_code(worker: WorkerProcess) -> int | None:
    """How the process ended; None if it still runs."""
    for _ in range(EXIT_POLLS):
        if (code := worker.process.poll()) is not None:
            return code
        await asyncio.sleep(EXIT_POLL_S)
    return None
