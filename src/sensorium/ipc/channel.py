"""The engine's end of the socket to the HTTP process."""

from __future__ import annotations

import logging
import os
import socket
import threading
from queue import Empty, SimpleQueue

from sensorium.ipc import messages
from sensorium.ipc.messages import Kind, ProtocolError
from sensorium.ipc.transfers import Arriving

logger = logging.getLogger("sensorium.engine")


class Channel:
    """The engine's end of the socket. A thread reads, so that a request's pixels arrive while a step runs."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._inbox: SimpleQueue[tuple[int, memoryview]] = SimpleQueue()
        self._sending = threading.Lock()
        self._arriving = Arriving()

    def start(self) -> None:
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()

    def _read(self) -> None:
        """Until the other side is gone; then there is nothing left to do for this process, whatever it is doing."""
        try:
            while True:
                if (message := self._next()) is not None:
                    self._arrived(*message)
                del message  # it may be large, and the next one may be long in coming
        except (OSError, EOFError):
            self._ended()
        except ProtocolError as error:
            logger.critical("the connection to the server is broken: %s", error)
            os._exit(1)
        except BaseException:  # no memory for a frame, say: a process that hears nothing must not stay
            logger.critical("the connection to the server cannot be read", exc_info=True)
            os._exit(1)

    def _arrived(self, kind: int, payload: memoryview) -> None:
        self._inbox.put((kind, payload))

    def _ended(self) -> None:
        os._exit(0)

    def receive(self) -> tuple[int, memoryview]:
        """The next frame, read directly; only before `start`."""
        size, kind = messages.parse_head(self._exactly(messages.HEAD_BYTES))
        return kind, self._exactly(size)

    def _next(self) -> tuple[int, memoryview] | None:
        """Read a frame. None if it was not the last of its message."""
        size, kind = messages.parse_head(self._exactly(messages.HEAD_BYTES))
        if kind == Kind.PART:
            request_id = messages.parse_part_head(self._exactly(messages.PART_HEAD_BYTES))
            whole = self._arriving.fill(request_id, size - messages.PART_HEAD_BYTES, self._fill)
            return None if whole is None else (Kind.REQUEST, whole)
        payload = self._exactly(size)
        if kind == Kind.BEGIN:
            self._arriving.begin(payload)
        elif kind == Kind.DROP:
            self._arriving.drop(payload)
        else:
            return kind, payload
        return None

    def _exactly(self, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        self._fill(view)
        return view

    def _fill(self, view: memoryview) -> None:
        size = len(view)
        filled = 0
        while filled < size:
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count

    def poll(self, *, wait: bool, patience_s: float | None = None) -> list[tuple[int, memoryview]]:
        """Frames that have arrived; with `wait` at least one, or none where it takes longer than `patience_s`."""
        frames: list[tuple[int, memoryview]] = []
        try:
            if wait:
                frames.append(self._inbox.get(timeout=patience_s))
            while True:
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
            self._ended()

    def beat(self) -> None:
        self.send(messages.frame(Kind.BEAT))
