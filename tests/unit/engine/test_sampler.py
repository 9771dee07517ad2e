"""The sampler against a plain numpy reference, one row at a time, with every parameter."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drawing import FixedMatcher, drawn, held_by, sequence

from sensorium.engine.drawing import _thresholds, draw_together, draws_of, row_threshold, uniforms_of
from sensorium.engine.masks import ASKING_S, Masks
from sensorium.engine.sampler import Sampler
from sensorium.engine.sampler_state import TokenCounts
from sensorium.engine.sequence import Sequence
from sensorium.types import SamplingParams

VOCABS = (100, 8193, 10000, 151936)


def reference_probabilities(logits: np.ndarray, seq: Sequence) -> np.ndarray:
    """What may be drawn, and how likely; greedy is certainty. float64, sorted, nothing clever."""
    params = seq.sampling
    assert params is not None
    row = logits.astype(np.float64).copy()
    outputs = seq.tokens[seq.num_prompt : seq.num_tokens].tolist()
    for token, bias in params.logit_bias:
        row[token] += bias
    if len(outputs) < params.min_tokens:
        row[list(params.stop_token_ids)] = -np.inf
    for word in params.bad_words:
        if tuple(outputs[len(outputs) - len(word) + 1 :]) == word[:-1]:
            row[word[-1]] = -np.inf
    if params.allowed_token_ids:
        row[np.setdiff1d(np.arange(len(row)), params.allowed_token_ids)] = -np.inf
    for token in set(seq.tokens[: seq.num_tokens].tolist()):
        row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
    for token in set(outputs):
        row[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    if params.temperature < 1e-5:
        return np.eye(len(row))[row.argmax()]
    row = row / params.temperature
    row -= row.max()
    if params.min_p:
        row[row < np.log(params.min_p)] = -np.inf
    if params.top_k:
        row[row < np.sort(row)[::-1][min(params.top_k, len(row)) - 1]] = -np.inf
    if params.top_p < 1:
        ordered = np.sort(row)[::-1]
        weights = np.exp(ordered) / np.exp(ordered).sum()
        kept = max(1, int((weights.cumsum() - weights < params.top_p).sum()))
        row[row < ordered[kept - 1]] = -np.inf
    return np.exp(row) / np.exp(row).sum()


def reference_choice(logits: np.ndarray, seq: Sequence, uniform: float) -> tuple[int, float]:
    """(token, how near the draw was to the border of another one)"""
    sums = reference_probabilities(logits, seq).cumsum()
    token = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return token, float(np.abs(sums / sums[-1] - uniform).min())


Params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-300, 0.01, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.001]),
        "top_k": st.sampled_from([0, 1, 2, 40, 1000]),
        "min_p": st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, 2.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "seed": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "min_tokens": st.sampled_from([0, 3, 30]),
        "stop_token_ids": st.sampled_from([(), (3, 7)]),
        "logit_bias": st.sampled_from([(), ((3, 5.0), (9, -100.0), (11, 2.5))]),
        "allowed_token_ids": st.sampled_from([(), (3, 7, 11, 250, 299)]),
        "bad_words": st.sampled_from([(), ((11,), (250,)), ((3, 11), (7, 3, 250), (5, 5), (1, 2, 3, 299))]),
    }
)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@settings(max_examples=80, deadline=None)
@given(
    batch=st.lists(Params, min_size=1, max_size=6),
    noise=st.integers(0, 2**31),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
)
def test_every_parameter_as_the_reference_does(
    kind: str, batch: list[dict[str, Any]], noise: int, spread: float
) -> None:
    """By numpy, as on a CPU, and by kernels, as elsewhere."""
    rng = np.random.default_rng(noise)
    vocab = 300
    logits = (rng.standard_normal((len(batch), vocab)) * spread).astype(np.float32)
    sequences = [
        sequence(rng.integers(0, vocab, 10).tolist(), rng.integers(0, 20, rng.integers(0, 12)).tolist(), i, **params)
        for i, params in enumerate(batch)
    ]
    before = logits.copy()
    sampled = Sampler(seed=5, device=torch.device(kind)).sample(torch.from_numpy(logits), sequences)
    assert np.array_equal(logits, before)
    assert not sampled.failed
    for row, seq, token in zip(logits, sequences, sampled.token_ids, strict=True):
        uniform = float(uniforms_of([seq.sampler_state.seed], [seq.num_outputs])[0])
        expected, margin = reference_choice(row, seq, uniform)
        assert token == expected or (margin < 1e-5 and reference_probabilities(row, seq)[token] > 0)


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
@pytest.mark.parametrize("vocab", VOCABS)
def test_ids_are_always_in_range(vocab: int, device: torch.device) -> None:
    """S40: tails of probability 0, rows of -inf or NaN, and one possible token at either end."""
    logits = torch.randn(7, vocab)
    logits[0, vocab // 2 :] = -torch.inf
    logits[1] = -torch.inf
    logits[2] = torch.nan
    logits[3, 7] = torch.nan
    logits[4] = -torch.inf
    logits[4, vocab - 1] = 3.0
    logits[5] = -torch.inf
    logits[5, 0] = -1e30
    logits[6, 5] = torch.inf
    for sampling in (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1e-6, "top_k": 5},
        {"temperature": 2.0, "min_p": 0.1, "logprobs": 2},
    ):
        for seed in range(5):
            seqs = [sequence([1], [], i, seed=seed, **sampling) for i in range(7)]
            sampled = Sampler(device=device).sample(logits.clone(), seqs)
            assert all(0 <= token < vocab for token in sampled.token_ids)
            assert sampled.failed == [1, 2, 3, 6]
            assert sampled.token_ids[0] < vocab // 2
            assert sampled.token_ids[4] == vocab - 1
            assert sampled.token_ids[5] == 0
            assert set(sampled.logprobs) == ({0, 4, 5} if "logprobs" in sampling else set())


def test_forbidding_every_token_fails_the_row() -> None:
    seq = sequence([0], [], stop_token_ids=(0, 1, 2), min_tokens=5, temperature=1.0)
    assert Sampler().sample(torch.zeros(1, 3), [seq]).failed == [0]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    """R17: other rows, their parameters and their number change nothing."""
    vocab = 8193
    mine = np.random.default_rng(0).standard_normal(vocab).astype(np.float32)
    options: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 50},
        {"min_p": 0.05, "top_p": 0.8},
        {"frequency_penalty": 1.0},
        {"logprobs": 3},
    ]
    for sampling in options:
        seen = set()
        for trial in range(20):
            rng = random.Random(trial)
            others = [
                sequence(
                    [1],
                    [2] * rng.randrange(5),
                    100 + i,
                    **{"temperature": rng.choice((0.0, 1.3)), **rng.choice(options)},
                )
                for i in range(rng.randrange(12))
            ]
            place = rng.randrange(len(others) + 1)
            logits = np.random.default_rng(trial).standard_normal((len(others) + 1, vocab)).astype(np.float32)
            logits[place] = mine
            own = sequence([1], [5, 6], trial, temperature=1.0, seed=42, **sampling)
            batch = [*others[:place], own, *others[place:]]
            seen.add(Sampler(trial).sample(torch.from_numpy(logits), batch).token_ids[place])
        assert len(seen) == 1


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {"temperature": 2.0}])
def test_draws_follow_the_distribution(sampling: dict[str, Any]) -> None:
    """Chi-square over the output indices of one request: each index is a new draw."""
    row = np.log(np.array([0.4, 0.25, 0.2, 0.1, 0.05], np.float32))
    sampling = {"temperature": 1.0, **sampling}
    seqs = [sequence([0], [0] * index, seed=9, **sampling) for index in range(3000)]
    tokens = Sampler().sample(torch.from_numpy(np.tile(row, (len(seqs), 1))), seqs).token_ids
    expected = reference_probabilities(row, sequence([0], [], **sampling)) * len(seqs)
    counts = np.bincount(tokens, minlength=5)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 25


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    numbers = uniforms_of([7] * 20_000, list(range(20_000)))
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 2000).max() < 200
    assert len(np.unique(uniforms_of(list(range(5000)), [0] * 5000))) > 4990


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([0.3, 2.0, 10.0]), st.booleans(), st.lists(Params, min_size=1, max_size=4)
)
def test_both_ways_to_filter_agree(noise: int, spread: float, ties: bool, batch: list[dict[str, Any]]) -> None:
    """The form for GPUs, which sorts, and the one for CPUs, which avoids it."""
    logits = np.random.default_rng(noise).standard_normal((len(batch), 500)) * spread
    scaled = (np.round(logits) if ties else logits).astype(np.float32)
    scaled -= scaled.max(axis=1, keepdims=True)
    params = [SamplingParams(1, **one) for one in batch]
    of = draws_of([0] * len(params), [0] * len(params), params)
    columns = [torch.from_numpy(column) for column in (of.least, of.top_k, of.top_p)]
    by_sorting = _thresholds(torch.from_numpy(scaled), *columns).numpy()
    for row, one, threshold in zip(scaled, params, by_sorting, strict=True):
        mine = np.float32(row_threshold(row, one))
        differing = int(((row >= mine) != (row >= threshold)).sum())
        assert differing == 0 or (not ties and differing == 1)  # sums are rounded in another order


def _is_random(params: Any) -> bool:
    return bool(params["temperature"] > 1e-5)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.3, 2.0, 10.0]),
    st.sampled_from([100, 128, 500, 1000]),
    st.lists(Params.filter(_is_random), min_size=1, max_size=4),
)
def test_both_ways_to_draw_agree(noise: int, spread: float, vocab: int, batch: list[dict[str, Any]]) -> None:
    """All rows at once, as on a GPU, and row by row."""
    rng = np.random.default_rng(noise)
    logits = (rng.standard_normal((len(batch), vocab)) * spread).astype(np.float32)
    logits[:, rng.integers(0, vocab, vocab // 2)] = -np.inf
    params = [SamplingParams(1, **one) for one in batch]
    uniforms = rng.random(len(batch))
    together = draw_together(torch.from_numpy(logits), params, uniforms).tolist()
    for row, one, uniform, token in zip(logits, params, uniforms, together, strict=True):
        mine = drawn(row, one, uniform)
        near = [min(max(uniform + shift, 0), 1 - 2**-32) for shift in (-1e-5, 0, 1e-5)]
        assert token in [drawn(row, one, place) for place in near]
        assert np.isfinite(row[mine])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-32])
def test_the_ends_of_the_interval_are_possible_tokens(uniform: float) -> None:
    row = np.full(1000, -np.inf, np.float32)
    row[[300, 700]] = (-3.0, 0.5)
    for sampling in ({}, {"top_p": 0.999}, {"top_k": 2}):
        params = SamplingParams(1, **sampling)
        expected = 300 if uniform == 0 else 700
        assert drawn(row, params, uniform) == expected
        assert draw_together(torch.from_numpy(row[None]), [params], np.array([uniform])) == expected


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
def test_logprobs_are_of_raw_logits(device: torch.device) -> None:
    logits = torch.randn(3, 500)
    seqs = [
        sequence([1], [], 1, temperature=0.3, logprobs=5, logit_bias=((7, 100.0),)),
        sequence([1], [], 2, temperature=0.0, logprobs=0),
        sequence([1], [], 3, temperature=1.0),
    ]
    sampled = Sampler(device=device).sample(logits, seqs)
    scores = torch.log_softmax(logits.double(), -1)
    assert set(sampled.logprobs) == {0, 1}
    first = sampled.logprobs[0]
    assert first.token_id == sampled.token_ids[0] == 7
    assert first.logprob == pytest.approx(scores[0, 7].item(), abs=1e-5)
    assert [token for token, _ in first.top] == scores[0].topk(5).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(scores[0].topk(5).values.tolist(), abs=1e-5)
    assert sampled.logprobs[1].top == ()
    assert sampled.logprobs[1].token_id == logits[1].argmax().item()


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
def test_logprobs_of_named_tokens_follow_the_likeliest(device: torch.device) -> None:
    logits = torch.randn(2, 500)
    scores = torch.log_softmax(logits.double(), -1)
    best = scores[0].topk(2).indices.tolist()
    named = (499, best[1], 3)
    seqs = [
        sequence([1], [], 1, logprobs=2, logprob_token_ids=named),
        sequence([1], [], 2, logprobs=0, logprob_token_ids=(7,)),
    ]
    found = Sampler(device=device).sample(logits, seqs).logprobs
    rest = [token for token in named if token not in best]
    assert [token for token, _ in found[0].top] == [*best, *rest]
    assert [value for _, value in found[0].top] == pytest.approx(scores[0, [*best, *rest]].tolist(), abs=1e-5)
    assert found[1].top == ((7, pytest.approx(scores[1, 7].item(), abs=1e-5)),)


@pytest.mark.parametrize(
    ("outputs", "gained", "expected"),
    [([], [], 9), ([5], [], 8), ([4, 5], [], 7), ([4], [5], 7), ([], [4, 5], 7), ([4, 5, 6], [], 9)],
)
def test_a_bad_word_may_begin_but_not_end(outputs: list[int], gained: list[int], expected: int) -> None:
    """9 is the likeliest, then 8, 7: (5, 9) and (4, 5, 8) are not to be said. The prompt does not count."""
    seq = sequence([4, 5], outputs, temperature=0.0, bad_words=((5, 9), (4, 5, 8)))
    logits = torch.arange(10.0).unsqueeze(0)
    assert Sampler().sample(logits, [seq], [gained] if gained else []).token_ids == [expected]


def test_a_bad_word_gives_way_where_nothing_else_is_allowed() -> None:
    seq = sequence([1], [5], temperature=0.0, allowed_token_ids=(5, 6), bad_words=((5, 5), (6,)))
    sampled = Sampler().sample(torch.zeros(1, 10), [seq])
    assert (sampled.token_ids, sampled.failed) == ([5], [])
    ended = sequence(
        [1], [5], temperature=0.0, allowed_token_ids=(5, 6), bad_words=((5, 5),), min_tokens=4, stop_token_ids=(6,)
    )
    sampled = Sampler().sample(torch.zeros(1, 10), [ended])
    assert (sampled.token_ids, sampled.failed) == ([5], [])


def test_bfloat16_ties_take_the_first() -> None:
    logits = torch.zeros(2, 1000, dtype=torch.bfloat16)
    logits[:, [400, 17, 900]] = 2.0
    seqs = [sequence([1], [], i, temperature=0.0, logprobs=logprobs) for i, logprobs in enumerate((None, 1))]
    assert Sampler().sample(logits, seqs).token_ids == [17, 17]
    assert Sampler().sample(logits[:1], seqs[:1]).token_ids == [17]


def test_counts_follow_the_output() -> None:
    """Penalties see every token once, also when there are more than memory was reserved for at first."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((1, 2000)).astype(np.float32))
    options: dict[str, Any] = {
        "temperature": 0.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
    }
    outputs = rng.integers(0, 2000, 900).tolist()
    seq = sequence([5, 5, 6], outputs, **options)
    seq.num_tokens = seq.num_prompt
    sampler = Sampler()
    for length in (0, 1, 200, 300, 301, 900):
        seq.num_tokens = seq.num_prompt + length
        [token] = sampler.sample(logits, [seq]).token_ids
        assert token == reference_probabilities(logits[0].numpy(), seq).argmax()
    counts = seq.sampler_state.counts
    assert counts is not None
    assert counts.counts[: counts.size].sum() == 900
    assert sorted(counts.ids[: counts.size]) == sorted({5, 6, *outputs})


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(0, 9), max_size=30), st.integers(0, 30))
def test_counts_that_are_taken_back_are_those_of_what_is_left(said: list[int], then: list[int], kept: int) -> None:
    """Guesses are counted before it is known whether they are said."""
    prompt = np.array([3, 5, 700], np.int32)
    counts, fresh = TokenCounts(prompt, 100), TokenCounts(prompt, 100)
    counts.update(np.array(said, np.int32))
    counts.take_back(kept)
    whole = np.array([*said[:kept], *then], np.int32)
    counts.update(whole)
    fresh.update(whole)
    assert counts.ids[: counts.size].tolist() == fresh.ids[: fresh.size].tolist()
    assert counts.counts[: counts.size].tolist() == fresh.counts[: fresh.size].tolist()


# Grammars on a CPU


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 12}, {"temperature": 0.6}]
)
def test_a_mask_that_is_asked_for_late_changes_no_token(sampling: dict[str, Any]) -> None:
    """Whether single tokens were asked about first, or all of the masks were there."""
    rng, vocab, rows = np.random.default_rng(1), 700, 16
    allowed = [rng.random(vocab) < share for share in np.linspace(0.02, 0.98, rows)]
    logits = torch.from_numpy((2 * rng.standard_normal((rows, vocab))).astype(np.float32))

    def tokens(mask_s: float) -> tuple[list[int], int]:
        masks, matchers = Masks(rows, vocab), [FixedMatcher(one) for one in allowed]
        sequences = [sequence([1], [], row, seed=row, **sampling) for row in range(rows)]
        for seq, matcher in zip(sequences, matchers, strict=True):
            held_by(seq, matcher, slot=seq.id, late_ends=[int(np.flatnonzero(matcher.allowed)[0])])
            assert seq.constraint is not None
            seq.constraint.mask_s = mask_s
        masks.begin(sequences, may_ask=True)
        sampled = Sampler(0, masks).sample(logits.clone(), sequences)
        assert not sampled.failed
        return sampled.token_ids, sum(matcher.masks for matcher in matchers)

    (early, all_masks), (late, few_masks) = tokens(0.0), tokens(2 * ASKING_S)
    assert early == late
    assert all(own[token] for own, token in zip(allowed, early, strict=True))
    assert all_masks == rows
    assert few_masks < rows if "top_k" not in sampling else few_masks == rows


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 3}])
def test_tokens_come_as_often_as_a_grammar_lets_them(sampling: dict[str, Any]) -> None:
    """The likeliest tokens are forbidden, so that most rows draw twice."""
    logits = np.array([[3.0, 2.5, 1.0, 0.5, 0.0, -0.5]], np.float32).repeat(4000, axis=0)
    allowed = np.array([False, True, False, True, True, True])
    masks, sequences = Masks(len(logits), 6), []
    for row in range(len(logits)):
        seq = sequence([1], [], row, seed=row, **{"temperature": 1.0} | sampling)
        held_by(seq, FixedMatcher(allowed), slot=row)
        sequences.append(seq)
    masks.begin(sequences, may_ask=True)
    found = Sampler(0, masks).sample(torch.from_numpy(logits.copy()), sequences)
    shares = np.bincount(found.token_ids, minlength=6) / len(logits)
    expected = reference_probabilities(np.where(allowed, logits[0], -np.inf), sequences[0])
    assert np.abs(shares - expected).max() < 0.03


def test_late_ends_and_other_wishes_give_way_to_a_grammar() -> None:
    """An end that should not come comes where there is nothing else; so do tokens that a request forbids."""
    allowed = np.zeros(50, bool)
    allowed[[7, 9]] = True
    forbidden = tuple((token, -math.inf) for token in (7, 9))
    wishes: list[tuple[list[int], dict[str, Any], set[int]]] = [
        ([9], {}, {7}),
        ([7, 9], {}, {7, 9}),
        ([9], {"logit_bias": ((7, -math.inf),)}, {9}),
        ([], {"logit_bias": forbidden}, {7, 9}),
    ]
    for temperature in (0.0, 1.0):
        masks, sequences = Masks(len(wishes), 50), []
        for row, (late, sampling, _) in enumerate(wishes):
            seq = sequence([1], [], row, temperature=temperature, **sampling)
            held_by(seq, FixedMatcher(allowed), slot=row, late_ends=late)
            sequences.append(seq)
        masks.begin(sequences, may_ask=True)
        found = Sampler(0, masks).sample(torch.randn(len(wishes), 50), sequences)
        assert not found.failed
        assert all(token in left for token, (_, _, left) in zip(found.token_ids, wishes, strict=True))
