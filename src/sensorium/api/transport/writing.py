"""What clients have taken of their answers, so that connections of those who do not read or are not there can end.

A connection's own buffer says nothing for long: the system takes megabytes before it fills. What counts is what the
other side has taken of what was written.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sensorium.api.transport.connection import Connection

_LOOK_S = 0.5
_MAX_UNSENT_BYTES = 128 * 1024
_MAX_SEGMENT_BYTES = 4096


def prepare(listener: socket.socket) -> None:
    """Settings that a TCP listener's connections inherit: little is handed to the system before it is sent, and a slow
    reader is seen to read in small steps on the loopback interface too, whose segments have 64 KiB."""
    if listener.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _MAX_SEGMENT_BYTES)


class OutputProgress:
    """How much of a connection's output its client has taken, and since when it has taken nothing."""

    def __init__(self, transport: asyncio.Transport, now_s: float) -> None:
        self._transport = transport
        self._socket = transport.get_extra_info("socket")
        self._taken = 0
        self._since_s = now_s
        self.written = 0  # bytes, in all

    def stalled_s(self, now_s: float) -> float:
        """Seconds for which bytes have been waiting and none was taken."""
        waiting = self._transport.get_write_buffer_size() + self._queued_bytes()
        taken = self.written - waiting
        if not waiting or taken > self._taken:
            self._taken, self._since_s = taken, now_s
        return now_s - self._since_s

    def is_broken(self) -> bool:
        """Has the other side refused what was sent? The event loop does not look while it reads nothing."""
        try:
            return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.ECONNRESET, errno.EPIPE)
        except OSError:
            return True

    def _queued_bytes(self) -> int:
        """Bytes that the system has and the other side has not confirmed."""
        try:
            answer = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except OSError:
            return 0
        return int(struct.unpack("i", answer)[0])


async def watch(connections: Callable[[], Iterable[Connection]]) -> None:
    """Look at every connection at times, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_LOOK_S)
        now_s = loop.time()
        for connection in tuple(connections()):
            connection.look(now_s)
