"""A disposable process that compiles and renders chat templates: `python -m sensorium.prompt.render_worker ROLE
MEMORY_BYTES CPU_S`.

A job that takes more processor time than it may ends the process, whoever is still there to watch it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from importlib import import_module
from typing import Any

from jinja2 import Template

from sensorium.prompt import sandbox
from sensorium.prompt.inspection import TemplateInvalid
from sensorium.workers.child import lock_in, parent_link
from sensorium.workers.frames import JOB, READY, REFUSED, RESULT, FrameError, FrameSocket, bytes_frame, record_frame

MAX_PAYLOAD_BYTES = 1 << 30  # the parent's word; its memory bounds what it sends
MAX_REASON_CHARS = 2000
IMPORTED_LATE = ("jinja2.debug", "textwrap", "pprint", "html", "encodings.idna", "encodings.punycode")
"""By Jinja, in the middle of its work, when no file can be opened any more."""
OPERATORS, FOREIGN = "operators", "foreign"
"""Roles: templates of the operator's, which stay compiled, and of requests, which do not."""


class Templates:
    """Compiled templates. Only the operator's are kept: of a request's, timing would tell who else sent it."""

    def __init__(self, role: str) -> None:
        self._environment = sandbox.new_environment()
        compiled: Callable[[str], Template] = self._environment.from_string
        self._compiled = lru_cache(maxsize=8)(compiled) if role == OPERATORS else compiled

    def inspect(self, source: str, variables: list[dict[str, Any]]) -> str:
        return json.dumps(asdict(sandbox.inspect(self._environment, source, variables)))

    def render(self, source: str, variables: dict[str, Any]) -> str:
        return sandbox.render(self._compiled(source), variables)


def prepare(arguments: list[str]) -> None:
    for module in IMPORTED_LATE:
        import_module(module)


def main(arguments: list[str]) -> None:
    role, memory_bytes, cpu_s = arguments[0], int(arguments[1]), float(arguments[2])
    parent = parent_link()
    prepare(arguments)
    templates = Templates(role)
    templates.render("{{ strftime_now('%c %Z') }}", {})  # reads the time zone
    lock_in(memory_bytes)
    os.dup2(1, 2)  # nothing that a template brings Python to say reaches the log
    try:
        parent.send_record(READY, {})
        while True:
            serve_one(parent, templates, cpu_s)
    except FrameError:
        pass  # the parent has closed its end


def serve_one(parent: FrameSocket, templates: Templates, cpu_s: float) -> None:
    kind, length = parent.receive_head()
    if kind != JOB:
        raise FrameError("expected a job")
    job = parent.receive_record(length)
    work = templates.inspect if job["op"] == "inspect" else templates.render
    source, variables = parent.receive_bytes(MAX_PAYLOAD_BYTES), parent.receive_bytes(MAX_PAYLOAD_BYTES)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends this process
    try:
        reply = bytes_frame(work(source.decode("utf-8", "surrogatepass"), json.loads(variables)).encode(), RESULT)
    except Exception as error:  # whatever a template's program raises ends its job, not this process
        reply = record_frame(REFUSED, reason_of(error))
    signal.setitimer(signal.ITIMER_PROF, 0)
    parent.send(reply)


def reason_of(error: Exception) -> dict[str, str]:
    if isinstance(error, sandbox.TemplateRefusal):
        return {"problem": "refused", "text": str(error)[:MAX_REASON_CHARS]}
    if isinstance(error, MemoryError | sandbox.TemplateTooLarge):
        return {"problem": "exhausted", "text": ""}
    if isinstance(error, TemplateInvalid):
        return {"problem": "invalid", "text": str(error)[:MAX_REASON_CHARS]}
    return {"problem": "failed", "text": ""}


if __name__ == "__main__":
    main(sys.argv[1:])
