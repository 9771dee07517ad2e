"""A disposable process that decodes media: `python -m sensorium.media.worker ROLE MEMORY_BYTES CPU_S`.

Its standard input is a socket to its parent and it can open nothing else: after its imports the limit on descriptors
is the three it holds, so neither files nor connections come into being whatever a codec tries. Memory and processor
time are limited too. A file that kills it costs one request.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from pathlib import Path

import numpy as np

from sensorium.media.decoders import Decoder, decoders_for
from sensorium.media.frames import JOB, READY, REFUSED, RESULT, FrameError, FrameSocket
from sensorium.media.source import Refusal


def main(arguments: list[str]) -> None:
    role, memory_bytes, cpu_s = arguments[0], int(arguments[1]), int(arguments[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group, but meant for the parent, which may drain
        signal.signal(number, signal.SIG_IGN)
    parent = FrameSocket(socket.socket(fileno=0))
    decoders = decoders_for(role)
    lock_in(memory_bytes)
    parent.send_record(READY, {})
    try:
        while True:
            serve_one(parent, decoders, cpu_s)
    except FrameError:
        pass  # the parent has closed its end


def lock_in(memory_bytes: int) -> None:
    """From here on: no new descriptor (so no file, no connection), no core dump, and at most so much more memory."""
    os.closerange(3, 1024)
    if sys.platform == "linux":  # elsewhere address space is not what it says
        limit = address_space_bytes() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve_one(parent: FrameSocket, decoders: dict[str, Decoder], cpu_s: int) -> None:
    kind, length = parent.receive_head()
    if kind != JOB:
        raise FrameError("expected a job")
    job = parent.receive_record(length)
    payload = parent.receive_bytes(sys.maxsize)
    # The parent kills a late worker; this is for the case that the parent is gone.
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + cpu_s, resource.RLIM_INFINITY))
    try:
        decoded = decoders[job["op"]](payload, job)
        record = dict(decoded.record)
        if decoded.shape is not None:
            record.update(shape=decoded.shape, dtype=decoded.dtype)
        parent.send_record(RESULT, record)
        for piece in decoded.pieces:
            parent.send_bytes(np.ascontiguousarray(piece).data)
    except Refusal as refusal:  # also between two pieces
        parent.send_record(REFUSED, {"problem": refusal.problem, "text": refusal.text})


if __name__ == "__main__":
    main(sys.argv[1:])
