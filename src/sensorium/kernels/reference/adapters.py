"""What LoRA adapters add, in torch: one after the other, part by part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sensorium.kernels.backend import LowRank, TokenGroups


def add_low_rank(out: Tensor, x: Tensor, additions: Sequence[LowRank | None], groups: TokenGroups) -> None:
    """See `Backend.add_low_rank`."""
    for addition, rows in zip(additions, groups.rows, strict=True):
        if addition is not None:
            _add(out, x, addition, rows)


def _add(out: Tensor, x: Tensor, addition: LowRank, rows: Tensor | None) -> None:
    inner = (x if rows is None else x[rows]) @ addition.narrow.t()
    start = 0
    for first, wide in addition.parts:
        columns = out[:, first : first + len(wide)]
        added = (inner[:, start : start + wide.shape[1]] @ wide.t()).to(out.dtype)
        start += wide.shape[1]
        if rows is None:
            columns += added
        else:
            columns.index_add_(0, rows, added)
