"""How kernels are started: on a GPU, in Triton's interpreter, or, for fake tensors, only compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime import driver

HALF_TYPES = (torch.bfloat16, torch.float16)
FLOATS = (*HALF_TYPES, torch.float32)


class Absent:
    """A tensor without memory, as kernels are compiled for: its type and where in its storage it begins."""

    def __init__(self, tensor: FakeTensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.dtype.itemsize

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return 0


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """Start `kernel` on the current stream. With fake tensors it is compiled, for the device that Triton's driver
    names, and put into its cache. A grid of no programs starts nothing."""
    if 0 in grid:
        return
    constants["enable_fp_fusion"] = True
    if any(isinstance(one, FakeTensor) for one in args):
        kernel.warmup(*(Absent(one) if isinstance(one, FakeTensor) else one for one in args), grid=grid, **constants)
    else:
        kernel[grid](*args, **constants)


def capability() -> int:
    """Of the GPU that is computed or compiled for: 90 for 9.0."""
    if triton.knobs.runtime.interpret:
        return 90
    return int(driver.active.get_current_target().arch)


def has_fp8() -> bool:
    """Whether that GPU converts and multiplies e4m3 numbers, which Triton then has as a type."""
    return capability() >= 89


def octets(x: Tensor) -> Tensor:
    """An fp8 tensor as its bytes, for kernels that read or write these; another one as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest one of at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()
