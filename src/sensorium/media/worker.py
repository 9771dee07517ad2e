"""A disposable process that decodes media: `python -m sensorium.media.worker ROLE MEMORY_BYTES CPU_S`.

It can open neither files nor connections whatever a codec tries; memory and processor time are limited too. A file
that kills it costs one request.
"""

from __future__ import annotations

import resource
import sys

import numpy as np

from sensorium.media.decoders import Decoder, decoders_for
from sensorium.media.source import CRASHED, Refusal
from sensorium.system.malloc import return_large_blocks
from sensorium.workers.child import limit_memory, lock_in, parent_link
from sensorium.workers.frames import JOB, READY, REFUSED, RESULT, FrameError, FrameSocket


def prepare(arguments: list[str]) -> None:
    decoders_for(arguments[0])


def main(arguments: list[str]) -> None:
    role, memory_bytes, cpu_s = arguments[0], int(arguments[1]), int(arguments[2])
    parent = parent_link()
    decoders = decoders_for(role)
    return_large_blocks()
    taken_bytes = lock_in(memory_bytes)
    try:
        parent.send_record(READY, {})
        while True:
            serve_one(parent, decoders, cpu_s, taken_bytes)
    except FrameError:
        pass  # the parent has closed its end


def serve_one(parent: FrameSocket, decoders: dict[str, Decoder], cpu_s: int, taken_bytes: int) -> None:
    kind, length = parent.receive_head()
    if kind != JOB:
        raise FrameError("expected a job")
    job = parent.receive_record(length)
    limit_memory(taken_bytes + job.get("memory_bytes", sys.maxsize - taken_bytes))
    payload = parent.receive_bytes(sys.maxsize)
    # The parent kills a late worker; this tells it from one that was kept from computing.
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
    except FrameError:
        raise
    except Exception as error:  # a library may raise anything of its own for a damaged file
        print(f"decode worker: {type(error).__name__} in {job['op']}", file=sys.stderr)
        parent.send_record(REFUSED, {"problem": "parse", "text": CRASHED})


if __name__ == "__main__":
    main(sys.argv[1:])
