"""The experts of a routed layer in Triton: two launches for all of them, and one before that orders many pairs of token
and expert. No number is read from the device."""

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
from sensorium.kernels.cuda.norms import Summands, gated
from sensorium.kernels.reference import PlainLinear

FEW = 16  # rows of an expert, on average, up to which tiles are small
ALIGNMENT = 16  # bytes
FOUND = 512  # pairs of token and expert of which each program finds its own
FEW_FOUND = 64  # of them for which less is compared
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


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """What all tokens take: gate and up [2 * inner, size] and down [size, inner], of the experts' type."""

    gate_up: Tensor
    down: Tensor

    @property
    def inner(self) -> int:
        return self.down.shape[1]


class CudaExperts:
    """See `backend.Experts`. The weights must stay where they are while it lives."""

    __slots__ = ("_activation", "_down", "_gate_up", "_tables")

    def __init__(self, gate_up: Matrices, down: Matrices, activation: Activation) -> None:
        self._gate_up, self._down, self._activation = gate_up, down, activation
        self._tables = (gate_up.tables(), down.tables())

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return add_up(self.summands(x, chosen, weights), x.dtype)

    def summands(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        shared: SharedExpert | None = None,
        shared_x: Tensor | None = None,
    ) -> Summands:
        """What is still to be added up, in two launches and at most one before them. `shared`: what all tokens take of
        `shared_x`, or of x."""
        (tokens, per_token), size, inner = chosen.shape, x.shape[1], self._down.size
        order = order_of(chosen, len(self._down.weights))
        made = torch.empty((tokens * per_token, inner), dtype=x.dtype, device=x.device)
        out = torch.empty((tokens, per_token, size), dtype=torch.float32, device=x.device)
        numbers = tokens * per_token, order.tiles, tokens
        options = self._options(order) | {"HAS_SHARED": shared is not None}
        own, widest, more = (made, x, made), inner, 0  # inner states, gate and up, what is given
        if shared is not None:
            also = torch.empty((tokens, shared.inner), dtype=x.dtype, device=x.device)
            own, widest = (also, shared.gate_up, torch.empty_like(x)), max(inner, shared.inner)
            more = -(-tokens // order.rows)
        shared_inner = 0 if shared is None else shared.inner
        given, (first, second) = x if shared_x is None else shared_x, self._tables
        launch(
            gate_and_up, (order.tiles + more, -(-widest // 64)), x, *order.tables, *first, made, inner, size, *numbers,
            given, own[1], own[0], shared_inner, CHOSEN=per_token, ACTIVATION=self._activation, IS_ALONE=False,
            **options,
        )  # fmt: skip
        launch(
            down_product, (order.tiles + more, -(-size // 64)), made, *order.tables, *second, weights, out, size, inner,
            *numbers, own[0], own[1] if shared is None else shared.down, own[2], shared_inner, **options,
        )  # fmt: skip
        return Summands(out, None if shared is None else own[2])

    def _options(self, order: Order) -> dict[str, Any]:
        """What both kernels are compiled for."""
        count, is_fp4 = len(self._down.weights), self._down.is_fp4
        return {
            "EXPERTS": count, "BLOCK_E": power_of_two(count), "HAS_BIAS": self._down.biases[0] is not None,
            "FP4": is_fp4, "BLOCK_M": order.rows, "BLOCK_N": 64, "BLOCK_K": 32 if is_fp4 and order.rows > 16 else 64,
            "BLOCK_P": order.compared, "num_warps": 4, "num_stages": 4 if is_fp4 else 3,
        }  # fmt: skip

    def shareable(self, gate_up: PackedWeight | None, down: PackedWeight | None) -> SharedExpert | None:
        """An MLP that all tokens take, if these kernels compute it with the experts."""
        weights = [one.weight for one in (gate_up, down) if isinstance(one, PlainLinear) and one.bias is None]
        dtype = None if self._down.is_fp4 else self._down.weights[0].dtype
        if len(weights) < 2 or not all(_is_aligned(one) and one.dtype is dtype for one in weights):
            return None
        return SharedExpert(weights[0], weights[1])


def gate_and_up_of(x: Tensor, weight: PackedWeight, activation: Activation) -> Tensor:
    """activation(gate) * up of an MLP's first product, [tokens, 2 * inner] before: one launch for a few tokens and a
    plain weight, which is the part of `gate_and_up` for what all tokens take."""
    if not (isinstance(weight, PlainLinear) and weight.bias is None and len(x) <= FEW and _is_aligned(weight.weight)):
        return gated(weight(x), activation)
    inner, tensor = len(weight.weight) // 2, weight.weight
    out = torch.empty((len(x), inner), dtype=x.dtype, device=x.device)
    none = (x,) * 6  # orders and addresses
    launch(
        gate_and_up, (1, -(-inner // 64)), x, *none, out, inner, x.shape[1], 0, 0, len(x), x, tensor, out, inner,
        CHOSEN=1, EXPERTS=1, BLOCK_E=1, ACTIVATION=activation, HAS_BIAS=False, FP4=False, HAS_SHARED=True,
        IS_ALONE=True, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, BLOCK_P=FEW_FOUND, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def add_up(sums: Summands, dtype: torch.dtype) -> Tensor:
    """[tokens, size]"""
    tokens, per_token, size = sums.parts.shape
    total = torch.empty((tokens, size), dtype=dtype, device=sums.parts.device)
    shared, gate = sums.shared, sums.gate
    launch(
        device.add_up, (tokens, -(-size // BLOCK)), sums.parts, total if shared is None else shared,
        total if gate is None else gate, 0 if gate is None else gate.stride(0), total, size, PER_TOKEN=per_token,
        HAS_SHARED=shared is not None, HAS_GATE=gate is not None, BLOCK=BLOCK, num_warps=4,
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
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Backend.choose`; the logits of a token adjacent. With a `correction`, as `RoutedParts` has it, or with
    `factors` float32 [experts] of the weights."""
    tokens, count = logits.shape
    chosen = torch.empty((tokens, per_token), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, per_token), dtype=torch.float32, device=logits.device)
    launch(
        device.choose, (tokens,), logits, logits if correction is None else correction,
        logits if factors is None else factors, chosen, weights, logits.stride(0), count, scale, PER_TOKEN=per_token,
        BLOCK=power_of_two(count), BLOCK_K=power_of_two(per_token), RENORMALIZES=renormalizes,
        CORRECTED=correction is not None, GROUPS=groups, BLOCK_G=power_of_two(groups), GROUPS_TAKEN=groups_per_token,
        HAS_FACTORS=factors is not None, num_warps=1,
    )  # fmt: skip
    return chosen, weights


@dataclass(frozen=True, slots=True)
class Order:
    """Which pairs of token and expert are computed together."""

    tables: tuple[Tensor, Tensor, Tensor]  # see `sorted_rows`; thrice the chosen experts where each program compares
    tiles: int  # at most
    rows: int  # of a tile
    compared: int  # pairs that a program compares, at most; 0: they are sorted


def order_of(chosen: Tensor, count: int) -> Order:
    """Of `count` experts; chosen int64 [tokens, k]"""
    pairs, chosen = chosen.numel(), chosen.contiguous()
    rows = 16 if pairs <= FEW * count else 64
    if rows == 16 and pairs <= FOUND:
        return Order((chosen,) * 3, pairs, rows, FEW_FOUND if pairs <= FEW_FOUND else FOUND)
    tiles = min(pairs, pairs // rows + count)  # every expert has one that is not full
    return Order(sorted_rows(chosen, count, rows), tiles, rows, 0)


def sorted_rows(chosen: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts [tokens, k] -> (pairs of token and place, sorted by expert, int64; where each expert's begin,
    int64 [count + 1]; number of tiles up to and with each expert's, int64 [count])"""
    if (pairs := chosen.numel()) <= COMPARED:
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
        one.dtype is first.dtype and one.shape == first.shape and (bias is not None) is has_bias and _is_aligned(one)
        for one, bias in zip(found.weights, found.biases, strict=True)
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether its rows are adjacent and can be read in wide pieces."""
    return tensor.is_contiguous() and (isinstance(tensor, FakeTensor) or tensor.data_ptr() % ALIGNMENT == 0)
