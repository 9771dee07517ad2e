"""The few bytes that cross between the HTTP process and a worker: [kind u8][length u64] and that many bytes.

Neither side believes the other's lengths without a bound, and no object is ever deserialised: small records are JSON
of numbers and short strings, arrays are raw bytes behind a record that gives their shape.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Literal

HEAD = struct.Struct("<BQ")
MAX_RECORD_BYTES = 64 * 1024
WATCH_S = 1.0

Kind = Literal[1, 2, 3, 4, 5]
READY: Kind = 1  # worker: {} once it has imported and locked itself in
JOB: Kind = 2  # parent: record, followed by one BYTES
BYTES: Kind = 3  # raw
RESULT: Kind = 4  # worker: record with "shape" and "dtype" where BYTES follow until the array is full
REFUSED: Kind = 5  # worker: {"problem", "text"}; the worker goes on


class FrameError(Exception):
    """The other side is gone, too late, or says what it must not."""


def record_frame(kind: Kind, record: dict[str, Any]) -> bytes:
    return bytes_frame(json.dumps(record).encode(), kind)


def bytes_frame(data: bytes, kind: Kind = BYTES) -> bytes:
    return HEAD.pack(kind, len(data)) + data


class Gone(FrameError):
    """Its end of the socket is closed."""


class Late(FrameError):
    """The deadline has passed."""


class Stopped(FrameError):
    """The process is stopped (SIGSTOP) and will not answer."""


class FrameSocket:
    """One end of a socket pair with blocking, deadline-bound whole reads and writes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.watch: Callable[[], None] = lambda: None  # called every second of waiting; may raise FrameError
        self._deadline: float | None = None

    def set_deadline(self, seconds: float | None) -> None:
        """For everything until the next call."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def send_record(self, kind: Kind, record: dict[str, Any]) -> None:
        self.send(record_frame(kind, record))

    def send_bytes(self, data: bytes | memoryview, kind: Kind = BYTES) -> None:
        view = memoryview(data).cast("B")
        self.send(HEAD.pack(kind, len(view)))
        self.send(view)

    def receive_head(self) -> tuple[int, int]:
        """(kind, length) of the next frame."""
        kind, length = HEAD.unpack(self._receive(HEAD.size))
        return kind, length

    def receive_record(self, length: int) -> dict[str, Any]:
        if length > MAX_RECORD_BYTES:
            raise FrameError("record too long")
        try:
            record = json.loads(self._receive(length))
        except (ValueError, RecursionError):
            raise FrameError("record is not JSON") from None
        if not isinstance(record, dict):
            raise FrameError("record is not an object")
        return record

    def receive_bytes(self, max_bytes: int) -> bytes:
        kind, length = self.receive_head()
        if kind != BYTES or length > max_bytes:
            raise FrameError("unexpected frame")
        return bytes(self._receive(length))

    def fill(self, view: memoryview) -> None:
        """Read exactly as many bytes as the view has."""
        while view:
            self._arm()
            try:
                got = self.sock.recv_into(view)
            except TimeoutError:
                self.watch()
                continue
            except OSError:
                raise Gone from None
            if not got:
                raise Gone
            view = view[got:]

    def _receive(self, length: int) -> bytearray:
        data = bytearray(length)
        self.fill(memoryview(data))
        return data

    def send(self, data: bytes | memoryview) -> None:
        """One frame or several, as they are."""
        view = memoryview(data)
        while view:
            self._arm()
            try:
                view = view[self.sock.send(view) :]
            except TimeoutError:
                self.watch()
            except OSError:
                raise Gone from None

    def _arm(self) -> None:
        if self._deadline is None:
            self.sock.settimeout(None)
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Late
        self.sock.settimeout(min(left, WATCH_S))
