"""The kernels for NVIDIA GPUs as a `Backend`: what they do not take is computed by the reference."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import (
    Activation,
    DecoderLayerParts,
    Draws,
    Edits,
    Experts,
    LowRank,
    PackedWeight,
    Quantization,
    TokenGroups,
)
from sensorium.kernels.context import AttentionContext
from sensorium.kernels.cuda import adapters, attention, norms, varlen
from sensorium.kernels.cuda import logits as logits_kernel
from sensorium.kernels.cuda import rope as rotation
from sensorium.kernels.cuda.decoder import CudaDecoder, DecoderShape, can_stack
from sensorium.kernels.cuda.experts import CudaExperts, choose, readable
from sensorium.kernels.cuda.fp8 import CudaFp8Linear
from sensorium.kernels.cuda.launch import FLOATS
from sensorium.kernels.cuda.linear import CudaFp4Linear, CudaQuantizedLinear, suits
from sensorium.kernels.cuda.sampling import on_device, sample
from sensorium.kernels.reference import QuantizedLinear

logger = logging.getLogger(__name__)


class CudaBackend:
    """Every method takes what the reference takes, on any device that Triton compiles for (or in its interpreter)."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._starts: varlen.Starts = varlen.Starts()
        self._arrivals = attention.Arrivals()

    def describe(self) -> str:
        return f"Triton {triton.__version__} kernels"

    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype in FLOATS and device.type == "cuda"

    def empty_quantized(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> QuantizedLinear:
        if not suits(quantization, dtype):
            say_left_to_reference(f"4-bit weights in groups of {quantization.group}")
            return reference.empty_quantized(out_features, in_features, quantization, dtype=dtype, device=device)
        made = CudaFp8Linear if quantization.is_fp8 else CudaFp4Linear if quantization.floats else CudaQuantizedLinear
        return made(out_features, in_features, quantization, dtype=dtype, device=device)

    empty_blocks = staticmethod(reference.empty_blocks)
    empty_linear = staticmethod(reference.empty_linear)
    mapped_blocks = staticmethod(reference.mapped_blocks)
    maps_blocks = staticmethod(reference.maps_blocks)
    mapped_linear = staticmethod(reference.mapped_linear)
    quantized_layout = staticmethod(reference.quantized_layout)
    cached_linear = staticmethod(reference.cached_linear)
    layer_norm = staticmethod(reference.layer_norm)
    query_step = staticmethod(reference.query_step)
    run_attention = staticmethod(reference.run_attention)
    causal_conv = staticmethod(reference.causal_conv)
    delta_rule = staticmethod(reference.delta_rule)
    delta_gates = staticmethod(reference.delta_gates)
    norm_gated = staticmethod(reference.norm_gated)
    draw_rows = staticmethod(reference.draw_rows)

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        context: AttentionContext,
        scale: float,
        sliding_window: int | None = None,
        visible: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        reason = attention.refusal(q, k_cache, v_cache)
        if reason is not None:
            say_left_to_reference(f"attention with {reason}")
            return reference.paged_attention(q, k_cache, v_cache, context, scale, sliding_window, visible, sinks)
        return attention.paged_attention(
            q, k_cache, v_cache, context, scale, self._arrivals, sliding_window, visible, sinks
        )

    def varlen_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
    ) -> Tensor:
        """One call, whatever the lengths; of types and sizes that torch's flash attention has not, run by run."""
        if not varlen.takes(q, k, v):
            return reference.varlen_attention(q, k, v, lengths, scale, window)
        return varlen.varlen_attention(q, k, v, lengths, scale, window, None, self._starts)

    def heard_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], heard: list[int], scale: float
    ) -> Tensor:
        if not varlen.takes(q, k, v):
            return reference.heard_attention(q, k, v, lengths, heard, scale)
        kept = reference.heard_places(lengths, heard, q.device)
        return varlen.varlen_attention(q, k[kept], v[kept], lengths, scale, None, heard, self._starts)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        compute = norms.rms_norm if norms.takes(x, weight) else reference.rms_norm
        return compute(x, weight, eps, offset)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The sum is written into `residual`."""
        takes = norms.takes(x, residual, weight) and x.is_contiguous()
        compute = norms.add_rms_norm if takes else reference.add_rms_norm
        return compute(x, residual, weight, eps, offset)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """In place where the layout allows it."""
        takes = x.dtype in FLOATS and x.is_contiguous() and activation in norms.PLAIN
        return (norms.activate if takes else reference.activate)(x, activation)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.gated(gate_up, "silu")

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        takes = x.dtype in FLOATS and x.is_contiguous()
        return (norms.gated if takes else reference.gated)(x, activation)

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        return (rotation.rope if rotation.can_rotate(q, k, cos, sin) else reference.rope)(q, k, cos, sin)

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        takes = rotation.can_write(k, v, k_cache, v_cache)
        (rotation.write_kv if takes else reference.write_kv)(k, v, k_cache, v_cache, slots)

    def experts(self, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: Activation) -> Experts:
        first, second = readable(gate_up), readable(down)
        if first is None or second is None:
            say_left_to_reference("experts of several layouts or of one without a kernel")
            return reference.experts(gate_up, down, activation)
        return CudaExperts(first, second, activation)

    def add_low_rank(self, out: Tensor, x: Tensor, additions: Sequence[LowRank | None], groups: TokenGroups) -> None:
        if not any(additions):
            return
        if adapters.takes(out, x, additions):
            adapters.add_low_rank(out, x, additions, groups, self._tables)
        else:
            reference.add_low_rank(out, x, additions, groups)

    def edit(self, logits: Tensor, raw: Tensor, edits: Edits) -> None:
        takes = logits.dtype is raw.dtype is torch.float32 and logits.stride(1) == raw.stride(1) == 1
        (logits_kernel.edit if takes else reference.edit)(logits, raw, edits)

    def choose(self, logits: Tensor, per_token: int, *, renormalizes: bool, scale: float) -> tuple[Tensor, Tensor]:
        takes = logits.dtype in FLOATS and logits.dim() == 2 and logits.stride(1) == 1
        return (choose if takes else reference.choose)(logits, per_token, renormalizes=renormalizes, scale=scale)

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor] | None:
        if logits.dtype is not torch.float32 or logits.stride(1) != 1:
            return None
        return sample(logits, on_device(draws, logits.device))

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
        activation: Activation,
        norm_offset: float,
        norms_whole_qk: bool = False,
    ) -> CudaDecoder | None:
        """None where a head's size or what is normed together needs the kernels one by one."""
        shape = DecoderShape(num_heads, num_kv_heads, head_dim, scale, eps, activation, norm_offset, norms_whole_qk)
        return CudaDecoder(layers, final_norm, shape, self._arrivals) if can_stack(layers, final_norm, shape) else None


@functools.cache
def say_left_to_reference(what: str) -> None:
    """Once for each kind of work."""
    logger.warning("%s: no kernel of this kind, torch alone computes it (right, but slower)", what)
