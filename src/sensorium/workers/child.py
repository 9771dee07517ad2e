"""What a disposable process does before it takes work: it cuts itself off from everything but its parent.

Its standard input is a socket to its parent and it can open nothing else: after its imports the limit on descriptors
is the three it holds, so neither files nor connections come into being whatever its work tries.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from sensorium.system.priority import end_first
from sensorium.workers.frames import FrameSocket

PR_SET_PDEATHSIG = 1


def parent_link() -> FrameSocket:
    """The socket to the parent. From here on the signals to its process group, which may drain, end only the parent,
    and the parent's end, however it comes, is this process's: an idle one sees it at the socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        end_first()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return FrameSocket(socket.socket(fileno=0))


def lock_in(memory_bytes: int) -> int:
    """From here on: no new descriptor (so no file, no connection), no core dump, and at most so much more memory.
    The address space that is taken already, for `limit_memory`."""
    os.closerange(3, 1024)
    taken_bytes = address_space_bytes()
    if sys.platform == "linux":  # elsewhere address space is not what it says
        resource.setrlimit(resource.RLIMIT_AS, (taken_bytes + memory_bytes, taken_bytes + memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return taken_bytes


def limit_memory(limit_bytes: int) -> None:
    """Address space of the next job, within what this process may have."""
    if sys.platform == "linux":
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(limit_bytes, most), most))


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
