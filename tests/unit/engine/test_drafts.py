"""Steps that take several tokens of a decoding sequence: more tokens at a time, never other ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from support.engine_harness import Bench, Result, bench, random_prompt, request, tokens_of

from sensorium.engine.scheduler import Propose
from sensorium.models.base import Model
from sensorium.types import EngineRequest

LENGTHS = (3, 17, 32, 33)


def texts(max_tokens: int = 20, **sampling: Any) -> list[EngineRequest]:
    return [request(random_prompt(i, length), max_tokens, **sampling) for i, length in enumerate(LENGTHS)]


def knowing(known: Mapping[int, list[int]], wrong_at: int | None = None) -> Propose:
    """Drafts out of the known continuation of each prompt length; one place of four may be wrong."""

    def propose(seq: Any, most: int) -> list[int]:
        rest = known[seq.num_prompt][seq.num_outputs :][: min(most, 4)]
        return [token + 1 if place == wrong_at else token for place, token in enumerate(rest)]

    return propose


def drafted(model: Model, propose: Propose, **options: Any) -> tuple[Bench, list[list[int]]]:
    engine = bench(model, **options)
    engine.engine.scheduler.propose = propose
    steps: list[list[int]] = []
    launch = engine.engine.runner.launch

    def spy(plan: Any) -> Any:
        steps.append([count for _, count in plan.drafted])
        return launch(plan)

    engine.engine.runner.launch = spy  # type: ignore[method-assign]
    return engine, steps


def known_of(results: list[Result]) -> dict[int, list[int]]:
    return dict(zip(LENGTHS, tokens_of(results), strict=True))


@pytest.mark.parametrize("wrong_at", [None, 0, 2])
@pytest.mark.parametrize(("chunk", "preempted"), [(2048, False), (13, True)])
def test_same_tokens_as_one_at_a_time(model: Model, wrong_at: int | None, chunk: int, preempted: bool) -> None:
    expected = bench(model).run(*texts(logprobs=1))
    engine, steps = drafted(model, knowing(known_of(expected), wrong_at), max_num_batched_tokens=chunk)
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        if preempted and step % 5 == 4 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for _ in ("cold", "warm"):  # the blocks that drafts have filled are found again
        got = engine.run(*texts(logprobs=1), before_step=preempt)
        assert tokens_of(got) == tokens_of(expected)
        for mine, reference in zip(got, expected, strict=True):
            assert [one.token_id for one in mine.logprobs] == mine.tokens
            for a, b in zip(mine.logprobs, reference.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
    assert any(steps)
    if chunk == 2048 and wrong_at is None:
        assert len(steps) == 2 * 5  # of twenty tokens one comes with the prompt, then 5, 5, 5 and 4


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 5},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1, "frequency_penalty": 1.0, "min_tokens": 12},
    ],
)
def test_seeds_penalties_and_min_tokens_count_what_was_drafted(model: Model, sampling: dict[str, Any]) -> None:
    stop = bench(model).run(*texts(**sampling))[0].tokens[6]
    expected = bench(model).run(*texts(stop_token_ids=(stop,), **sampling))
    engine, steps = drafted(model, knowing(known_of(expected)))
    got = engine.run(*texts(stop_token_ids=(stop,), **sampling))
    assert [(one.tokens, one.reason) for one in got] == [(one.tokens, one.reason) for one in expected]
    assert any(steps)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 7, 20])
def test_the_end_comes_where_it_would_have(model: Model, max_tokens: int) -> None:
    """A stop token amid drafts, or the last token allowed: what was drafted behind it is not said."""
    free = bench(model).run(*texts())
    stop = free[1].tokens[3]
    expected = bench(model).run(*texts(max_tokens, stop_token_ids=(stop,)))
    engine, _ = drafted(model, knowing(known_of(free)))
    got = engine.run(*texts(max_tokens, stop_token_ids=(stop,)))
    assert [(one.tokens, one.reason) for one in got] == [(one.tokens, one.reason) for one in expected]


def test_a_small_cache_is_shared_all_the_same(model: Model) -> None:
    requests = [request(random_prompt(i, length), 60) for i, length in enumerate(LENGTHS)]
    expected = bench(model).run(*requests)
    engine, steps = drafted(model, knowing(known_of(expected)), kv_tokens=160)
    got = engine.run(*(request(random_prompt(i, length), 60) for i, length in enumerate(LENGTHS)))
    assert tokens_of(got) == tokens_of(expected)
    assert engine.engine.scheduler.preemptions > 0
    assert any(steps)


def test_the_long_context_begins_where_it_would_have(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "long_context_from", 40, raising=False)
    expected = bench(model).run(*texts())
    engine, _ = drafted(model, knowing(known_of(expected)))
    marks: list[tuple[int, bool]] = []
    forward = model.forward

    def spy(hidden: Any, positions: Any, cache: Any, context: Any) -> Any:
        marks.extend(zip(context.context_lens, [bool(context.long_context.all())] * 99, strict=False))
        return forward(hidden, positions, cache, context)

    monkeypatch.setattr(model, "forward", spy)
    assert tokens_of(engine.run(texts()[2])) == tokens_of(expected)[2:3]
    assert marks
    assert all(is_long == (length > 40) for length, is_long in marks)
