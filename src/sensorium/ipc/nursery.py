"""Engine processes that share what they import: one process imports torch, and forks an engine for every model.

An engine that imports it for itself has 150 MB of its own before it has a weight, and takes a second of processor time
to get there. Only the first is paid here; the process ends with the last engine. Torch-free, and for Linux.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress

STDERR = 2
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's library starts its threads when it is imported, and a process that forks should have none but its own."""
NUMBER = struct.Struct("=i")
"""What the other process writes of each engine: its process id, and how it ended (negative: the signal)."""


class Nursery:
    """`engine/nursery.py` as the HTTP process sees it. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket()
        self._alive: set[ForkedProcess] = set()

    def spawn(self, engine: socket.socket) -> ForkedProcess:
        """A process that serves at this socket. Returns at once, though the one that forks it may still import."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            descriptors = [engine.fileno(), theirs.fileno()]
            try:
                maker = self._send(descriptors)
            except OSError:  # it has ended
                self._stop()
                maker = self._send(descriptors)
            forked = ForkedProcess(self, maker, ours)
            self._alive.add(forked)
        return forked

    def _send(self, descriptors: list[int]) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._socket, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-P", "-m", "sensorium.engine.nursery", "--fd", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=STDERR,
                    start_new_session=True,
                    env=ONE_THREAD | os.environ,
                )
        socket.send_fds(self._socket, [b"\0"], descriptors)
        return self._process

    def _stop(self) -> None:
        """Its engines go on; the next one has another process like it."""
        process, self._process = self._process, None
        self._socket.close()
        if process is not None:
            process.kill()
            process.wait()

    def give_up(self, maker: subprocess.Popen[bytes]) -> None:
        """End it, unless another one has taken its place already."""
        with self._lock:
            if maker is self._process:
                self._stop()

    def _ended(self, forked: ForkedProcess) -> None:
        with self._lock:
            self._alive.discard(forked)
            if not self._alive:
                self._stop()


class ForkedProcess:
    """What a `Popen` is to the process that started it, as far as the client of an engine needs that."""

    def __init__(self, nursery: Nursery, maker: subprocess.Popen[bytes], news: socket.socket) -> None:
        """`maker` is asked to fork it, and writes to `news`."""
        self.returncode: int | None = None
        self._nursery = nursery
        self._maker = maker
        self._news = news
        self._lock = threading.Lock()
        self._engine: int | None = None  # its id, once it was forked
        self._handle = -1  # of the process, whoever has its id later

    @property
    def pid(self) -> int:
        """Until it is forked, of the process that works on that."""
        self._hear(0.0)
        return self._engine or self._maker.pid

    def poll(self) -> int | None:
        self._hear(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. subprocess.TimeoutExpired if it still runs then."""
        self._hear(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("engine", timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        self._hear(0.0)
        if self._engine is None:
            self._nursery.give_up(
                self._maker
            )  # stopped, or it does not get on: nothing else would end this one's start
        elif self._handle >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _hear(self, timeout: float | None) -> None:
        """What there is to hear of it; with a timeout until it has ended, or so long."""
        if not self._lock.acquire(blocking=timeout != 0.0):
            return  # another thread waits for its end
        try:
            while self.returncode is None and _is_readable(self._news.fileno(), timeout):
                data = self._news.recv(NUMBER.size)
                if len(data) < NUMBER.size:
                    self._lost(timeout)
                    return
                (number,) = NUMBER.unpack(data)
                if self._engine is None:
                    self._engine = number
                    with suppress(OSError):
                        self._handle = os.pidfd_open(number)
                else:
                    self._end(number)
        finally:
            self._lock.release()

    def _lost(self, timeout: float | None) -> None:
        """Who forked it is gone, so that nobody tells how it ends."""
        if self._handle < 0 or _is_readable(self._handle, timeout):
            self._end(self._maker.poll() or -signal.SIGKILL)

    def _end(self, code: int) -> None:
        self.returncode = code
        self._news.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._nursery._ended(self)


def _is_readable(descriptor: int, timeout: float | None) -> bool:
    """Within so many seconds. Not `select`, which knows no number above 1023: each connection takes one."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout is None else 1000 * timeout))
