"""Sampling by threshold against the sampler of CPUs: the same tokens from the same seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.drawing import drawn
from torch import Tensor

from sensorium.engine.drawing import draws_of, uniforms_of
from sensorium.kernels.cuda import CudaBackend, sampling
from sensorium.kernels.cuda.sampling import Choices
from sensorium.types import SamplingParams

KINDS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.001},
    {"temperature": 3.0, "top_k": 2900},
]


def choices_of(kinds: list[dict[str, float]], seeds: list[int], indices: list[int]) -> Choices:
    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([kind.get(name, default) for kind in kinds], dtype=dtype)

    min_p = [kind.get("min_p", 0.0) for kind in kinds]
    return Choices(
        torch.from_numpy(np.array(seeds, np.uint64).view(np.int64)),
        torch.tensor(indices),
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int32),
        column("top_p", 1.0, torch.float64),
        torch.tensor([math.log(one) if one else -math.inf for one in min_p], dtype=torch.float32),
    )


def by_cpu(logits: Tensor, kinds: list[dict[str, float]], seeds: list[int], indices: list[int]) -> list[int]:
    uniforms = uniforms_of(seeds, indices).tolist()
    return [
        drawn(row, SamplingParams(1, **kind), number)  # type: ignore[arg-type]
        for row, kind, number in zip(logits.numpy(), kinds, uniforms, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_are_those_of_a_cpu(kind: dict[str, float]) -> None:
    """Of a row whose logits lie close together, and of one whose do not."""
    logits = torch.tensor([[1.0], [6.0]]) * torch.randn(2, 3001)
    seeds, indices = [2**64 - 1, 12345], [0, 100000]
    kinds = [kind] * 2
    got, highest = sampling.sample(logits, choices_of(kinds, seeds, indices))
    assert got.tolist() == by_cpu(logits, kinds, seeds, indices)
    assert torch.equal(highest, logits.amax(1))


def test_a_seed_gives_other_tokens_at_other_indices() -> None:
    logits = torch.randn(1, 500).expand(30, 500).contiguous()
    got, _ = sampling.sample(logits, choices_of([{}] * 30, [5] * 30, list(range(30))))
    assert got.tolist() == by_cpu(logits, [{}] * 30, [5] * 30, list(range(30)))
    assert len(set(got.tolist())) > 10


def test_equal_logits_stay_together() -> None:
    logits = torch.zeros(8, 20)
    logits[:, 10:] = -1.0
    kinds: list[dict[str, float]] = [{"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.9}, {"top_k": 12, "top_p": 0.99}] * 2
    seeds, indices = list(range(8)), [3] * 8
    got, _ = sampling.sample(logits, choices_of(kinds, seeds, indices))
    assert got.tolist() == by_cpu(logits, kinds, seeds, indices)


def test_more_likely_logits_than_there_is_room_for() -> None:
    logits = torch.randn(2, sampling.ROOM + 900)
    kinds = [{"top_k": 50, "temperature": 1.0}, {"top_p": 0.5, "temperature": 1.0}]
    got, _ = sampling.sample(logits, choices_of(kinds, [3, 4], [0, 0]))
    assert got.tolist() == by_cpu(logits, kinds, [3, 4], [0, 0])


def test_greedy_rows_take_the_first_of_the_highest() -> None:
    logits = torch.randn(3, 300)
    logits[0, [20, 70, 299]] = 9.0
    logits[1, 299] = 9.0
    logits[2, 0] = 9.0
    got, highest = sampling.sample(logits, choices_of([{"temperature": 0.0}] * 3, [1] * 3, [0] * 3))
    assert got.tolist() == [20, 299, 0]
    assert highest.tolist() == [9.0] * 3


def test_rows_without_numbers_are_told() -> None:
    logits = torch.randn(4, 100)
    logits[0, 50] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    for temperature in (0.0, 1.0):
        _, highest = sampling.sample(logits, choices_of([{"temperature": temperature}] * 4, [1] * 4, [0] * 4))
        assert highest.isfinite().tolist() == [False, False, False, True]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((3, 4000), -torch.inf)
    logits[:, [7, 3999]] = torch.tensor([0.0, -2.0])
    kinds: list[dict[str, float]] = [{}, {"top_k": 50}, {"top_p": 0.999}]
    got, _ = sampling.sample(logits, choices_of(kinds, [1, 2, 3], [0, 0, 0]))
    assert set(got.tolist()) <= {7, 3999}
    assert got.tolist() == by_cpu(logits, kinds, [1, 2, 3], [0, 0, 0])


def test_draws_of_requests() -> None:
    """What the sampler hands to the kernel, in one copy, rows of all kinds beside each other."""
    logits = 2 * torch.randn(len(KINDS), 900)
    seeds, indices = [2**64 - 1 - i for i in range(len(KINDS))], list(range(len(KINDS)))
    params = [SamplingParams(1, **kind) for kind in KINDS]  # type: ignore[arg-type]
    drawn = CudaBackend().draw(logits, draws_of(seeds, indices, params))
    assert drawn is not None
    assert drawn[0].tolist() == by_cpu(logits, KINDS, seeds, indices)
