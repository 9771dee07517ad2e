"""Weights in codes on NVIDIA GPUs: few rows are multiplied from the codes themselves, many by cuBLAS."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.backend import Quantization
from sensorium.kernels.cuda.device import linear as device
from sensorium.kernels.cuda.launch import FLOATS, launch
from sensorium.kernels.gpu import gpu_kernels
from sensorium.kernels.reference import QuantizedLinear
from sensorium.kernels.reference.fp4 import Fp4Linear

GROUPS = (32, 64, 128, 256)
FROM_CODES = 128  # rows that are: above, the matrix units wait for the codes
DEQUANTIZED = 16 * 1024 * 1024  # weights that are numbers at once
COLUMNS = 64


class CudaQuantizedLinear(QuantizedLinear):
    """Codes as the reference has them, but an int4 group's halves share bytes, so that both are read in one piece.
    Activations are not rounded."""

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
        if self.bits == 4:
            width = self._scales.shape[1] * self._group // 2
            self._codes = torch.zeros(out_features, width, dtype=torch.uint8, device=device)

    @property
    def kind(self) -> Literal["int8", "int4", "mxfp4"]:
        return "int8" if self.bits == 8 else "int4"

    def _pack(self, codes: Tensor) -> Tensor:
        padded = functional.pad(codes, (0, 2 * self._codes.shape[1] - codes.shape[1]))
        first, second = padded.view(len(codes), -1, 2, self._group // 2).unbind(2)
        return (first | (second << 4)).flatten(1)

    def _unpack(self, packed: Tensor) -> Tensor:
        halves = packed.view(len(packed), -1, 1, self._group // 2)
        return torch.cat((halves & 15, halves >> 4), 2).flatten(1)[:, : self.in_features]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= FROM_CODES and not gpu_kernels().is_compiling:
            out = torch.empty((len(rows), self.out_features), dtype=x.dtype, device=x.device)
            self._multiply(rows, out)
        else:
            out = multiply_as_numbers(self, rows)
        return out.view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor, out: Tensor) -> None:
        if self.bits == 8:
            self._launch(device.int8_product, rows, out, BLOCK_K=128)
            return
        zeros = self._scales if self._zeros is None else self._zeros
        self._launch(device.int4_product, rows, out, zeros, HAS_ZEROS=self._zeros is not None, GROUP=self._group)

    def _launch(self, kernel: Any, rows: Tensor, out: Tensor, *more: Tensor, **options: Any) -> None:
        """`more`: what the kernel takes behind codes and scales."""
        count, size = rows.shape
        tile = tile_of(count)
        grid = (-(-count // tile), -(-self.out_features // COLUMNS))
        bias = self._scales if self._bias is None else self._bias
        launch(kernel, grid, rows, self._codes, self._scales, *more, bias, out, count, self.out_features, size,
               rows.stride(0), HAS_BIAS=self._bias is not None, BLOCK_M=tile, BLOCK_N=COLUMNS, num_warps=4,
               num_stages=3, **options)  # fmt: skip


def tile_of(count: int) -> int:
    """Rows of x that a block has."""
    return 16 if count <= 16 else 64


def multiply_as_numbers(weight: QuantizedLinear, rows: Tensor) -> Tensor:
    """[n, in] -> [n, out] by cuBLAS, with parts of the weight that become numbers of the type of `rows`."""
    out = torch.empty((len(rows), weight.out_features), dtype=rows.dtype, device=rows.device)
    step = max(1, DEQUANTIZED // weight.in_features)
    for start in range(0, weight.out_features, step):
        some = slice(start, start + step)
        bias = None if weight._bias is None else weight._bias[some].to(rows.dtype)
        out[:, some] = functional.linear(rows, weight._weight(some).to(rows.dtype), bias)
    return out


class CudaFp4Linear(CudaQuantizedLinear, Fp4Linear):
    """mxfp4 weights as they are stored, two codes to a byte: a group's halves share bytes."""

    __slots__ = ()

    @property
    def kind(self) -> Literal["mxfp4"]:
        return "mxfp4"

    def _multiply(self, rows: Tensor, out: Tensor) -> None:
        self._launch(device.fp4_product, rows, out, BLOCK_K=64 if tile_of(len(rows)) == 16 else 32)


def suits(quantization: Quantization, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for such a weight."""
    return dtype in FLOATS and (quantization.bits == 8 or quantization.group in GROUPS)
