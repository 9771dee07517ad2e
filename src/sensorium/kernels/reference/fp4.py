"""mxfp4 weights in plain torch, on any device: codes of E2M1 in groups of 32 inputs whose scales are powers of two.

Weights and activations are multiplied as they are: no code of them is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sensorium.kernels.backend import Quantization
from sensorium.kernels.reference.quantized import QuantizedLinear

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are the same below zero
BIAS = 127  # of a scale's exponent


class Fp4Linear(QuantizedLinear):
    """A linear layer's weight as codes, two to a byte, with the methods of the native `Fp4Linear`."""

    __slots__ = ()

    def __init__(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(out_features, in_features, quantization, dtype=dtype, device=device)
        self._scales = torch.zeros_like(self._scales, dtype=torch.uint8)

    def fill(self, first_row: int, rows: Tensor) -> None:
        raise TypeError("mxfp4 weights are filled with codes as they are stored")

    def _rounded(self, x: Tensor) -> Tensor:
        return x.float()

    def _weight(self, rows: slice | Tensor) -> Tensor:
        return decode(self._unpack(self._codes[rows]), self._scales[rows])


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """codes uint8 [n, in], a code each; scales uint8 [n, in / 32] -> float32 [n, in]"""
    numbers = torch.tensor((*NUMBERS, *(-one for one in NUMBERS)), device=codes.device)
    grouped = numbers[codes.int()].view(*scales.shape, -1)
    return torch.ldexp(grouped, (scales.int() - BIAS).unsqueeze(2)).flatten(1)
