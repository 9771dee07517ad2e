"""One disposable child process as its parent sees it, and the socket to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sensorium.errors import ServerError
from sensorium.system.nursery import ForkedProcess, Nursery
from sensorium.workers.frames import READY, FrameError, FrameSocket, Gone, Stopped

START_TIMEOUT_S = 30.0
DYING_S = 5.0  # between a socket that closes and the process's end
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "TZ")

REST_S = 30.0
"""Without a job, after which workers end whose like is forked in milliseconds. The last one stays."""
PATIENCE_S = 10.0  # for a fork; whoever forks may have to import first


def worker_environment() -> dict[str, str]:
    """What of this process's environment workers see."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def worker_nursery() -> Nursery:
    """Where the workers of several models come from."""
    environment = worker_environment()
    return Nursery("sensorium.workers.nursery", environment, stdout=subprocess.DEVNULL, patience_s=PATIENCE_S)


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """Used by one thread at a time."""

    process: subprocess.Popen[bytes] | ForkedProcess
    link: FrameSocket
    is_ready: bool = False
    jobs: int = 0

    @classmethod
    def start(cls, module: str, *arguments: object, nursery: Nursery | None = None) -> Self:
        """Returns at once; the child imports meanwhile. It inherits its socket and stderr, nothing else. With a
        `nursery` it shares what it imports with other workers."""
        words = [module, *map(str, arguments)]
        ours, theirs = socket.socketpair()
        process: subprocess.Popen[bytes] | ForkedProcess
        with theirs:
            if nursery is not None:
                process = nursery.spawn(theirs, json.dumps(words).encode())
            else:
                command, environment = [sys.executable, "-m", *words], worker_environment()
                process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment)
        started = cls(process, FrameSocket(ours))
        started.link.watch = started.check_running
        return started

    def wait_ready(self) -> None:
        """Until the child has imported and locked itself in. ServerError if it cannot, FrameError if it was kept from
        it."""
        if self.is_ready:
            return
        self.link.set_deadline(START_TIMEOUT_S)
        try:
            kind, length = self.link.receive_head()
            self.link.receive_record(length)
        except Stopped:
            raise
        except FrameError:
            kind = 0
            if self._was_killed():
                raise Gone from None
        if kind != READY:
            raise ServerError
        self.is_ready = True

    def _was_killed(self) -> bool:
        try:
            return self.process.wait(DYING_S) < 0
        except subprocess.TimeoutExpired:
            return False

    def is_stopped(self) -> bool:
        """Whether somebody has sent it SIGSTOP."""
        stat = self._stat()
        return bool(stat) and stat[0] in "Tt"

    def cpu_s(self) -> float | None:
        """Processor time that it has used; None where that is not known."""
        stat = self._stat()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") if stat else None

    def _stat(self) -> list[str]:
        """The fields of its line from its state on; none if it has ended, or this is no Linux."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return []

    def check_running(self) -> None:
        if self.is_stopped():
            raise Stopped

    def kill(self) -> None:
        self.link.sock.close()
        self.process.kill()
        self.process.wait()
