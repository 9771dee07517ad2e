"""fp8 weights on NVIDIA GPUs: from sm_89 on both sides of a product are e4m3, before activations stay as they are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from sensorium.kernels.cuda.device import fp8 as device
from sensorium.kernels.cuda.launch import has_fp8, launch, power_of_two
from sensorium.kernels.cuda.linear import FROM_CODES, multiply_as_numbers
from sensorium.kernels.gpu import gpu_kernels
from sensorium.kernels.reference import Fp8Linear
from sensorium.kernels.reference.fp8 import E4M3

ALIGNMENT = 16  # sides of a product that torch's scaled one takes are multiples of it
TILES = ((16, 16, 64, 4), (256, 64, 64, 4), (1 << 40, 128, 64, 8))  # (up to so many rows: rows, columns and warps)
TILE = 1024  # numbers of groups that a program makes codes of


class CudaFp8Linear(Fp8Linear):
    """Products in bfloat16 with a scale per output are torch's (cuBLAS, CUTLASS); those in groups, of other types and
    of odd sizes are ours."""

    __slots__ = ()

    @property
    def kind(self) -> Literal["fp8"]:
        return "fp8"

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if gpu_kernels().is_compiling or not (has_fp8() or len(rows) <= FROM_CODES):
            out = multiply_as_numbers(self, rows)
        elif not has_fp8():
            out = self._multiply(rows, None)
        else:
            codes, scales = quantize_rows(rows, self._group)
            out = self._scaled(codes, scales) if self._suits_torch(x.dtype) else self._multiply(codes, scales, x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _suits_torch(self, dtype: torch.dtype) -> bool:
        is_aligned = self.out_features % ALIGNMENT == self.in_features % ALIGNMENT == 0
        return dtype == torch.bfloat16 and is_aligned and self._scales.shape[1] == 1

    def _scaled(self, codes: Tensor, scales: Tensor) -> Tensor:
        by_row = ScalingType.RowWise
        bias = None if self._bias is None else self._bias.bfloat16()
        weight = self._codes.view(E4M3).t()
        return scaled_mm(
            codes, weight, scales, by_row, self._scales.t(), by_row, bias=bias, output_dtype=torch.bfloat16
        )

    def _multiply(self, rows: Tensor, scales: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """`rows` as they are, or, with `scales`, as e4m3; the result has `dtype`, or theirs."""
        count, size = rows.shape
        out = torch.empty((count, self.out_features), dtype=dtype or rows.dtype, device=rows.device)
        tile, columns, warps = next(tiles for most, *tiles in TILES if count <= most)
        grid = (-(-count // tile), -(-self.out_features // columns))
        bias = self._scales if self._bias is None else self._bias
        group = 0 if self._scales.shape[1] == 1 else self._group
        options: dict[str, Any] = {
            "GROUP": group,
            "BLOCK_M": tile,
            "BLOCK_N": columns,
            "BLOCK_K": min(group or 128, 128),
        }
        launch(
            device.fp8_product, grid, rows, self._scales if scales is None else scales,
            self._codes if scales is None else self._codes.view(E4M3), self._scales, bias, out, count,
            self.out_features, size, rows.stride(0), HAS_BIAS=self._bias is not None, num_warps=warps, num_stages=3,
            **options,
        )  # fmt: skip
        return out


def quantize_rows(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[n, in] -> (e4m3 [n, in], scales float32 [n, groups]), as `reference.fp8.quantize_fp8`"""
    count, size = rows.shape
    groups = -(-size // group)
    codes = torch.empty((count, size), dtype=torch.uint8, device=rows.device)
    scales = torch.empty((count, groups), dtype=torch.float32, device=rows.device)
    block = power_of_two(group)
    at_once = max(1, TILE // block) if groups > 1 else 1
    warps = min(16, max(1, at_once * block // 512))
    launch(
        device.quantize_rows, (count, -(-groups // at_once)), rows, codes, scales, rows.stride(0), size, groups,
        GROUP=group if groups > 1 else block, BLOCK=block, AT_ONCE=at_once, num_warps=warps,
    )  # fmt: skip
    return codes.view(E4M3), scales
