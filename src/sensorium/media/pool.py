"""Decode workers as the HTTP process sees them: started when first needed, killed when late, replaced when used up."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import ServerError, UnavailableError
from sensorium.media.source import CRASHED, Problem, Refusal
from sensorium.media.turns import Turns
from sensorium.system.nursery import Nursery
from sensorium.workers.frames import BYTES, JOB, REFUSED, RESULT, FrameError, Gone, Late, Stopped
from sensorium.workers.process import DYING_S, REST_S, WorkerProcess

Blame = Literal["file", "crash", "outside"]
"""file: more than it may take, or a wrong answer; crash: a signal that bad files cause, and others could have sent."""

CRASHES = frozenset(
    (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
)
DTYPES = frozenset(("uint8", "float32"))
PROBLEMS: dict[str, Problem] = {problem: problem for problem in get_args(Problem)}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one job of a role may take. `result_bytes` bounds what this process allocates on a worker's word.

    The worker's own limit on processor time is for the file; the deadline by the clock is longer, so that a machine
    with much to do does not make files look bad.
    """

    cpu_s: float
    deadline_s: float
    memory_bytes: int  # beyond what the worker has after its imports
    result_bytes: int
    max_jobs: int = 1000  # then the worker is replaced: codecs leak


@dataclass(frozen=True, slots=True)
class Result:
    record: dict[str, Any]
    data: NDArray[np.generic] | None


@dataclass(slots=True, eq=False)
class Worker(WorkerProcess):
    """A process that decodes. In step is one that waits for a job."""

    is_in_step: bool = False

    @classmethod
    def spawn(cls, role: str, bounds: Bounds, nursery: Nursery | None) -> Worker:
        cpu_s = math.ceil(bounds.cpu_s) + 1
        return cls.start("sensorium.media.worker", role, bounds.memory_bytes, cpu_s, nursery=nursery)

    def run(self, job: dict[str, Any], payload: bytes, bounds: Bounds) -> Result:
        """Raises Refusal for a refused file, FrameError when this worker is of no more use."""
        self.wait_ready()
        self.jobs += 1
        self.is_in_step = False
        self.link.set_deadline(bounds.deadline_s)
        try:
            self.link.send_record(JOB, job)
            self.link.send_bytes(payload)
            kind, length = self.link.receive_head()
            record = self.link.receive_record(length)
            if kind == REFUSED:
                raise _refusal(record)
            if kind != RESULT:
                raise FrameError("unexpected frame")
            data = self._receive_array(record, bounds.result_bytes) if "shape" in record else None
        except Refusal:
            self.is_in_step = True
            raise
        self.is_in_step = True
        return Result(record, data)

    def blame(self, error: FrameError) -> Blame:
        """Whose fault it is that there is no answer."""
        if isinstance(error, Stopped | Late):
            return "outside"
        if not isinstance(error, Gone):
            return "file"  # it answers, and wrongly
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(DYING_S)
            if status == -signal.SIGXCPU or status > 0:
                return "file"
            return "crash" if -status in CRASHES else "outside"
        return "outside"

    def _receive_array(self, record: dict[str, Any], max_bytes: int) -> NDArray[np.generic]:
        data = _allocate(record, max_bytes)
        view, filled = data.reshape(-1).view(np.uint8).data, 0
        while filled < len(view):
            kind, length = self.link.receive_head()
            if kind == REFUSED:
                raise _refusal(self.link.receive_record(length))
            if kind != BYTES or not 0 < length <= len(view) - filled:
                raise FrameError("unexpected frame")
            self.link.fill(view[filled : filled + length])
            filled += length
        data.flags.writeable = False
        return data


def _allocate(record: dict[str, Any], max_bytes: int) -> NDArray[np.uint8] | NDArray[np.float32]:
    shape, dtype = record.get("shape"), record.get("dtype")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or dtype not in DTYPES:
        raise FrameError("bad shape")
    if not all(type(side) is int and 0 <= side < 1 << 40 for side in shape):
        raise FrameError("bad shape")
    if math.prod(shape) * np.dtype(dtype).itemsize > max_bytes:
        raise FrameError("result too large")
    return np.empty(shape, dtype)


def _refusal(record: dict[str, Any]) -> Refusal:
    problem, text = PROBLEMS.get(str(record.get("problem"))), record.get("text")
    if problem is None or not isinstance(text, str):
        raise FrameError("bad refusal")
    return Refusal(problem, text[:300])


@dataclass(slots=True)
class WorkerPool:
    """Workers of one role. `run` is awaited; the blocking exchange happens in the pool's own threads.

    One tenant keeps at most `size` of them busy. There is one more, so that another's job finds one that is free: it is
    started as soon as the others are taken.
    """

    role: str
    size: int
    bounds: Bounds
    nursery: Nursery | None = None  # where they come from; None: each for itself
    _idle: list[Worker] = field(default_factory=list)  # the last used one first, so that few are started
    _busy: set[Worker] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turns: Turns = field(init=False)
    _threads: ThreadPoolExecutor | None = None
    _rest: asyncio.TimerHandle | None = None
    _is_closed: bool = False

    def __post_init__(self) -> None:
        self._turns = Turns(self.size + 1, self.size)

    async def run(self, job: dict[str, Any], payload: bytes, tenant: bytes = b"") -> Result:
        """Refusal("parse") where the file ends a worker or takes more than it may, and where an answer is wrong.

        A worker that is killed or stopped from outside is not the file's fault: the job is tried once more, then
        UnavailableError.
        """
        try:
            return await self._turns.run(self._executor(), tenant, lambda: self._run(job, payload))
        finally:
            self._rest_later()

    async def warm(self) -> None:
        """Start one worker ahead of the first job."""
        await asyncio.get_running_loop().run_in_executor(self._executor(), self._warm)
        self._rest_later()

    async def aclose(self) -> None:
        """Kill what runs; jobs in flight end with an error."""
        with self._lock:
            self._is_closed = True
            if self._rest is not None:
                self._rest.cancel()
            workers, self._idle = self._idle, []
            for worker in self._busy:
                worker.process.kill()  # its thread sees the end and cleans up
        for worker in workers:
            worker.kill()
        if self._threads is not None:
            await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    def _rest_later(self) -> None:
        """Unless there is a job until then. Not where another worker would have to import."""
        if self.nursery is not None and not self._is_closed:
            if self._rest is not None:
                self._rest.cancel()
            loop = asyncio.get_running_loop()
            self._rest = loop.call_later(REST_S, lambda: loop.run_in_executor(self._executor(), self.rest))

    def rest(self) -> None:
        """End workers that have no job, but for the last one of the server: who forks them would end with it."""
        while self.nursery is not None and self._end_one(self.nursery):
            pass

    def _end_one(self, nursery: Nursery) -> bool:
        with nursery.ending:  # whatever is being ended, here or in another pool, is not counted any more
            with self._lock:
                if not self._idle or nursery.count < 2:
                    return False
                worker = self._idle.pop(0)  # from here on nobody gives it a job
            worker.kill()
        return True

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [worker.process.pid for worker in (*self._busy, *self._idle)]

    def _executor(self) -> ThreadPoolExecutor:
        if self._is_closed:
            raise ServerError
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.size + 1, f"media-{self.role}")
        return self._threads

    def _run(self, job: dict[str, Any], payload: bytes) -> Result:
        for is_retry in (False, True):
            with self._worker() as worker:
                self._keep_reserve()
                try:
                    return worker.run(job, payload, self.bounds)
                except FrameError as error:
                    blame, is_last = worker.blame(error), is_retry or self._is_closed or isinstance(error, Late)
            if blame == "file" or (blame == "crash" and is_last):
                raise Refusal("parse", CRASHED)
            if is_last:
                break
        raise UnavailableError("A media decoder was ended or kept from working. Try again.")

    def _warm(self) -> None:
        with self._worker() as worker, suppress(FrameError):
            worker.wait_ready()
            worker.is_in_step = True

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        """An idle worker, or a new one. It goes back only if it is still in step with us."""
        with self._lock:
            if self._is_closed:
                raise ServerError
            worker = self._take_idle() or Worker.spawn(self.role, self.bounds, self.nursery)
            self._busy.add(worker)
        try:
            yield worker
        finally:
            self._give_back(worker)

    def _keep_reserve(self) -> None:
        """Have one more started when one tenant may hold all others."""
        with self._lock:
            if len(self._busy) == self.size and not self._idle and not self._is_closed:
                self._idle.append(Worker.spawn(self.role, self.bounds, self.nursery))

    def _take_idle(self) -> Worker | None:
        """One that still runs: the system may have killed it while nobody looked."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None and not worker.is_stopped():
                return worker
            worker.kill()
        return None

    def _give_back(self, worker: Worker) -> None:
        is_spent = not worker.is_in_step or worker.jobs >= self.bounds.max_jobs
        with self._lock:
            self._busy.discard(worker)
            if not self._is_closed:  # a new one is ready by the time somebody needs it
                self._idle.append(Worker.spawn(self.role, self.bounds, self.nursery) if is_spent else worker)
        if is_spent or self._is_closed:
            worker.kill()
