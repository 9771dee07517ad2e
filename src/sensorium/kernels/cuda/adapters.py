"""LoRA in Triton: two launches add what all adapters of a step add to a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sensorium.kernels.backend import LowRank, TokenGroups
from sensorium.kernels.cuda.device.adapters import add_wide_product, narrow_product
from sensorium.kernels.cuda.launch import FLOATS, launch
from sensorium.kernels.transfers import to_device

PARTS = 3  # of a layer at most: queries, keys and values
FEW = 16  # tokens of an adapter up to which tiles are small
COLUMNS = 64
MAX_TABLES = 4096
ALIGNMENT = 16  # bytes


def add_low_rank(
    out: Tensor,
    x: Tensor,
    additions: Sequence[LowRank | None],
    groups: TokenGroups,
    tables: dict[tuple[int, ...], Tensor],
) -> None:
    """See `Backend.add_low_rank`. `tables` are kept from call to call: those of the adapters that run come again."""
    found = [one for one in additions if one is not None]
    width = max(len(one.narrow) for one in found)
    highest = max(wide.shape[1] for one in found for _, wide in one.parts)
    blocks = -(-max(len(wide) for one in found for _, wide in one.parts) // COLUMNS)
    numbers = _table(additions)
    if numbers not in tables:
        if len(tables) >= MAX_TABLES:
            tables.clear()
        [tables[numbers]] = to_device([np.array(numbers, np.int64)], x.device)
    table = tables[numbers]
    order, tiles, tile = _tiles(groups, x)
    inner = torch.empty((len(order), width), dtype=x.dtype, device=x.device)
    options: dict[str, Any] = {"BLOCK_M": tile, "num_warps": 4, "num_stages": 3}
    block = 16 if width <= 16 else 32
    launch(narrow_product, (len(tiles), -(-width // block)), x, order, tiles, table, inner, x.shape[1], x.stride(0),
           width, BLOCK_N=block, BLOCK_K=64, **options)  # fmt: skip
    launch(add_wide_product, (len(tiles), PARTS * blocks), inner, order, tiles, table, out, out.stride(0), width,
           blocks, BLOCK_N=COLUMNS, BLOCK_K=16 if highest <= 16 else 32, **options)  # fmt: skip


def takes(out: Tensor, x: Tensor, additions: Sequence[LowRank | None]) -> bool:
    """Whether the kernels do."""
    matrices = [
        matrix for one in additions if one is not None for matrix in (one.narrow, *(wide for _, wide in one.parts))
    ]
    return (
        x.dtype in FLOATS
        and out.dtype is x.dtype
        and x.stride(1) == out.stride(1) == 1
        and all(one is None or len(one.parts) <= PARTS for one in additions)
        and all(one.dtype is x.dtype and one.is_contiguous() and _address(one) % ALIGNMENT == 0 for one in matrices)
    )


def _tiles(groups: TokenGroups, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """(tokens sorted by group int64, [tiles, 3] int32: group, first and end of the sorted tokens; tokens of a tile),
    once a step."""
    if groups.tiles is None:
        counts = [len(x) if rows is None else len(rows) for rows in groups.rows]
        tile = 16 if max(counts) <= FEW else 64
        found, start = [], 0
        for group, count in enumerate(counts):
            found += [(group, start + first, start + count) for first in range(0, count, tile)]
            start += count
        every = [torch.arange(len(x), device=x.device) if rows is None else rows for rows in groups.rows]
        [tiles] = to_device([np.array(found, np.int32).reshape(-1, 3)], x.device)
        groups.tiles = (every[0] if len(every) == 1 else torch.cat(every), tiles, tile)
    return groups.tiles


def _table(additions: Sequence[LowRank | None]) -> tuple[int, ...]:
    """See `device.adapters`, one row for each."""
    numbers: list[int] = []
    for one in additions:
        if one is None:
            numbers += [0] * (2 + 5 * PARTS)
            continue
        numbers += [_address(one.narrow), len(one.narrow)]
        start = 0
        for first, wide in one.parts:
            numbers += [_address(wide), first, len(wide), start, wide.shape[1]]
            start += wide.shape[1]
        numbers += [0] * 5 * (PARTS - len(one.parts))
    return tuple(numbers)


def _address(tensor: Tensor) -> int:
    """0 of one without memory."""
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
