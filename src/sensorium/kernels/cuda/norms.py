"""Norms and activations in Triton."""

from __future__ import annotations

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


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both contiguous. The sum is written into `residual`. `first`: the weight of a norm of `x` before."""
    out = torch.empty_like(x)
    _start(x.view(-1, x.shape[-1]), residual, first, weight, out, eps, offset)
    return out, residual


def _start(
    rows: Tensor, residual: Tensor | None, first: Tensor | None, weight: Tensor, out: Tensor, eps: float, offset: float
) -> None:
    count, size = rows.shape
    total = out if residual is None else residual
    block = power_of_two(size)
    launch(
        device.rms_norm, (count,), rows, total, weight if first is None else first, weight, out, total, eps, offset,
        rows.stride(0), size, BLOCK=block, ADDS=residual is not None, IS_NORMED=first is not None,
        HAS_OFFSET=offset != 0, num_warps=min(16, max(1, block // 1024)),
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
