"""Decode workers as the HTTP process sees them: started when first needed, killed when late, replaced when used up."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import ServerError
from sensorium.media.source import Problem, Refusal
from sensorium.workers.frames import BYTES, JOB, REFUSED, RESULT, FrameError
from sensorium.workers.process import WorkerProcess

CRASHED = "The {noun} could not be decoded: its file is damaged or takes more time or memory than it may."
DTYPES = frozenset(("uint8", "float32"))
PROBLEMS: dict[str, Problem] = {problem: problem for problem in get_args(Problem)}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one job of a role may take. `result_bytes` bounds what this process allocates on a worker's word."""

    deadline_s: float
    memory_bytes: int  # beyond what the worker has after its imports
    result_bytes: int
    max_jobs: int = 1000  # then the worker is replaced: codecs leak


@dataclass(frozen=True, slots=True)
class Result:
    record: dict[str, Any]
    data: NDArray[np.generic] | None


@dataclass(slots=True)
class Worker(WorkerProcess):
    """A process that decodes."""

    @classmethod
    def spawn(cls, role: str, bounds: Bounds) -> Worker:
        return cls.start("sensorium.media.worker", role, bounds.memory_bytes, math.ceil(bounds.deadline_s) + 1)

    def run(self, job: dict[str, Any], payload: bytes, bounds: Bounds) -> Result:
        """Raises Refusal for a refused file, FrameError when this worker is of no more use."""
        self.wait_ready()
        self.jobs += 1
        self.link.set_deadline(bounds.deadline_s)
        self.link.send_record(JOB, job)
        self.link.send_bytes(payload)
        kind, length = self.link.receive_head()
        record = self.link.receive_record(length)
        if kind == REFUSED:
            raise _refusal(record)
        if kind != RESULT:
            raise FrameError("unexpected frame")
        if "shape" not in record:
            return Result(record, None)
        return Result(record, self._receive_array(record, bounds.result_bytes))

    def _receive_array(self, record: dict[str, Any], max_bytes: int) -> NDArray[np.generic]:
        data = _allocate(record, max_bytes)
        view, filled = data.reshape(-1).view(np.uint8).data, 0
        while filled < len(view):
            kind, length = self.link.receive_head()
            if kind == REFUSED:
                raise _refusal(self.link.receive_record(length))
            if kind != BYTES or not 0 < length <= len(view) - filled:
                raise FrameError("unexpected frame")
            self.link.fill(view[filled:filled + length])
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
    """`size` workers of one role. `run` is awaited; the blocking exchange happens in the pool's own threads."""

    role: str
    size: int
    bounds: Bounds
    _idle: list[Worker] = field(default_factory=list)  # the last used one first, so that few are started
    _busy: dict[int, Worker] = field(default_factory=dict)  # by pid
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: ThreadPoolExecutor | None = None
    _is_closed: bool = False

    async def run(self, job: dict[str, Any], payload: bytes) -> Result:
        """A crash, a late or a wrong answer costs the worker, and is Refusal("parse") for the file."""
        return await asyncio.get_running_loop().run_in_executor(self._executor(), self._run, job, payload)

    async def warm(self) -> None:
        """Start one worker ahead of the first job."""
        await asyncio.get_running_loop().run_in_executor(self._executor(), self._warm)

    async def aclose(self) -> None:
        """Kill what runs; jobs in flight end with a refusal."""
        with self._lock:
            self._is_closed = True
            workers, self._idle = self._idle, []
            for worker in self._busy.values():
                worker.process.kill()  # its thread sees the end and cleans up
        for worker in workers:
            worker.kill()
        if self._threads is not None:
            await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [*self._busy, *(worker.process.pid for worker in self._idle)]

    def _executor(self) -> ThreadPoolExecutor:
        if self._is_closed:
            raise ServerError
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.size, f"media-{self.role}")
        return self._threads

    def _run(self, job: dict[str, Any], payload: bytes) -> Result:
        with self._worker() as worker:
            return worker.run(job, payload, self.bounds)

    def _warm(self) -> None:
        with self._worker() as worker:
            worker.wait_ready()

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        """An idle worker, or a new one. It goes back only if it is still in step with us."""
        with self._lock:
            if self._is_closed:
                raise ServerError
            worker = self._take_idle() or Worker.spawn(self.role, self.bounds)
            self._busy[worker.process.pid] = worker
        is_usable = False
        try:
            yield worker
            is_usable = True
        except Refusal:
            is_usable = True
            raise
        except FrameError:
            raise Refusal("parse", CRASHED) from None
        finally:
            self._give_back(worker, is_usable)

    def _take_idle(self) -> Worker | None:
        """One that is still alive: the system may have killed it while nobody looked."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.kill()
        return None

    def _give_back(self, worker: Worker, is_usable: bool) -> None:
        is_spent = not is_usable or worker.jobs >= self.bounds.max_jobs
        with self._lock:
            del self._busy[worker.process.pid]
            if not self._is_closed:  # a new one is ready by the time somebody needs it
                self._idle.append(Worker.spawn(self.role, self.bounds) if is_spent else worker)
        if is_spent or self._is_closed:
            worker.kill()
