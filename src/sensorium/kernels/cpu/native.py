"""The native CPU kernels as a `Backend`: bf16 in C++, and what they do not take computed by the reference.

`load` gives them; without a C++ compiler at installation, or on another processor, there are none.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import (
    Activation,
    Blocks,
    DecoderLayerParts,
    MappedBlocks,
    PackedWeight,
    Quantization,
    RowDraws,
)
from sensorium.kernels.cpu.attention import AttentionKernels, heads_are_adjacent
from sensorium.kernels.cpu.blocks import FROM_FILE, BlockLinear, MappedBlockLinear
from sensorium.kernels.cpu.decoder import NativeDecoder, can_stack
from sensorium.kernels.cpu.experts import NativeExperts
from sensorium.kernels.cpu.grammars import GrammarKernels
from sensorium.kernels.cpu.library import (
    ACTIVATIONS,
    DecoderArguments,
    DrawArguments,
    Isa,
    RoutingArguments,
    library_path,
)
from sensorium.kernels.cpu.linear import Fp4Linear, MappedLinear, NativeLinear, PackedLinear, QuantizedLinear
from sensorium.kernels.cpu.states import StateKernels

logger = logging.getLogger(__name__)

LAYOUT = 1  # of quantised weights and how they are rounded: to be raised with every change of either
_BF16, _CPU = torch.bfloat16, torch.device("cpu")


class Native(AttentionKernels, StateKernels, GrammarKernels):
    """The library as a `Backend`."""

    def describe(self) -> str:
        pool = f"{self.threads} threads of torch's pool" if self.pooled else "one thread, torch's pool was not found"
        return f"native {self.isa} kernels, {pool}"

    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype is _BF16 and device.type == "cpu"

    def empty_linear(
        self, out_features: int, in_features: int, *, dtype: torch.dtype = _BF16, device: torch.device = _CPU
    ) -> PackedLinear:
        return PackedLinear(self, out_features, in_features)

    def empty_quantized(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype = _BF16,
        device: torch.device = _CPU,
    ) -> QuantizedLinear | Fp4Linear:
        if quantization.floats:
            return Fp4Linear(self, out_features, in_features)
        return QuantizedLinear(self, out_features, in_features, quantization)

    def empty_blocks(
        self,
        out_features: int,
        in_features: int,
        blocks: Blocks,
        *,
        dtype: torch.dtype = _BF16,
        device: torch.device = _CPU,
    ) -> BlockLinear:
        return BlockLinear(self, out_features, in_features, blocks)

    def quantized_layout(self) -> str:
        return f"{LAYOUT} {self.isa}"

    def cached_linear(
        self, kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
    ) -> QuantizedLinear:
        """Wraps what `QuantizedLinear.parts` gave; it must not change while the weight lives."""
        return QuantizedLinear(self, out_features, in_features, quantization, kept)

    def mapped_linear(
        self, parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int
    ) -> MappedLinear | None:
        """The bf16 rows must not change while the weight lives. Without AVX-512 packing each time is too slow."""
        if not self.isa.startswith("avx512") or any(rows.stride(1) != 1 for _, rows in parts):
            return None
        return MappedLinear(self, parts, out_features, in_features)

    def mapped_blocks(
        self, parts: Sequence[MappedBlocks], out_features: int, in_features: int
    ) -> MappedBlockLinear | None:
        """The blocks must not change while the weight lives."""
        if not all(self.maps_blocks(part.kind) for part in parts):
            return None
        return MappedBlockLinear(self, out_features, in_features, parts)

    def maps_blocks(self, kind: str) -> bool:
        return self.isa.startswith("avx512") and kind in FROM_FILE

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, *, quantization: Quantization | None = None
    ) -> PackedLinear | QuantizedLinear | Fp4Linear:
        """A weight filled from [out, in] and bias [out]; neither is kept."""
        size = (weight.shape[0], weight.shape[1])
        packed = self.empty_linear(*size) if quantization is None else self.empty_quantized(*size, quantization)
        packed.fill(0, weight)
        packed.set_bias(bias)
        return packed

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        if x.dtype is not _BF16 or weight.dtype is not _BF16:
            return reference.rms_norm(x, weight, eps, offset)
        size = x.shape[-1]
        x = x.contiguous()
        out = torch.empty_like(x)
        rows, to = x.numel() // size, out.data_ptr()
        self._rms_norm(self._runtime, x.data_ptr(), size, weight.data_ptr(), to, size, rows, size, eps, offset)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The sum is written into `residual`."""
        if not (x.dtype is residual.dtype is weight.dtype is _BF16 and x.is_contiguous() and residual.is_contiguous()):
            return reference.add_rms_norm(x, residual, weight, eps, offset)
        size = x.shape[-1]
        out = torch.empty_like(x)
        sums, to, rows = residual.data_ptr(), out.data_ptr(), x.numel() // size
        self._add_rms_norm(self._runtime, x.data_ptr(), sums, weight.data_ptr(), to, sums, rows, size, eps, offset)
        return out, residual

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        size = x.shape[-1]
        if x.dtype is not _BF16 or any(t is not None and t.dtype is not _BF16 for t in (weight, bias)):
            return torch.nn.functional.layer_norm(x, (size,), weight, bias, eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        self._layer_norm(
            self._runtime,
            x.data_ptr(),
            None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            eps,
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.gated(gate_up, "silu")

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        if x.dtype is not _BF16 or not x.is_contiguous():
            return reference.gated(x, activation)
        size = x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], size))
        self._gated(
            self._runtime, x.data_ptr(), out.data_ptr(), out.numel() // size, size, ACTIVATIONS.index(activation)
        )
        return out

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """In place where the layout allows it."""
        if x.dtype is not _BF16:
            return reference.activate(x, activation)
        x = x.contiguous()
        at = x.data_ptr()
        self._activate(self._runtime, at, at, x.numel(), ACTIVATIONS.index(activation))
        return x

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates in place."""
        if not (heads_are_adjacent(q) and heads_are_adjacent(k) and cos.dtype is sin.dtype is torch.float32):
            return reference.rope(q, k, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        tokens, heads, head_dim = q.shape
        rotary = 2 * cos.shape[1]
        c, s = cos.data_ptr(), sin.data_ptr()
        for x, count in ((q, heads), (k, k.shape[1])):
            at, stride = x.data_ptr(), x.stride(0)
            self._rope(self._runtime, at, stride, at, stride, c, s, tokens, count, head_dim, rotary)
        return q, k

    def experts(
        self, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: Activation
    ) -> NativeExperts | None:
        ours = [[one for one in part if isinstance(one, NativeLinear)] for part in (gate_up, down)]
        if any(len(part) < len(gate_up) for part in ours):
            return None
        return NativeExperts(self, ours[0], ours[1], activation)

    edit = staticmethod(reference.edit)
    add_low_rank = staticmethod(reference.add_low_rank)

    draw = staticmethod(reference.draw)

    def draw_rows(self, logits: NDArray[np.float32], draws: RowDraws) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if logits.strides[1] != logits.itemsize:
            return reference.draw_rows(logits, draws)
        rows, temperatures, uniforms, masks = draws
        count = len(rows)
        memory = np.empty((5, count), np.int64)  # one address for all
        at, line = memory.ctypes.data, 8 * count
        memory[0] = rows
        memory[1].view(np.float64)[:] = uniforms
        memory[2].view(np.float32)[:count] = temperatures
        arguments = DrawArguments(
            logits.ctypes.data,
            at,
            None if masks is None else masks.ctypes.data,
            at + 2 * line,
            at + line,
            at + 3 * line,
            at + 4 * line,
            logits.strides[0] // logits.itemsize,
            logits.shape[1],
            0 if masks is None else masks.shape[1],
            count,
        )
        self._draw(self._runtime, ctypes.addressof(arguments))
        return memory[3], memory[4].view(np.float32)[:count]

    def choose(self, logits: Tensor, per_token: int, *, renormalizes: bool, scale: float) -> tuple[Tensor, Tensor]:
        if logits.dtype is not _BF16 or per_token > logits.shape[1]:
            return reference.choose(logits, per_token, renormalizes=renormalizes, scale=scale)
        logits = logits.contiguous()
        tokens, experts = logits.shape
        chosen, weights = torch.empty(tokens, per_token, dtype=torch.int64), torch.empty(tokens, per_token)
        rules = RoutingArguments(experts, per_token, renormalizes, scale)
        at = ctypes.addressof(rules)
        self._choose(self._runtime, at, logits.data_ptr(), tokens, chosen.data_ptr(), weights.data_ptr())
        return chosen, weights

    def decoder_stack(
        self,
        layers: Sequence[DecoderLayerParts],
        final_norm: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        eps: float,
        activation: Activation = "silu",
        norm_offset: float = 0.0,
        norms_whole_qk: bool = False,
    ) -> NativeDecoder | None:
        """None where a part has a layout or dtype that needs the kernels one by one."""
        if head_dim % 2 or not can_stack(layers, final_norm, head_dim):
            return None
        return NativeDecoder(
            self,
            layers,
            final_norm,
            DecoderArguments(
                None,
                final_norm.data_ptr(),
                len(layers),
                num_heads,
                num_kv_heads,
                head_dim,
                0,
                0,
                ACTIVATIONS.index(activation),
                0,
                norms_whole_qk,
                eps,
                scale,
                norm_offset,
            ),
        )


@functools.cache
def load(isa: Isa | None = None, threads: int | None = None) -> Native:
    """The library with the best instruction set of this processor, or with one that a test asks for. Raises OSError."""
    path = library_path()
    if path is None:
        raise OSError(
            "the fast CPU kernels were not built, because the package was installed without a C++ compiler; "
            "install g++ or clang and then the package again (pip install --force-reinstall --no-cache-dir)"
        )
    return Native(path, isa, threads)


@functools.cache
def fastest() -> Native | None:
    """The backend for this processor; None, with one warning, where the library cannot be used."""
    try:
        return load()
    except (OSError, AttributeError) as error:
        logger.warning("native kernels cannot be used, computing with torch alone (slower): %s", error)
        return None


def available() -> bool:
    return fastest() is not None
