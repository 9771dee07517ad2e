"""The experts of a routed layer in Triton: two launches for all of them, and one before that orders many pairs of token
and expert. No number is read from the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sensorium.kernels.backend import Activation, PackedWeight
from sensorium.kernels.cuda.device import experts as device
from sensorium.kernels.cuda.device.experts import down_product, gate_and_up
from sensorium.kernels.cuda.fp8 import CudaFp8Linear
from sensorium.kernels.cuda.launch import FLOATS, launch, power_of_two
from sensorium.kernels.cuda.linear import CudaQuantizedLinear
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
class Layout:
    """How the kernels read a weight."""

    kind: Literal["plain", "mxfp4", "int4", "int8", "fp8"]
    scaled: int = 0  # inputs that share a scale; 0: all, or there is none
    has_zeros: bool = False
    has_bias: bool = False

    def options(self, rows: int) -> dict[str, Any]:
        """What kernels with tiles of so many rows are compiled for."""
        widest = 64 if rows > FEW or self.kind == "plain" else 128  # bytes
        steps = {"plain": 64, "mxfp4": 32 if rows > FEW else 64, "int4": min(self.scaled // 2, 64), "int8": widest,
                 "fp8": min(self.scaled or widest, widest)}  # fmt: skip
        sums_parts = self.scaled > 0 and self.kind != "mxfp4"
        return {
            "LAYOUT": self.kind, "SCALED": self.scaled, "HAS_ZEROS": self.has_zeros, "HAS_BIAS": self.has_bias,
            "BLOCK_K": steps[self.kind], "num_stages": {"mxfp4": 4, "int4": 3 if rows <= FEW else 2}.get(self.kind, 3),
            "num_warps": 4, "BLOCK_N": 32 if sums_parts and rows > FEW else 64,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [rows, size] as numbers or codes, with what belongs to them."""

    rows: int
    size: int
    layout: Layout
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers or codes, scales and zeros; the weight stands for what is not there."""
        return (
            self.weight,
            self.weight if self.scales is None else self.scales,
            self.weight if self.zeros is None else self.zeros,
        )


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """What all tokens take: gate and up [2 * inner, size] and down [size, inner], in the experts' layouts."""

    gate_up: Matrix
    down: Matrix

    @property
    def inner(self) -> int:
        return self.down.size


class CudaExperts:
    """See `backend.Experts`. The weights must stay where they are while it lives."""

    __slots__ = ("_activation", "_down", "_gate_up", "_tables")

    def __init__(self, gate_up: Sequence[Matrix], down: Sequence[Matrix], activation: Activation) -> None:
        self._gate_up, self._down, self._activation = list(gate_up), list(down), activation
        self._tables = (_addresses(gate_up), _addresses(down))

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
        (tokens, per_token), size, inner = chosen.shape, x.shape[1], self._down[0].size
        order = order_of(chosen, len(self._down))
        made = torch.empty((tokens * per_token, inner), dtype=x.dtype, device=x.device)
        out = torch.empty((tokens, per_token, size), dtype=torch.float32, device=x.device)
        numbers = tokens * per_token, order.tiles, tokens
        parts: tuple[tuple[Tensor, ...], ...] = ((x,) * 3,) * 2  # of what all tokens take
        also, given, widest, more = made, made, inner, 0  # its inner states, what it gives
        if shared is not None:
            also = torch.empty((tokens, shared.inner), dtype=x.dtype, device=x.device)
            given, widest, more = torch.empty_like(x), max(inner, shared.inner), -(-tokens // order.rows)
            parts = shared.gate_up.parts(), shared.down.parts()
        shared_inner = 0 if shared is None else shared.inner
        states, (first, second) = x if shared_x is None else shared_x, self._tables
        options = self._options(order) | {"HAS_SHARED": shared is not None}
        making, giving = (one[0].layout.options(order.rows) for one in (self._gate_up, self._down))
        launch(
            gate_and_up, (order.tiles + more, -(-widest // making["BLOCK_N"])), x, *order.tables, first, made, inner,
            size, *numbers, states, *parts[0], also, shared_inner, CHOSEN=per_token, ACTIVATION=self._activation,
            IS_ALONE=False, **options, **making,
        )  # fmt: skip
        launch(
            down_product, (order.tiles + more, -(-size // giving["BLOCK_N"])), made, *order.tables, second, weights,
            out, size, inner, *numbers, also, *parts[1], given, shared_inner, **options, **giving,
        )  # fmt: skip
        return Summands(out, None if shared is None else given)

    def _options(self, order: Order) -> dict[str, Any]:
        """What both kernels are compiled for, whatever the layout."""
        count = len(self._down)
        return {
            "EXPERTS": count, "BLOCK_E": power_of_two(count), "BLOCK_M": order.rows,
            "BLOCK_P": order.compared,
        }  # fmt: skip

    def shareable(self, gate_up: PackedWeight | None, down: PackedWeight | None) -> SharedExpert | None:
        """An MLP that all tokens take, if these kernels compute it with the experts."""
        first, second = matrix_of(gate_up), matrix_of(down)
        if first is None or second is None:
            return None
        pairs = ((first, self._gate_up[0]), (second, self._down[0]))
        if all(_is_alike(one, replace(own, layout=replace(own.layout, has_bias=False))) for one, own in pairs):
            return SharedExpert(first, second)
        return None


def gate_and_up_of(x: Tensor, weight: PackedWeight, activation: Activation) -> Tensor:
    """activation(gate) * up of an MLP's first product, [tokens, 2 * inner] before: one launch for a few tokens and a
    plain weight, which is the part of `gate_and_up` for what all tokens take."""
    if not (isinstance(weight, PlainLinear) and weight.bias is None and len(x) <= FEW and _is_aligned(weight.weight)):
        return gated(weight(x), activation)
    inner, tensor = len(weight.weight) // 2, weight.weight
    out = torch.empty((len(x), inner), dtype=x.dtype, device=x.device)
    none = (x,) * 4  # orders and addresses
    options = Layout("plain").options(FEW) | {"num_stages": 2}
    launch(
        gate_and_up, (1, -(-inner // 64)), x, *none, out, inner, x.shape[1], 0, 0, len(x), x, tensor, tensor, tensor,
        out, inner, CHOSEN=1, EXPERTS=1, BLOCK_E=1, ACTIVATION=activation, HAS_SHARED=True, IS_ALONE=True, BLOCK_M=16,
        BLOCK_P=FEW_FOUND, **options,
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


def _addresses(matrices: Sequence[Matrix]) -> Tensor:
    """int64 [4, n] of weights, scales, zeros and biases; 0 for what is not there and for tensors without memory."""
    parts = zip(*((one.weight, one.scales, one.zeros, one.bias) for one in matrices), strict=True)
    real = [[0 if one is None or isinstance(one, FakeTensor) else one.data_ptr() for one in part] for part in parts]
    return torch.tensor(real, dtype=torch.int64, device=matrices[0].weight.device)


def readable(weights: Sequence[PackedWeight]) -> list[Matrix] | None:
    """The same, if the kernels read them all: one layout, one shape, rows one behind the other."""
    found = [one for one in map(matrix_of, weights) if one is not None]
    is_whole = bool(found) and len(found) == len(weights)
    return found if is_whole and all(_is_alike(one, found[0], of_one_shape=True) for one in found) else None


def matrix_of(weight: PackedWeight | None) -> Matrix | None:
    """None: the kernels do not read it."""
    found: Matrix | None = None
    if isinstance(weight, PlainLinear) and weight.weight.dtype in FLOATS:
        layout = Layout("plain", has_bias=weight.bias is not None)
        rows, size = weight.weight.shape
        found = Matrix(rows, size, layout, weight.weight, bias=weight.bias)
    elif isinstance(weight, CudaQuantizedLinear | CudaFp8Linear):
        codes, scales, zeros, bias = weight.parts
        layout = Layout(weight.kind, weight.scaled_together, zeros is not None, bias is not None)
        found = Matrix(weight.out_features, weight.in_features, layout, codes, scales, zeros, bias)
    if found is None or not all(map(_is_aligned, (*found.parts(), *(() if found.bias is None else (found.bias,))))):
        return None
    return found


def _is_alike(one: Matrix, other: Matrix, *, of_one_shape: bool = False) -> bool:
    is_same = one.layout == other.layout and one.weight.dtype is other.weight.dtype
    return is_same and not (of_one_shape and (one.rows, one.size) != (other.rows, other.size))


def _is_aligned(tensor: Tensor) -> bool:
    """Whether its rows are adjacent and can be read in wide pieces."""
    return tensor.is_contiguous() and (isinstance(tensor, FakeTensor) or tensor.data_ptr() % ALIGNMENT == 0)
