"""Unquantised weights in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.backend import Activation
from sensorium.kernels.reference.norms import activate


class PlainLinear:
    """A linear layer's weight as a plain tensor."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [out, in]
        self.bias: Tensor | None = None  # [out]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def mapped_bytes(self) -> int:
        return 0

    def fill(self, first_row: int, rows: Tensor) -> None:
        self.weight[first_row : first_row + rows.shape[0]].copy_(rows)

    def set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.to(self.weight, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        return activate(self(x), activation)

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices [n]."""
        return functional.embedding(ids, self.weight)


def empty_linear(out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> PlainLinear:
    """An unfilled weight [out, in]."""
    return PlainLinear(torch.empty(out_features, in_features, dtype=dtype, device=device))
