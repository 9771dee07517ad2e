"""Norms and activations in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sensorium.kernels.backend import Activation, PackedWeight
from sensorium.kernels.cuda.device import norms as device
from sensorium.kernels.cuda.launch import FLOATS, launch, power_of_two
from sensorium.kernels.reference import PlainLinear

WIDEST = 65536  # numbers of a row that one program holds
NUMBERS_OF_A_WARP = 1024  # of a row
PARTS_OF_A_WARP = 256  # of a row that is a sum, all of whose parts are in registers at once
FEW = 16  # tokens, each of which has a product of its own
NUMBERS_OF_A_PRODUCT = 8192  # of the weight, in the registers of a program
WIDEST_PRODUCT = 8192  # inputs
BLOCK = 1024  # numbers of a program of elementwise work
PLAIN: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh")


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels read such tensors: one type of floats, rows of at most `WIDEST` adjacent numbers."""
    same = all(one.dtype is x.dtype and one.is_contiguous() for one in others)
    return same and x.dtype in FLOATS and x.stride(-1) == 1 and 0 < x.shape[-1] <= WIDEST


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [.., size]; see `Backend.rms_norm`."""
    rows = x.view(-1, x.shape[-1]) if x.is_contiguous() or x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = torch.empty((len(rows), x.shape[-1]), dtype=x.dtype, device=x.device)
    _start(rows, None, None, weight, out, eps, offset)
    return out.view(x.shape)


@dataclass(frozen=True, slots=True)
class Summands:
    """States that are still to be added up: what each token's experts give, float32 [tokens, experts of a token, size],
    and what all tokens take besides [tokens, size], times the sigmoid of `gate` [tokens, 1]; or, with `norms`, the sum
    of the norms of what experts give and of what all tokens take."""

    parts: Tensor
    shared: Tensor | None = None
    gate: Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None


def add_rms_norm(
    x: Tensor | Summands,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    first: Tensor | None = None,
    wide: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Contiguous tensors. The sum is written into `residual`. `first`: the weight of a norm of `x` before. `factor`
    [1]: the sum is multiplied by it. To float32 `wide` go the same numbers as to the norm."""
    out = torch.empty_like(residual)
    rows = x.view(-1, x.shape[-1]) if isinstance(x, Tensor) else x
    _start(rows, residual, first, weight, out, eps, offset, wide, factor)
    return out, residual


def _start(
    rows: Tensor | Summands,
    residual: Tensor | None,
    first: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    offset: float,
    wide: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    size = out.shape[-1]
    total = out if residual is None else residual
    block = power_of_two(size)
    sums = rows if isinstance(rows, Summands) else Summands(rows)
    per_token = 0 if isinstance(rows, Tensor) else rows.parts.shape[1]
    parts_norm, shared_norm = (None, None) if sums.norms is None else sums.norms
    others = [total if one is None else one for one in (wide, sums.shared, sums.gate, factor, parts_norm, shared_norm)]
    launch(
        device.rms_norm, (out.numel() // size,), sums.parts, total, weight if first is None else first, weight, out,
        total, *others, eps, offset, sums.parts.stride(0), size, 0 if sums.gate is None else sums.gate.stride(0),
        BLOCK=block, ADDS=residual is not None, IS_NORMED=first is not None, HAS_OFFSET=offset != 0, PARTS=per_token,
        HAS_SHARED=sums.shared is not None, HAS_GATE=sums.gate is not None,
        ARE_NORMED=sums.norms is not None, IS_WIDE=wide is not None, HAS_FACTOR=factor is not None,
        num_warps=min(16, max(1, block // (PARTS_OF_A_WARP if per_token else NUMBERS_OF_A_WARP))),
    )  # fmt: skip


def add_normed(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual + the norm of x, [tokens, size], both contiguous"""
    total, block = torch.empty_like(residual), power_of_two(residual.shape[1])
    launch(
        device.add_normed, (len(residual),), x, residual, weight, total, eps, residual.shape[1], BLOCK=block,
        num_warps=min(16, max(1, block // NUMBERS_OF_A_WARP)),
    )  # fmt: skip
    return total


def branching_norms(
    x: Tensor, residual: Tensor, first: Tensor, weights: tuple[Tensor, Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `residual`, to which the norm of x by `first` is added, a norm by each of the weights. All contiguous."""
    tokens, size = residual.shape
    one, other, third = (torch.empty_like(residual) for _ in weights)
    block = power_of_two(size)
    launch(
        device.branching_norms, (tokens,), x, residual, first, *weights, residual, one, other, third, eps, size,
        BLOCK=block, num_warps=min(16, max(1, block // NUMBERS_OF_A_WARP)),
    )  # fmt: skip
    return one, other, third


def gated(x: Tensor, activation: Activation) -> Tensor:
    """x [.., 2 * n], contiguous."""
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    launch(device.gated, (rows, -(-size // BLOCK)), x, out, size, BLOCK=BLOCK, ACTIVATION=activation, num_warps=4)
    return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x contiguous; written over."""
    count = x.numel()
    launch(device.activate, (-(-count // BLOCK),), x, x, count, BLOCK=BLOCK, ACTIVATION=activation, num_warps=4)
    return x


def token_gates(
    x: Tensor, residual: Tensor, first: Tensor, gate: PackedWeight, rows: Tensor, eps: float, activation: Activation
) -> tuple[Tensor, Tensor]:
    """(activation(gate(total)) * rows [tokens, size], total = residual + the norm of x by `first`), in one launch for a
    few tokens, each of which reads all of a plain weight. `rows` may be a strided view."""
    tokens, size = x.shape
    block = power_of_two(size)
    if not (isinstance(gate, PlainLinear) and gate.bias is None and tokens <= FEW and block <= WIDEST_PRODUCT):
        total = add_normed(x, residual, first, eps)
        made = gate(total)
        out = torch.empty_like(made)
        launch(
            device.activate_mul, (tokens, -(-made.shape[1] // BLOCK)), made, rows, out, made.shape[1], rows.stride(0),
            BLOCK=BLOCK, ACTIVATION=activation, num_warps=4,
        )  # fmt: skip
        return out, total
    inner = len(gate.weight)
    columns = max(1, NUMBERS_OF_A_PRODUCT // block)
    total, out = torch.empty_like(residual), torch.empty((tokens, inner), dtype=x.dtype, device=x.device)
    launch(
        device.token_gates, (tokens, -(-inner // columns)), x, residual, first, gate.weight, rows, total, out, eps,
        size, inner, rows.stride(0), BLOCK=block, BLOCK_N=columns, ACTIVATION=activation, num_warps=8,
    )  # fmt: skip
    return out, total
