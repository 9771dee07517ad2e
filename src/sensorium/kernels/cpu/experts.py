"""The experts of a routed layer in one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sensorium.kernels.backend import Activation
from sensorium.kernels.cpu.library import ACTIVATIONS, ExpertsArguments, ExpertStepArguments, Library
from sensorium.kernels.cpu.linear import NativeLinear

_BF16 = torch.bfloat16


class NativeExperts:
    """What an expert gives stays float32 until it is added."""

    __slots__ = ("_arguments", "_kept", "_library", "_size", "address")

    def __init__(
        self, library: Library, gate_up: Sequence[NativeLinear], down: Sequence[NativeLinear], activation: Activation
    ) -> None:
        self._library, self._size = library, gate_up[0].in_features
        addresses = [(ctypes.c_void_p * len(part))(*(one.address for one in part)) for part in (gate_up, down)]
        self._kept = (list(gate_up), list(down), addresses)  # the C side has their addresses
        self._arguments = ExpertsArguments(
            *(ctypes.addressof(one) for one in addresses), len(gate_up), ACTIVATIONS.index(activation)
        )
        self.address = ctypes.addressof(self._arguments)

    @property
    def count(self) -> int:
        """Experts."""
        return int(self._arguments.count)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if x.dtype is not _BF16 or weights.dtype is not torch.float32 or x.shape[1] != self._size:
            raise ValueError(f"expected bfloat16 [.., {self._size}] and float32, got {x.dtype} and {weights.dtype}")
        x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
        out = torch.empty_like(x)
        step = ExpertStepArguments(
            x.data_ptr(), out.data_ptr(), chosen.data_ptr(), weights.data_ptr(), len(x), chosen.shape[1]
        )
        library = self._library
        library._experts(library._runtime, self.address, ctypes.addressof(step))
        return out
