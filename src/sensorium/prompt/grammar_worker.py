"""A disposable process that tries whether grammars of requests compile: `python -m sensorium.prompt.grammar_worker
MEMORY_BYTES CPU_S`. What takes too much time, memory or stack ends the process, and with it nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from sensorium.prompt.forms import Form
from sensorium.prompt.grammar_check import FormRefused, Names, checked
from sensorium.system.priority import stand_back
from sensorium.workers.child import lock_in, parent_link
from sensorium.workers.frames import JOB, READY, REFUSED, RESULT, FrameError, FrameSocket, bytes_frame, record_frame

MAX_PAYLOAD_BYTES = 64 << 20  # the parent's word
STACK_BYTES = 8 << 20  # less than the engine's thread has, for the same work


def prepare(arguments: list[str]) -> None:
    checked(Form("json", '{"type": "object", "properties": {"a": {"pattern": "b"}}}', ""), Names())


def main(arguments: list[str]) -> None:
    memory_bytes, cpu_s = int(arguments[0]), float(arguments[1])
    parent = parent_link()
    stand_back()
    prepare(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    if most in (resource.RLIM_INFINITY, -1) or most > STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, most))
    lock_in(memory_bytes)
    os.dup2(1, 2)  # what the library says when it is ended is nobody's business
    try:
        parent.send_record(READY, {})
        while True:
            serve_one(parent, cpu_s)
    except FrameError:
        pass  # the parent has closed its end


def serve_one(parent: FrameSocket, cpu_s: float) -> None:
    kind, length = parent.receive_head()
    if kind != JOB:
        raise FrameError("expected a job")
    parent.receive_record(length)
    job = json.loads(parent.receive_bytes(MAX_PAYLOAD_BYTES))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends this process
    reply = answered(job)
    signal.setitimer(signal.ITIMER_PROF, 0)
    parent.send(reply)


def answered(job: dict[str, Any]) -> bytes:
    """The frame that answers a job."""
    try:
        kind, source = checked(Form(**job["form"]), Names(**job["names"]))
    except FormRefused as error:
        return record_frame(REFUSED, {"path": error.path, "reason": error.reason})
    return bytes_frame(json.dumps({"kind": kind, "source": source}).encode(), RESULT)


if __name__ == "__main__":
    main(sys.argv[1:])
