"""fp8 in plain torch, on any device: numbers of e4m3, and weights of them with scales.

Activations become such numbers on the way in, with a scale per row, or per row and group of inputs where the weight has
one for each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sensorium.kernels.reference.quantized import QuantizedLinear, in_groups

E4M3 = torch.float8_e4m3fn
MOST = 448.0  # the largest number


def to_fp8(x: Tensor) -> Tensor:
    """The bytes of the nearest e4m3 numbers; beyond the largest one, of that."""
    return x.float().clamp(-MOST, MOST).to(E4M3).view(torch.uint8)


def quantize_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[n, in] -> (bytes of e4m3 [n, in], scales float32 [n, groups]): the largest number of a group becomes 448."""
    wide = in_groups(x.float(), group)
    scales = wide.abs().amax(2, keepdim=True) / MOST
    codes = to_fp8(wide / torch.where(scales > 0, scales, 1.0))
    return codes.flatten(1)[:, : x.shape[1]], scales.squeeze(2)


def dequantize_fp8(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """The other way, float32."""
    return (in_groups(codes.view(E4M3).float(), group) * scales.unsqueeze(2)).flatten(1)[:, : codes.shape[1]]


class Fp8Linear(QuantizedLinear):
    """A linear layer's weight as bytes of e4m3 [out, in] and float32 scales [out, groups]."""

    __slots__ = ()

    def _quantized(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8(rows, self._group)

    def _rounded(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return dequantize_fp8(*quantize_fp8(rows, self._group), self._group).view(x.shape)

    def _weight(self, rows: slice | Tensor) -> Tensor:
        return dequantize_fp8(self._codes[rows], self._scales[rows], self._group)
