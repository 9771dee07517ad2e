"""Prompt look-up: what it guesses, when it rests, and that answers are those that come without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.engine_harness import Bench, bench, random_prompt, request

from sensorium.engine.lookup import PromptLookup, StepTimes, last_match
from sensorium.engine.sequence import Sequence
from sensorium.models.base import Model
from sensorium.types import EngineRequest


def sequence(tokens: list[int], outputs: int = 1) -> Sequence:
    seq = Sequence(request(tokens[:-outputs], 100), 0)
    for token in tokens[-outputs:]:
        seq.append(token)
    return seq


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),
        ([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], [4, 9, 2, 3]),  # two equal tokens are no match
        ([8, 1, 2, 3, 4, 0, 9, 1, 2, 3, 5, 0, 8, 1, 2, 3], [4, 0, 9, 1]),  # the longer match, not the latest
        ([7, 7, 7, 7], [7, 7, 7, 7]),  # a loop goes on
        ([1, 2, 1, 2, 1, 2, 1], [2, 1, 2, 1]),
        ([1, 2, 3, 4, 5, 6], []),
        ([1, 2], []),
    ],
)
def test_what_followed_the_same_tokens_is_guessed(tokens: list[int], guess: list[int]) -> None:
    lookup = PromptLookup(16)
    lookup.begin(1)
    seq = sequence(tokens)
    assert lookup.propose(seq, 100) == guess
    assert (last_match(seq) is not None) == bool(guess)


def test_guesses_grow_while_they_are_right_and_rest_when_they_are_wrong() -> None:
    lookup, seq = PromptLookup(16), sequence([1, 2, 3, 4, 5, 6, 1, 2, 3])
    sizes = []
    for _ in range(4):
        lookup.begin(1)
        sizes.append(len(lookup.propose(seq, 100)))
        lookup.learn(seq, sizes[-1], sizes[-1])
    assert sizes == [4, 8, 16, 16]
    assert (lookup.num_drafts, lookup.num_draft_tokens, lookup.num_accepted_tokens) == (4, 44, 44)
    assert sum(lookup.accepted_by_place) == 44 and lookup.accepted_by_place[0] == 4
    assert lookup.accepted_by_place == sorted(lookup.accepted_by_place, reverse=True)
    asked = 0
    for token in [4, 5, 6, 1, 2, 3] * 30:
        lookup.begin(1)
        if guess := lookup.propose(seq, 100):
            asked += 1
            lookup.learn(seq, len(guess), 0)
        if seq.num_outputs < 90:
            seq.append(token)
    assert 2 <= asked <= 7


@pytest.mark.parametrize(("step_s", "most_looks"), [(1e-5, 9), (1.0, 90)])
def test_a_sequence_like_nothing_before_is_seldom_looked_at_where_steps_are_short(
    step_s: float, most_looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    monkeypatch.setattr("sensorium.engine.lookup.last_match", lambda seq: looks.append(seq.num_outputs))
    lookup, seq = PromptLookup(16), sequence(list(range(20)))
    for _ in range(2):
        lookup.times.observe(1, step_s, drafted=False)
    for token in range(100, 190):
        lookup.begin(1)
        assert lookup.propose(seq, 100) == []
        seq.append(token)
    assert most_looks - 2 <= len(looks) <= most_looks


def timed(plain: float, drafted: float, rows: int) -> PromptLookup:
    lookup = PromptLookup(16)
    for _ in range(3):
        lookup.times.observe(8, plain, drafted=False)
        lookup.times.observe(rows, drafted, drafted=True)
    return lookup


def test_guesses_must_pay_for_the_time_that_they_add() -> None:
    """Of eight sequences one that gains some two tokens may not lengthen everybody's step by half."""
    seq = sequence([1, 2, 3, 4, 5, 6, 1, 2, 3])
    for drafted, expected in ((1.0, 4), (1.15, 4), (1.5, 0)):
        lookup = timed(1.0, drafted, 9)
        lookup.begin(8)
        assert len(lookup.propose(seq, 100)) == expected
    for _ in range(400):  # a time that was an accident is tried again
        lookup.begin(8)
        assert seq.guesses is not None
        seq.guesses.resume = 0
        if lookup.propose(seq, 100):
            break
    else:
        raise AssertionError("never asked again")


def test_times_are_of_like_steps_and_the_first_does_not_count() -> None:
    times = StepTimes()
    times.observe(1, 9.0, drafted=False)
    assert times.ratio(1, 8) == 1.0
    times.observe(1, 1.0, drafted=False)
    times.observe(8, 99.0, drafted=True)
    times.observe(8, 2.0, drafted=True)
    assert times.ratio(1, 8) == pytest.approx(2.0)
    assert times.ratio(1, 4) == 1.0  # not known yet
    assert times.ratio(1, 60) == pytest.approx(2.0)


# The engine with it


def quoting(count: int, max_tokens: int = 24, **sampling: Any) -> list[EngineRequest]:
    """Prompts with repetitions; tiny models of random weights also repeat themselves."""
    made = []
    for seed in range(count):
        part = random_prompt(seed, 7 + seed % 11)
        made.append(request(np.concatenate([part, random_prompt(seed + 500, 5), part]), max_tokens, **sampling))
    return made


def speculating(model: Model, **options: Any) -> Bench:
    return bench(model, speculative_tokens=16, **options)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"logprobs": 2},
        {"temperature": 0.4, "seed": 3},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 1},
        {"frequency_penalty": 0.4, "repetition_penalty": 1.1, "min_tokens": 9},
    ],
)
def test_the_same_answers_as_without(model: Model, sampling: dict[str, Any]) -> None:
    """Forty prompts each, with short chunks and preemption: tokens, ends, and log-probabilities."""
    expected = bench(model).run(*quoting(40, **sampling))
    stop = expected[0].tokens[9]
    expected = bench(model).run(*quoting(40, stop_token_ids=(stop,), **sampling))
    engine = speculating(model, max_num_batched_tokens=31)
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        if step % 7 == 6 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    got = engine.run(*quoting(40, stop_token_ids=(stop,), **sampling), before_step=preempt)
    assert [(one.tokens, one.reason) for one in got] == [(one.tokens, one.reason) for one in expected]
    for mine, reference in zip(got, expected, strict=True):
        assert [one.logprob for one in mine.logprobs] == pytest.approx(
            [one.logprob for one in reference.logprobs], abs=1e-4
        )
    lookup = engine.engine.lookup
    assert lookup is not None
    assert scheduler.preemptions > 0
    if not sampling:  # a tiny model of random weights soon repeats itself
        assert lookup.num_accepted_tokens > 10  # how many it tries depends on how long steps take
        assert lookup.num_draft_tokens >= lookup.num_accepted_tokens
