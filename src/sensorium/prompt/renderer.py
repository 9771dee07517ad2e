"""Where chat templates run: in processes that are bounded in time and memory, apart for those that requests bring."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sensorium.config import PROMPT_MEMORY_BYTES
from sensorium.errors import OverloadedError, RateLimitError, UnavailableError
from sensorium.prompt.inspection import (
    MAX_RENDERED_CHARS,
    Inspection,
    TemplateExhausted,
    TemplateFailed,
    TemplateInvalid,
    TemplateRefused,
)
from sensorium.system.nursery import Nursery
from sensorium.workers.connection import JobFailed, Reply, TurnMissed, Unanswered
from sensorium.workers.crew import Crew, Size
from sensorium.workers.frames import JOB, RESULT, bytes_frame, record_frame
from sensorium.workers.process import WorkerProcess

OWN, FOREIGN = Size(2, 8, turn_s=3.0, total_s=4.5), Size(2, 4, turn_s=1.6, total_s=2.2)
"""Workers for the operator's templates, and for those of requests: of the latter each takes two jobs, one that looks at
it and one that renders."""
OWN_CPU_S, FOREIGN_CPU_S = 1.5, 0.5  # of one job
MEMORY_BYTES = 256 << 20  # beyond what a worker has after its imports
LEAST_MEMORY_BYTES = 24 << 20  # enough for a prompt of four million characters
OWN_PART, FOREIGN_PART = 0.45, 0.2  # of the memory for prompts; the rest is for grammars
MAX_REPLY_BYTES = 5 * MAX_RENDERED_CHARS
INSPECT, RENDER = record_frame(JOB, {"op": "inspect"}), record_frame(JOB, {"op": "render"})
FAILURES: dict[str, type[Exception]] = {
    "refused": TemplateRefused,
    "invalid": TemplateInvalid,
    "exhausted": TemplateExhausted,
}


class RenderPool:
    """Implements `Renderer`. UnavailableError where a worker was stopped or killed from outside, RateLimitError where a
    key's own jobs left its others no time, OverloadedError where everybody's did."""

    def __init__(
        self,
        *,
        cpu_s: float | None = None,
        own: Size = OWN,
        foreign: Size = FOREIGN,
        memory_bytes: int = PROMPT_MEMORY_BYTES,
        nursery: Nursery | None = None,
    ) -> None:
        """`cpu_s` of one job, else `OWN_CPU_S` and `FOREIGN_CPU_S`; `memory_bytes` are the flag --prompt-memory.
        `nursery` is where workers come from that share what they import."""

        def crew(role: str, size: Size, part: float, limit_s: float) -> Crew:
            size, each = size.within(int(part * memory_bytes), MEMORY_BYTES, LEAST_MEMORY_BYTES)
            arguments = (role, each, cpu_s or limit_s)
            start = partial(WorkerProcess.start, "sensorium.prompt.render_worker", *arguments, nursery=nursery)
            return Crew(start, size, max_reply_bytes=MAX_REPLY_BYTES, rests=nursery is not None)

        self._own = crew("operators", own, OWN_PART, OWN_CPU_S)
        self._foreign = crew("foreign", foreign, FOREIGN_PART, FOREIGN_CPU_S)

    @property
    def pids(self) -> list[int]:
        return [*self._own.pids, *self._foreign.pids]

    def start_early(self) -> None:
        """Start what the first requests need; it imports while the caller goes on."""
        self._own.start_early()

    def inspect_now(self, source: str, probes: Sequence[Mapping[str, Any]]) -> Inspection:
        try:
            return _inspection(self._own.ask_now(_frames(INSPECT, source, json.dumps(probes).encode())))
        except Unanswered as failure:
            raise _failure(failure) from None

    async def inspect(self, source: str, probes: Sequence[Mapping[str, Any]], tenant: bytes) -> Inspection:
        try:
            return _inspection(await self._foreign.ask(_frames(INSPECT, source, json.dumps(probes).encode()), tenant))
        except Unanswered as failure:
            raise _failure(failure) from None

    async def render(self, source: str, variables: bytes, tenant: bytes, *, is_foreign: bool = False) -> str:
        crew = self._foreign if is_foreign else self._own
        try:
            return _text(await crew.ask(_frames(RENDER, source, variables), tenant))
        except Unanswered as failure:
            raise _failure(failure) from None

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


def _failure(failure: Unanswered) -> Exception:
    if isinstance(failure, JobFailed):
        return TemplateExhausted()
    if isinstance(failure, TurnMissed):
        if failure.by_key:
            return RateLimitError("Too many prompts of this key are being rendered: wait for some of their answers.")
        return OverloadedError("Too many prompts are being rendered.")
    return UnavailableError("The prompt could not be rendered in time.")
