"""Edits of logits against their reference, and a whole sampler over these kernels against the one of CPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.drawing import FixedMatcher, held_by
from torch import Tensor

from sensorium import kernels
from sensorium.engine.masks import Masks
from sensorium.engine.sampler import Sampled, Sampler
from sensorium.engine.sequence import Sequence
from sensorium.kernels import Backend, Edits, reference
from sensorium.kernels.cuda import CudaBackend
from sensorium.types import EngineRequest, Prompt, SamplingParams

VOCAB = 1100
WORDS = -(-VOCAB // 32)
FREE = 6  # rows that draw without a filter
RNG = np.random.default_rng(3)


def lists(*rows: list[int]) -> tuple[Any, Any]:
    return np.cumsum([0, *map(len, rows)], dtype=np.int32), np.array([one for row in rows for one in row], np.int32)


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def numbers(*values: int) -> Any:
    return np.array(values, np.int32)


def random_masks(count: int) -> Any:
    return RNG.integers(0, 2**32, (count, WORDS), dtype=np.uint32)


def check(edits: Edits, raw: Tensor) -> Tensor:
    got, expected = raw.clone(), raw.clone()
    CudaBackend().edit(got, raw, edits)
    reference.edit(expected, raw, edits)
    torch.testing.assert_close(got, expected, equal_nan=True)
    return got


def test_lists_and_masks() -> None:
    bias_starts, biased = lists([7, 1099], [], [0], list(range(1050)))
    seen_starts, seen = lists([7, 8, 9], [1000], [], list(range(10, 1100)))
    edits = Edits(
        bias_starts, biased, floats(3.5, -np.inf, 1.0, *RNG.standard_normal(1050)), seen_starts, seen,
        floats(*RNG.integers(0, 3, len(seen))), floats(1.3, 0.7, 1.0, 1.1), floats(0.5, -0.1, 0.0, 0.2),
        floats(0.25, 1.0, 9.0, -1.0), random_masks(3), numbers(-1, 0, 2, -1), numbers(-1, 1, -1, 0),
        numbers(-1, 1, -1, 2),
    )  # fmt: skip
    raw = 4 * torch.randn(4, VOCAB)
    got = check(edits, raw)
    assert got[0, 1099] == -torch.inf
    assert got[2].isinf().sum() > VOCAB // 3
    assert got[0, 10:1099].equal(raw[0, 10:1099])


def test_grammars_that_leave_nothing() -> None:
    """What goes before gives way, then what else is asked for."""
    masks = np.zeros((3, WORDS), np.uint32)
    masks[0, 0], masks[1, 0], masks[2, 1] = 0b0110, 0b1110, 0b1
    starts, biased = lists([1, 2], [1, 2, 3], [32], [])
    edits = Edits(
        starts, biased, floats(*[-np.inf] * len(biased)), np.zeros(5, np.int32), numbers(), floats(),
        np.ones(4, np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32), masks, numbers(-1, -1, -1, 2),
        numbers(1, 1, 1, 1), numbers(0, 0, 0, 0),
    )  # fmt: skip
    raw = torch.randn(4, VOCAB)
    got = check(edits, raw)
    left = [row.isfinite().nonzero().flatten().tolist() for row in got]
    assert left == [[3], [1, 2, 3], [1, 2], [1, 2, 3]]
    assert got[1, 1:4].equal(raw[1, 1:4])


def test_rows_without_numbers_stay_so() -> None:
    raw = torch.full((1, VOCAB), torch.nan)
    none = np.zeros(2, np.int32)
    ones = floats(1.0)
    check(Edits(none, numbers(), floats(), none, numbers(), floats(), ones, ones, ones, random_masks(1), numbers(-1),
                numbers(0), numbers(0)), raw)  # fmt: skip


def sampled_by(sampler: Sampler, masks: Masks, logits: Tensor) -> tuple[Sampled, list[list[int]]]:
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.8, "seed": 1, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
        {"temperature": 1.2, "seed": 5, "logit_bias": ((4, 6.0), (2, -3.0)), "bad_words": ((4,),)},
        {"temperature": 0.0, "allowed_token_ids": (11, 13), "logprobs": 1},  # the grammar allows neither
        {"temperature": 0.7, "top_k": 5, "seed": 9, "min_tokens": 9, "stop_token_ids": (3, 8)},
        {"temperature": 0.0, "logprobs": 0, "logprob_token_ids": (2, 900)},
        {"temperature": 0.0, "presence_penalty": 1.0},
        *({"temperature": 1.5, "seed": seed} for seed in range(20, 20 + FREE)),  # some draw twice
    ]
    grammars: dict[int, tuple[int, list[int], list[int]]] = {  # the first of the even tokens that are allowed, ...
        1: (10, [], []), 4: (20, [], []), 5: (1096, [1096], []), 6: (0, [], [77]), 7: (1098, [1098], []),
        **{row: (4 * row, [], []) for row in range(8, 8 + FREE)},
    }  # fmt: skip
    matchers = []
    sequences = []
    for row, wish in enumerate(wishes):
        seq = Sequence(EngineRequest(row, Prompt(np.array([4, 5, 9], np.int32)), SamplingParams(50, **wish)), 0)
        seq.append(5)
        sequences.append(seq)
        if row in grammars:
            first, late_ends, forced = grammars[row]
            allowed = np.zeros(VOCAB, bool)
            allowed[first::2] = True
            matchers.append(FixedMatcher(allowed, forced))
            held_by(seq, matchers[-1], row, late_ends)
    masks.begin(sequences)
    sampled = sampler.sample(logits.clone(), sequences)
    return sampled, [one.taken for one in matchers]


def test_a_sampler_chooses_what_it_does_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 3 * torch.randn(8 + FREE, VOCAB)
    logits[5, 1098] = -torch.inf  # the end that should not come is all that is left
    masks = Masks(8 + FREE, VOCAB)
    expected, expected_taken = sampled_by(Sampler(7, masks), masks, logits)

    def cuda(_: Tensor) -> Backend:
        return CudaBackend()

    by_reference = sampled_by(Sampler(7, masks, torch.device("cuda")), masks, logits)
    monkeypatch.setattr(kernels, "_for", cuda)
    by_kernels = sampled_by(Sampler(7, masks, torch.device("cuda")), masks, logits)
    for sampled, taken in (by_reference, by_kernels):
        assert (sampled.token_ids, sampled.failed) == (expected.token_ids, [])
        assert taken == expected_taken
        for row, one in expected.logprobs.items():
            other = sampled.logprobs[row]
            assert (one.token_id, [token for token, _ in one.top]) == (
                other.token_id,
                [token for token, _ in other.top],
            )
            assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
    assert expected.token_ids[4] % 2 == 0
    assert [expected.token_ids[row] for row in (5, 6, 7)] == [1096, 77, 1098]
