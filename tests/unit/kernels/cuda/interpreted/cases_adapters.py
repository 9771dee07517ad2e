"""Adapters of many ranks in one batch, against their reference one after the other."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import LowRank, TokenGroups
from sensorium.kernels.cuda import CudaBackend

SIZE, OUT = 72, 120
PARTS = ((0, 70), (70, 30), (100, 20))  # of the output: first column and columns


def adapter(rank: int, parts: tuple[int, ...], dtype: torch.dtype) -> LowRank:
    """With a rank that is one more in every further part."""
    found = [(PARTS[part], rank + place) for place, part in enumerate(parts)]
    narrow = torch.randn(sum(own for _, own in found), SIZE) / SIZE**0.5
    wide = [(first, (torch.randn(rows, own) / own**0.5).to(dtype)) for (first, rows), own in found]
    return LowRank(narrow.to(dtype), wide)


def check(additions: list[LowRank | None], rows: list[list[int] | None], tokens: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tokens, 2 * SIZE).to(dtype)[:, :SIZE]
    out = torch.randn(tokens, OUT).to(dtype)
    groups = TokenGroups([None if own is None else torch.tensor(own) for own in rows])
    expected, got = out.clone(), out.clone()
    reference.add_low_rank(expected, x, additions, groups)
    CudaBackend().add_low_rank(got, x, additions, groups)
    assert_close(got, expected, 4)
    return got - out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_in_one_batch(dtype: torch.dtype) -> None:
    """One has nothing for this layer, one nothing for the second part; tokens 0 and 7 have no adapter."""
    additions = [adapter(4, (0, 1, 2), dtype), None, adapter(33, (0, 2), dtype), adapter(16, (1,), dtype)]
    added = check(additions, [[3, 1], [2], [9, 8, 4], [5, 6]], 10, dtype)
    assert not added[[0, 2, 7]].any()
    assert added[[1, 3]].any(1).all()
    assert not added[[4, 8, 9], 70:100].any()


def test_long_prompts_and_whole_steps() -> None:
    check([adapter(8, (0, 1, 2), torch.float32)], [None], 70, torch.float32)
    check(
        [adapter(1, (0,), torch.float32), adapter(2, (1, 2), torch.float32)], [[*range(1, 67)], [0]], 70, torch.float32
    )


def test_the_same_groups_serve_every_layer() -> None:
    groups, x = TokenGroups([torch.tensor([1]), torch.tensor([0, 3])]), torch.randn(4, SIZE)
    backend = CudaBackend()
    for rank in (2, 5, 2):
        additions = [adapter(rank, (0,), torch.float32), adapter(rank + 1, (1,), torch.float32)]
        expected, got = torch.zeros(4, OUT), torch.zeros(4, OUT)
        reference.add_low_rank(expected, x, additions, groups)
        backend.add_low_rank(got, x, additions, groups)
        assert_close(got, expected, 4)


def test_what_the_kernels_do_not_take_is_left_to_the_reference() -> None:
    """Sums in float32 of a layer that is split over ranks."""
    one, x = adapter(3, (0, 1), torch.float16), torch.randn(3, SIZE).half()
    expected, got = torch.zeros(3, OUT), torch.zeros(3, OUT)
    groups = TokenGroups([torch.tensor([2, 0])])
    reference.add_low_rank(expected, x, [one], groups)
    CudaBackend().add_low_rank(got, x, [one], groups)
    assert torch.equal(got, expected)
    assert got.any()
