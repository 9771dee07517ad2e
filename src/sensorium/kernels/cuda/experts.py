"""The experts of a routed layer in Triton: two launches for all of them, and no number read from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sensorium.kernels.backend import Activation, PackedWeight
from sensorium.kernels.cuda.device import experts as device
from sensorium.kernels.cuda.device.experts import down_product, gate_and_up
from sensorium.kernels.cuda.launch import FLOATS, launch, power_of_two
from sensorium.kernels.reference import PlainLinear

FEW = 16  # rows of an expert, on average, up to which tiles are small
ALIGNMENT = 16  # bytes


class CudaExperts:
    """See `backend.Experts`. The weights must stay where they are while it lives."""

    __slots__ = ("_activation", "_down", "_gate_up", "_tables")

    def __init__(self, gate_up: Sequence[PlainLinear], down: Sequence[PlainLinear], activation: Activation) -> None:
        self._gate_up, self._down, self._activation = list(gate_up), list(down), activation
        where = gate_up[0].weight.device
        self._tables = [
            (_addresses([one.weight for one in part], where), _addresses([one.bias for one in part], where))
            for part in (self._gate_up, self._down)
        ]

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, per_token = chosen.shape
        size, inner, count = x.shape[1], self._down[0].weight.shape[1], len(self._down)
        pairs = tokens * per_token
        tile = 16 if pairs <= FEW * count else 64
        order, starts, tile_ends = sorted_rows(chosen, count, tile)
        made = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
        out = torch.empty((pairs, size), dtype=torch.float32, device=x.device)
        tiles = min(pairs, pairs // tile + count)  # at most: every expert has one that is not full
        (first, first_bias), (second, second_bias) = self._tables
        options: dict[str, Any] = {
            "EXPERTS": count, "BLOCK_E": power_of_two(count), "HAS_BIAS": self._down[0].bias is not None,
            "BLOCK_M": tile, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3,
        }  # fmt: skip
        launch(gate_and_up, (tiles, -(-inner // 64)), x, order, starts, tile_ends, first, first_bias, made, inner,
               size, CHOSEN=per_token, ACTIVATION=self._activation, **options)  # fmt: skip
        launch(down_product, (tiles, -(-size // 64)), made, order, starts, tile_ends, second, second_bias, weights, out,
               size, inner, **options)  # fmt: skip
        return out.view(tokens, per_token, size).sum(1).to(x.dtype)


def choose(logits: Tensor, per_token: int, *, renormalizes: bool, scale: float) -> tuple[Tensor, Tensor]:
    """See `Backend.choose`; the logits of a token adjacent."""
    tokens, count = logits.shape
    chosen = torch.empty((tokens, per_token), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, per_token), dtype=torch.float32, device=logits.device)
    launch(
        device.choose, (tokens,), logits, chosen, weights, logits.stride(0), count, scale, PER_TOKEN=per_token,
        BLOCK=power_of_two(count), BLOCK_K=power_of_two(per_token), RENORMALIZES=renormalizes, num_warps=1,
    )  # fmt: skip
    return chosen, weights


def sorted_rows(chosen: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts [tokens, k] -> (pairs of token and place, sorted by expert, int64; where each expert's begin,
    int64 [count + 1]; number of tiles up to and with each expert's, int64 [count])"""
    ordered, order = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=chosen.device))
    tiles = (starts.diff() + (tile - 1)).div(tile, rounding_mode="floor")
    return order, starts, tiles.cumsum(0)


def _addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """int64 [n], zeros for what is not there and of tensors without memory."""
    real = [0 if one is None or isinstance(one, FakeTensor) else one.data_ptr() for one in tensors]
    return torch.tensor(real, dtype=torch.int64, device=device)


def plain(weights: Sequence[PackedWeight]) -> list[PlainLinear] | None:
    """The same, if the kernels read them all: one type of floats, one shape, rows one behind the other."""
    found = [one for one in weights if isinstance(one, PlainLinear)]
    if len(found) < len(weights) or not found:
        return None
    first, has_bias = found[0].weight, found[0].bias is not None
    if any(
        one.weight.dtype is not first.dtype
        or one.weight.shape != first.shape
        or not one.weight.is_contiguous()
        or (one.bias is not None) is not has_bias
        or (not isinstance(one.weight, FakeTensor) and one.weight.data_ptr() % ALIGNMENT)
        for one in found
    ):
        return None
    return found if first.dtype in FLOATS else None
