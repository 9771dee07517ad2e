"""Where chat templates run: in processes that are bounded in time and memory, apart for those that requests bring."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sensorium.errors import UnavailableError
from sensorium.prompt.inspection import (
    MAX_RENDERED_CHARS,
    Inspection,
    TemplateExhausted,
    TemplateFailed,
    TemplateInvalid,
    TemplateRefused,
)
from sensorium.workers.crew import Crew, Reply, WorkerLost
from sensorium.workers.frames import JOB, RESULT, bytes_frame, record_frame
from sensorium.workers.process import WorkerProcess

CPU_S = 1.5  # of one job
DEADLINE_S = 4.0  # of one job, on a machine that has others to do
MEMORY_BYTES = 256 << 20  # beyond what a worker has after its imports
MAX_REPLY_BYTES = 5 * MAX_RENDERED_CHARS
INSPECT, RENDER = record_frame(JOB, {"op": "inspect"}), record_frame(JOB, {"op": "render"})
FAILURES: dict[str, type[Exception]] = {
    "refused": TemplateRefused,
    "invalid": TemplateInvalid,
    "exhausted": TemplateExhausted,
}


class RenderPool:
    """Implements `Renderer`. UnavailableError where a worker was stopped or killed from outside."""

    def __init__(
        self, *, cpu_s: float = CPU_S, deadline_s: float = DEADLINE_S, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        def crew(role: str, fewest: int, most: int, patience_s: float | None = None) -> Crew:
            start = partial(WorkerProcess.start, "sensorium.prompt.render_worker", role, memory_bytes, cpu_s)
            return Crew(
                start,
                deadline_s=deadline_s,
                max_reply_bytes=MAX_REPLY_BYTES,
                fewest=fewest,
                most=most,
                patience_s=patience_s,
            )

        self._own = crew("operators", 2, 8)
        self._foreign = crew("foreign", 1, 4, deadline_s)

    @property
    def pids(self) -> list[int]:
        return [*self._own.pids, *self._foreign.pids]

    def start_early(self) -> None:
        """Start what the first requests need; it imports while the caller goes on."""
        self._own.start_early()

    def inspect_now(self, source: str, probes: Sequence[Mapping[str, Any]]) -> Inspection:
        try:
            return _inspection(self._own.ask_now(_frames(INSPECT, source, json.dumps(probes).encode())))
        except WorkerLost as lost:
            raise _failure(lost) from None

    async def inspect(self, source: str, probes: Sequence[Mapping[str, Any]], tenant: bytes) -> Inspection:
        try:
            return _inspection(await self._foreign.ask(_frames(INSPECT, source, json.dumps(probes).encode()), tenant))
        except WorkerLost as lost:
            raise _failure(lost) from None

    async def render(self, source: str, variables: bytes, tenant: bytes, *, is_foreign: bool = False) -> str:
        crew = self._foreign if is_foreign else self._own
        try:
            return _text(await crew.ask(_frames(RENDER, source, variables), tenant))
        except WorkerLost as lost:
            raise _failure(lost) from None

    async def aclose(self) -> None:
        await self._own.aclose()
        await self._foreign.aclose()


def _frames(job: bytes, source: str, variables: bytes) -> bytes:
    return job + bytes_frame(source.encode("utf-8", "surrogatepass")) + bytes_frame(variables)


def _text(reply: Reply) -> str:
    kind, body = reply
    if kind == RESULT:
        return body.decode("utf-8", "replace")
    record = json.loads(body)
    raise FAILURES.get(record["problem"], TemplateFailed)(record["text"])


def _inspection(reply: Reply) -> Inspection:
    found = json.loads(_text(reply))
    return Inspection(**{name: tuple(values) for name, values in found.items()})


def _failure(lost: WorkerLost) -> Exception:
    return TemplateExhausted() if lost.by_job else UnavailableError("The prompt could not be rendered in time.")
