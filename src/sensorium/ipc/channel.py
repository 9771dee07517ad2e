"""The engine's end of the socket to the HTTP process."""

from __future__ import annotations

import logging
import os
import socket
import threading
from queue import Empty, SimpleQueue

from sensorium.ipc import messages
from sensorium.ipc.messages import Kind, ProtocolError

logger = logging.getLogger("sensorium.engine")


class Channel:
    """The engine's end of the socket. A thread reads, so that a request's pixels arrive while a step runs."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._inbox: SimpleQueue[tuple[int, memoryview]] = SimpleQueue()
        self._sending = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()

    def _read(self) -> None:
        """Until the other side is gone; then there is nothing left to do for this process, whatever it is doing."""
        try:
            while True:
                self._inbox.put(self.receive())
        except (OSError, EOFError):
            os._exit(0)
        except ProtocolError as error:
            logger.critical("the connection to the server is broken: %s", error)
            os._exit(1)
        except BaseException:  # no memory for a frame, say: a process that hears nothing must not stay
            logger.critical("the connection to the server cannot be read", exc_info=True)
            os._exit(1)

    def receive(self) -> tuple[int, memoryview]:
        """The next frame, read directly; only before `start`, or by its thread."""
        size, kind = messages.parse_head(self._exactly(messages.HEAD_BYTES))
        return kind, self._exactly(size)

    def _exactly(self, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        filled = 0
        while filled < size:
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count
        return view

    def poll(self, *, wait: bool) -> list[tuple[int, memoryview]]:
        """Frames that have arrived; with `wait` at least one."""
        frames = [self._inbox.get()] if wait else []
        while True:
            try:
                frames.append(self._inbox.get_nowait())
            except Empty:
                return frames

    def wake(self) -> None:
        """End a wait of `poll`; by any thread."""
        self._inbox.put((Kind.WAKE, memoryview(b"")))

    def send(self, frame: bytes) -> None:
        """By any thread; waits while the other side does not read."""
        try:
            with self._sending:
                self._socket.sendall(frame)
        except OSError:
            os._exit(0)

    def beat(self) -> None:
        self.send(messages.frame(Kind.BEAT))
