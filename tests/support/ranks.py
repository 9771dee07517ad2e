"""Models that several ranks share: engines whose followers are processes, and ranks that are threads of this process.

A process takes seconds to import torch, so that all tests of a module share theirs: `Crew` sends them the socket of
each engine. Threads take turns, since native kernels are for one thread at a time.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sensorium.config import EngineConfig
from sensorium.engine.follower import serve
from sensorium.engine.leader import Leader
from sensorium.engine.loading import load_engine
from sensorium.engine.loop import set_torch_environment
from sensorium.ipc.channel import Channel
from sensorium.ipc.messages import Kind
from sensorium.parallel.ranks import Ranks
from support.engine_harness import Bench

T = TypeVar("T")
ANSWER_S = 120.0


class _Followed(Channel):
    """A follower's end of a socket whose other end may close without ending the process."""

    def _ended(self) -> None:
        self._inbox.put((Kind.SHUTDOWN, memoryview(b"")))


class Crew:
    """Follower processes, started as they are needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self.lost: list[str] = []  # what leaders have told

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, control in self._workers:
            control.close()
            process.wait(ANSWER_S)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        tests = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "support.ranks", str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment)
        self._workers.append((process, ours))

    @contextmanager
    def engine(self, folder: Path, size: int = 2, **options: Any) -> Iterator[Bench]:
        """An engine over so many ranks, on CPUs in float32 unless the options say otherwise."""
        while len(self._workers) < size - 1:
            self._start()
        options = {"max_num_seqs": 8, "max_model_len": 512, "dtype": "float32", "threads": 1, **options}
        options = {"kv_cache_memory": 1 << 22, "speculative_tokens": 0, "quantized_cache": "", **options}
        config = EngineConfig(model=str(folder), tensor_parallel_size=size, **options)
        followers: list[tuple[socket.socket, int | None]] = []
        used = self._workers[: size - 1]
        for _, control in used:
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(control, [b"."], [theirs.fileno()])
            followers.append((ours, None))
        leader = Leader(config, followers, tell=self.lost.append, end=lambda code: None) if followers else None
        try:
            yield Bench(load_engine(config, leader=leader))
        finally:
            if leader is not None:
                leader.close()
            for (sock, _), (_, control) in zip(followers, used, strict=True):
                sock.shutdown(socket.SHUT_RDWR)
                control.settimeout(ANSWER_S)
                control.recv(1)


def work(control: socket.socket) -> None:
    """Follow whatever engines come, one after the other."""
    logging.basicConfig(level=logging.WARNING)
    set_torch_environment()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        serve(_Followed(socket.socket(fileno=descriptors[0])))
        control.sendall(b".")


class _Table:
    """Where threads lay what they exchange."""

    def __init__(self, size: int) -> None:
        self.turn = threading.Lock()  # of the one that computes
        self.meeting = threading.Barrier(size, timeout=ANSWER_S)
        self.parts = [torch.empty(0)] * size


class ThreadRanks(Ranks):
    """The ranks of one process: every one computes alone, until it needs the others."""

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__(rank, len(table.parts))
        self._table = table

    def _exchanged(self, x: Tensor) -> list[Tensor]:
        table = self._table
        table.parts[self.rank] = x.clone()
        table.turn.release()
        try:
            table.meeting.wait()
            found = list(table.parts)
            table.meeting.wait()
        finally:
            table.turn.acquire()
        return found

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchanged(x)).sum(0, dtype=x.dtype)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchanged(x), -1)

    def join_on_first(self, x: Tensor) -> Tensor:
        return self.join(x)

    def from_first(self, x: Tensor) -> Tensor:
        return self._exchanged(x)[0].clone()


def in_turns(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What all ranks make of it, rank 0's first."""
    table = _Table(size)

    def one(rank: int) -> T:
        with table.turn:
            try:
                return work(ThreadRanks(rank, table))
            except BaseException:
                table.meeting.abort()
                raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(one, rank) for rank in range(size)]
    broken = [f.exception() for f in futures if f.exception() is not None]
    for error in sorted(broken, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        assert error is not None
        raise error
    return [future.result() for future in futures]


if __name__ == "__main__":
    work(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
