"""What may happen to an engine's requests between two steps, and requests that it may happen to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sensorium.types import EngineRequest
from support.engine_harness import Bench, Result, image_request, random_prompt, request

Disturb = Callable[[Bench, int], None]


def chats(**sampling: Any) -> list[EngineRequest]:
    return [*(request(random_prompt(i, 5 + 6 * i), 40, **sampling) for i in range(5)), image_request(2, 30, **sampling)]


def preempt(engine: Bench, step: int) -> None:
    scheduler = engine.engine.scheduler
    if step % 9 == 8 and scheduler.decoding and scheduler.num_running > 1:
        scheduler._preempt(scheduler.decoding[0])


def abort(engine: Bench, step: int) -> None:
    """One that decodes, as a message says between two steps."""
    scheduler = engine.engine.scheduler
    if step in (8, 14, 15) and scheduler.decoding:
        scheduler.abort(scheduler.decoding[-1].id)


def arrive(engine: Bench, step: int) -> None:
    if step in (7, 20):
        engine.results[9_000_000 + step] = Result()
        late = request(random_prompt(step, 21), 12)
        engine.core._add(EngineRequest(9_000_000 + step, late.prompt, late.sampling))


CASES: dict[str, tuple[Disturb | None, dict[str, Any], dict[str, Any]]] = {
    "undisturbed": (None, {}, {}),
    "seeds and log-probabilities": (None, {"temperature": 0.8, "top_p": 0.9, "logprobs": 2}, {}),
    "preempted": (preempt, {"temperature": 0.8}, {}),
    "aborted": (abort, {}, {}),
    "others come": (arrive, {}, {}),
    "few blocks": (None, {}, {"kv_tokens": 128}),
    "chunks": (None, {}, {"max_num_batched_tokens": 16}),
    "drafts": (None, {}, {"speculative_tokens": 4}),
    "a step fails": (None, {}, {"faults": "step:raise:12"}),
    "a step fails while it is computed": (None, {}, {"faults": "sample:raise:12"}),
}
"""(what happens, sampling of the requests, options of the engine)"""
