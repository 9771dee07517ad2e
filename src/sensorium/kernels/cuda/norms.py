"""Norms and activations in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sensorium.kernels.backend import Activation
from sensorium.kernels.cuda.device import norms as device
from sensorium.kernels.cuda.launch import FLOATS, launch, power_of_two

WIDEST = 65536  # numbers of a row that one program holds
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
    and what all tokens take besides [tokens, size], times the sigmoid of `gate` [tokens, 1]."""

    parts: Tensor
    shared: Tensor | None = None
    gate: Tensor | None = None


def add_rms_norm(
    x: Tensor | Summands,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    first: Tensor | None = None,
    wide: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Contiguous tensors. The sum is written into `residual`. `first`: the weight of a norm of `x` before. To float32
    `wide` go the same numbers as to the norm."""
    out = torch.empty_like(residual)
    rows = x.view(-1, x.shape[-1]) if isinstance(x, Tensor) else x
    _start(rows, residual, first, weight, out, eps, offset, wide)
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
) -> None:
    size = out.shape[-1]
    total = out if residual is None else residual
    block = power_of_two(size)
    sums = rows if isinstance(rows, Summands) else Summands(rows)
    shared, gate = sums.shared, sums.gate
    per_token = 0 if isinstance(rows, Tensor) else rows.parts.shape[1]
    launch(
        device.rms_norm, (out.numel() // size,), sums.parts, total, weight if first is None else first, weight, out,
        total, total if wide is None else wide, total if shared is None else shared, total if gate is None else gate,
        eps, offset, sums.parts.stride(0), size, 0 if gate is None else gate.stride(0), BLOCK=block,
        ADDS=residual is not None, IS_NORMED=first is not None, HAS_OFFSET=offset != 0, PARTS=per_token,
        HAS_SHARED=shared is not None, HAS_GATE=gate is not None, IS_WIDE=wide is not None,
        num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip


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
