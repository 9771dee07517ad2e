"""One disposable child process as its parent sees it, and the socket to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Self

from sensorium.errors import ServerError
from sensorium.workers.frames import READY, FrameError, FrameSocket

START_TIMEOUT_S = 30.0
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "TZ")


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """Used by one thread at a time."""

    process: subprocess.Popen[bytes]
    link: FrameSocket
    is_ready: bool = False
    jobs: int = 0

    @classmethod
    def start(cls, module: str, *arguments: object) -> Self:
        """Returns at once; the child imports meanwhile. It inherits its socket and stderr, nothing else."""
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", module, *map(str, arguments)]
        with theirs:
            process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment)
        return cls(process, FrameSocket(ours))

    def wait_ready(self) -> None:
        """Until the child has imported and locked itself in. ServerError if it cannot."""
        if self.is_ready:
            return
        self.link.set_deadline(START_TIMEOUT_S)
        try:
            kind, length = self.link.receive_head()
            self.link.receive_record(length)
        except FrameError:
            kind = 0
        if kind != READY:
            raise ServerError
        self.is_ready = True

    def kill(self) -> None:
        self.link.sock.close()
        self.process.kill()
        self.process.wait()
