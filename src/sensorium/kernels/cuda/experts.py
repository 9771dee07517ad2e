"""The experts of a routed layer in Triton: two launches for all of them, and no number read from the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sensorium.kernels.backend import Activation, PackedWeight
from sensorium.kernels.cuda.device import experts as device
from sensorium.kernels.cuda.device.experts import down_product, gate_and_up
from sensorium.kernels.cuda.launch import FLOATS, launch, power_of_two
from sensorium.kernels.cuda.linear import CudaFp4Linear
from sensorium.kernels.reference import PlainLinear

FEW = 16  # rows of an expert, on average, up to which tiles are small
ALIGNMENT = 16  # bytes
COMPARED = 4096  # pairs of token and expert that are sorted by comparing each with each
PLACED = 16  # of them by one program
BLOCK = 1024  # numbers of a program of elementwise work


@dataclass(frozen=True, slots=True)
class Matrices:
    """The same weight [rows, size] of every expert."""

    rows: int
    size: int
    is_fp4: bool
    weights: list[Tensor]
    scales: list[Tensor | None]
    biases: list[Tensor | None]

    def tables(self) -> list[Tensor]:
        """Addresses of weights, scales and biases, int64 [experts] each, zeros for what is not there."""
        return [_addresses(part, self.weights[0].device) for part in (self.weights, self.scales, self.biases)]


class CudaExperts:
    """See `backend.Experts`. The weights must stay where they are while it lives."""

    __slots__ = ("_activation", "_down", "_gate_up", "_tables")

    def __init__(self, gate_up: Matrices, down: Matrices, activation: Activation) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, activation
        self._tables = (gate_up.tables(), down.tables())

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, shared: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """`shared` [tokens, hidden], which is added to the sum, times the sigmoid of `gate` [tokens, 1]."""
        tokens, per_token = chosen.shape
        size, inner, count = x.shape[1], self._down.size, len(self._down.weights)
        pairs = tokens * per_token
        tile = 16 if pairs <= FEW * count else 64
        order, starts, tile_ends = sorted_rows(chosen, count, tile)
        made = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
        out = torch.empty((pairs, size), dtype=torch.float32, device=x.device)
        tiles = min(pairs, pairs // tile + count)  # at most: every expert has one that is not full
        stages = 4 if self._down.is_fp4 else 3
        block = 32 if self._down.is_fp4 and tile > 16 else 64
        first, second = self._tables
        options: dict[str, Any] = {
            "EXPERTS": count, "BLOCK_E": power_of_two(count), "HAS_BIAS": self._down.biases[0] is not None,
            "FP4": self._down.is_fp4, "BLOCK_M": tile, "BLOCK_N": 64, "BLOCK_K": block, "num_warps": 4,
            "num_stages": stages,
        }  # fmt: skip
        launch(gate_and_up, (tiles, -(-inner // 64)), x, order, starts, tile_ends, *first, made, inner, size,
               CHOSEN=per_token, ACTIVATION=self._activation, **options)  # fmt: skip
        launch(down_product, (tiles, -(-size // 64)), made, order, starts, tile_ends, *second, weights, out, size,
               inner, **options)  # fmt: skip
        total = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
        launch(
            device.add_up, (tokens, -(-size // BLOCK)), out, total if shared is None else shared,
            total if gate is None else gate, total, size, PER_TOKEN=per_token, HAS_SHARED=shared is not None,
            HAS_GATE=gate is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return total


def choose(
    logits: Tensor,
    per_token: int,
    *,
    renormalizes: bool,
    scale: float,
    correction: Tensor | None = None,
    groups: int = 1,
    groups_per_token: int = 1,
) -> tuple[Tensor, Tensor]:
    """See `Backend.choose`; the logits of a token adjacent. With a `correction`, as `RoutedParts` has it."""
    tokens, count = logits.shape
    chosen = torch.empty((tokens, per_token), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, per_token), dtype=torch.float32, device=logits.device)
    launch(
        device.choose, (tokens,), logits, logits if correction is None else correction, chosen, weights,
        logits.stride(0), count, scale, PER_TOKEN=per_token, BLOCK=power_of_two(count), BLOCK_K=power_of_two(per_token),
        RENORMALIZES=renormalizes, CORRECTED=correction is not None, GROUPS=groups, BLOCK_G=power_of_two(groups),
        GROUPS_TAKEN=groups_per_token, num_warps=1,
    )  # fmt: skip
    return chosen, weights


def sorted_rows(chosen: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts [tokens, k] -> (pairs of token and place, sorted by expert, int64; where each expert's begin,
    int64 [count + 1]; number of tiles up to and with each expert's, int64 [count])"""
    if (pairs := chosen.numel()) <= COMPARED:
        chosen = chosen.contiguous()
        empty = functools.partial(torch.empty, dtype=torch.int64, device=chosen.device)
        order, starts, tile_ends = empty(pairs), empty(count + 1), empty(count)
        launch(
            device.arrange, (-(-pairs // PLACED) + 1,), chosen, order, starts, tile_ends, pairs, EXPERTS=count,
            BLOCK_E=power_of_two(count), BLOCK_M=tile, ROWS=PLACED, BLOCK_P=64, num_warps=4,
        )  # fmt: skip
        return order, starts, tile_ends
    ordered, order = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=chosen.device))
    tiles = (starts.diff() + (tile - 1)).div(tile, rounding_mode="floor")
    return order, starts, tiles.cumsum(0)


def _addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """int64 [n], zeros for what is not there and of tensors without memory."""
    real = [0 if one is None or isinstance(one, FakeTensor) else one.data_ptr() for one in tensors]
    return torch.tensor(real, dtype=torch.int64, device=device)


def readable(weights: Sequence[PackedWeight]) -> Matrices | None:
    """The same, if the kernels read them all: one type of floats or mxfp4, one shape, rows one behind the other."""
    plain = [one for one in weights if isinstance(one, PlainLinear)]
    if plain and len(plain) == len(weights):
        rows, size = plain[0].weight.shape
        found = Matrices(
            rows, size, False, [one.weight for one in plain], [None] * len(plain), [one.bias for one in plain]
        )
        return found if found.weights[0].dtype in FLOATS and _are_alike(found) else None
    codes = [one for one in weights if isinstance(one, CudaFp4Linear)]
    if not codes or len(codes) < len(weights):
        return None
    packed, scales, biases = (list(part) for part in zip(*(one.codes for one in codes), strict=True))
    found = Matrices(codes[0].out_features, codes[0].in_features, True, packed, scales, biases)
    return found if _are_alike(found) else None


def _are_alike(found: Matrices) -> bool:
    first, has_bias = found.weights[0], found.biases[0] is not None
    return all(
        one.dtype is first.dtype
        and one.shape == first.shape
        and one.is_contiguous()
        and (bias is not None) is has_bias
        and (isinstance(one, FakeTensor) or one.data_ptr() % ALIGNMENT == 0)
        for one, bias in zip(found.weights, found.biases, strict=True)
    )
