"""Steps that are laid out while the one before computes: nothing changes but the time, whatever happens in between.

All engine tests can run so: `SENSORIUM_TEST_OVERLAP=1 pytest tests/unit/engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.disturbances import CASES, Disturb, chats
from support.engine_harness import Bench, Result, bench, random_prompt, request

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine.faults import Faults
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest


class Count:
    """Of a bench's steps: how many were laid out, how many of them beforehand, and how many of these were used."""

    def __init__(self, engine: Bench) -> None:
        self.prepared = self.built = self.steps = 0
        builder, runner = engine.engine.runner._builder, engine.engine.runner
        prepare, build, batch = builder.prepare, builder.build, runner._batch

        def counted(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def call(argument: Any) -> Any:
                setattr(self, name, getattr(self, name) + 1)
                return function(argument)

            return call

        builder.prepare = counted("prepared", prepare)  # type: ignore[method-assign, assignment]
        builder.build = counted("built", build)  # type: ignore[method-assign, assignment]
        runner._batch = counted("steps", batch)  # type: ignore[method-assign, assignment]

    @property
    def used(self) -> int:
        return self.steps - self.built


def run(
    model: Model,
    requests: list[EngineRequest],
    disturb: Disturb | None,
    *,
    overlaps: bool,
    faults: str = "",
    **options: Any,
) -> tuple[list[Result], Count]:
    engine = bench(model, faults=(found := Faults(faults)), **options)
    engine.engine.runner.overlaps = overlaps
    engine.engine.runner._faults = found
    count = Count(engine)

    def before(step: int) -> None:
        if disturb is not None:
            disturb(engine, step)

    return engine.run(*requests, before_step=before), count


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes(model: Model, case: str) -> None:
    disturb, sampling, options = CASES[case]
    requests = chats(**sampling)
    expected, plain = run(model, requests, disturb, overlaps=False, **options)
    got, count = run(model, requests, disturb, overlaps=True, **options)
    assert [(one.tokens, one.reason, one.error, one.preemptions) for one in got] == [
        (one.tokens, one.reason, one.error, one.preemptions) for one in expected
    ]
    assert [one.logprobs for one in got] == [one.logprobs for one in expected]
    assert (plain.prepared, plain.used) == (0, 0)
    assert count.steps == plain.steps
    assert count.used > 3
    if disturb is not None:
        assert count.prepared > count.used  # what was foreseen did not come


def test_a_late_end_is_not_foreseen(model: Model) -> None:
    """A stop token ends a sequence whose next step is laid out already; the others' tokens are not touched by that."""
    requests = chats()
    free, _ = run(model, requests, None, overlaps=False)
    stop = free[1].tokens[9]
    requests = chats(stop_token_ids=(stop,))
    expected, _ = run(model, requests, None, overlaps=False)
    got, count = run(model, requests, None, overlaps=True)
    assert [(one.tokens, one.reason) for one in got] == [(one.tokens, one.reason) for one in expected]
    assert {one.reason for one in got} > {"stop"}
    assert count.prepared > count.used > 3


def test_an_end_by_length_is_foreseen(model: Model) -> None:
    [result], count = run(model, [request(random_prompt(1, 30), 24)], None, overlaps=True)
    assert len(result.tokens) == 24
    assert (count.steps, count.prepared, count.used) == (24, 23, 23)  # all steps but that of the prompt


def test_layers_with_windows(tmp_path: Path) -> None:
    checkpoints.make_gemma3_text(tmp_path, sliding_window=8)
    model = load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    requests = [request(random_prompt(i, 10 + 9 * i), 50) for i in range(4)]
    expected, _ = run(model, requests, None, overlaps=False)
    got, count = run(model, requests, None, overlaps=True)
    assert [one.tokens for one in got] == [one.tokens for one in expected]
    assert count.used > 40
