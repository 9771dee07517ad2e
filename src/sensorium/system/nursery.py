"""Processes that share what they import: one imports it, and forks a child for everything that is to be run.

An engine that imports torch for itself has 150 MB of its own before it has a weight, and takes a second of processor
time to get there; a worker that decodes images has 20 MB. Only the first is paid here; the process ends with its last
child. What forks is `system/parent.py`. For Linux.
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
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic

STDERR = 2
NEWS = struct.Struct("=Bi")
"""What is written of each child: BORN and its process id, by itself and by who forked it; ENDED and how (negative: the
signal)."""
BORN, ENDED = 0, 1
NOTHING = b"\0"  # the order of a child that is told by nothing but its socket what to do


class Nursery:
    """The process that forks, as who asks it sees it: `python -m MODULE --fd N`. Any thread may use it."""

    def __init__(
        self, module: str, environment: Mapping[str, str], *, stdout: int = STDERR, patience_s: float = 0.0
    ) -> None:
        """A child that is killed before it was forked ends when it finds its socket closed. One that was asked for
        longer ago than `patience_s` ends whoever should fork it: it does not get on."""
        self.patience_s = patience_s
        self.ending = threading.Lock()
        """For who ends a process only if it is not the last: held from the look at `count` until it has ended."""
        self._module, self._environment, self._stdout = module, dict(environment), stdout
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = socket.socket()
        self._alive: set[ForkedProcess] = set()

    def spawn(self, sock: socket.socket, order: bytes = NOTHING) -> ForkedProcess:
        """A process that serves at this socket. Returns at once, though the one that forks it may still import."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            descriptors = [sock.fileno(), theirs.fileno()]
            try:
                maker = self._send(order, descriptors)
            except OSError:  # it has ended
                self._stop()
                maker = self._send(order, descriptors)
            forked = ForkedProcess(self, maker, ours)
            self._alive.add(forked)
        return forked

    @property
    def count(self) -> int:
        """Processes that run; with the last of them ends the one that forks."""
        with self._lock:
            return len(self._alive)

    def _send(self, order: bytes, descriptors: list[int]) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # an order is one message
            with theirs:
                # -P: nothing in the current folder takes the place of a module.
                command = [sys.executable, "-P", "-m", self._module, "--fd", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=self._stdout,
                    start_new_session=True,
                    env=self._environment,
                )
        socket.send_fds(self._socket, [order], descriptors)
        return self._process

    def _stop(self) -> None:
        """Its children go on, unless they end themselves; the next one has another process like it."""
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
    """What a `Popen` is to the process that started it, as far as engines' clients and workers' need that."""

    def __init__(self, nursery: Nursery, maker: subprocess.Popen[bytes], news: socket.socket) -> None:
        """`maker` is asked to fork it, and writes to `news`."""
        self.returncode: int | None = None
        self._nursery = nursery
        self._maker = maker
        self._news = news
        self._lock = threading.Lock()
        self._child: int | None = None  # its id, once it was forked
        self._asked_s = monotonic()
        self._handle = -1  # of the process, whoever has its id later

    @property
    def pid(self) -> int:
        """Until it is forked, of the process that works on that."""
        self._hear(0.0)
        return self._child or self._maker.pid

    def poll(self) -> int | None:
        self._hear(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. subprocess.TimeoutExpired if it still runs then."""
        self._hear(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("child", timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        self._hear(0.0)
        if self._child is None and self.returncode is None:
            if monotonic() - self._asked_s >= self._nursery.patience_s:
                self._nursery.give_up(self._maker)  # nothing else would end this one's start
            else:
                self._give_up()
        elif self._handle >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _give_up(self) -> None:
        with self._lock:
            if self.returncode is None:
                self._end(-signal.SIGKILL)

    def _hear(self, timeout: float | None) -> None:
        """What there is to hear of it; with a timeout until it has ended, or so long."""
        if not self._lock.acquire(blocking=timeout != 0.0):
            return  # another thread waits for its end
        try:
            while self.returncode is None and _is_readable(self._news.fileno(), timeout):
                data = self._news.recv(NEWS.size, socket.MSG_WAITALL)
                if len(data) < NEWS.size:
                    self._lost(timeout)
                    return
                kind, number = NEWS.unpack(data)
                if kind == ENDED:
                    self._end(number)
                elif self._child is None:
                    self._child = number
                    with suppress(OSError):
                        self._handle = os.pidfd_open(number)
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
