"""The computations that matter, each behind one name: the fastest backend that takes a tensor computes it.

The functions have the signatures, shapes and promises of `backend.Backend`, where they are described.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.backend import (
    FEW_FORCED,
    FP8,
    MAPPED_BYTES,
    Activation,
    Backend,
    Blocks,
    BlockWeight,
    BranchParts,
    CachedWeight,
    DecoderLayerParts,
    DecoderStack,
    DeltaParts,
    Draws,
    Edits,
    Experts,
    GrammarFunctions,
    HeldRow,
    LayerShape,
    LowRank,
    MappedBlocks,
    PackedWeight,
    Quantization,
    QuantizedWeight,
    RoutedParts,
    RowDraws,
    StateParts,
    Taken,
    TokenGroups,
    TokenRowsParts,
)
from sensorium.kernels.cpu import onednn
from sensorium.kernels.cpu.linear import NativeLinear
from sensorium.kernels.cpu.native import fastest as _native
from sensorium.kernels.gpu import gpu_kernels
from sensorium.kernels.reference.attention import SCALE_BYTES, biased_attention, first_attention

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext, Segments

logger = logging.getLogger(__name__)

__all__ = [
    "FEW_FORCED",
    "FP8",
    "MAPPED_BYTES",
    "Activation",
    "Backend",
    "BlockWeight",
    "Blocks",
    "BranchParts",
    "CachedWeight",
    "DecoderLayerParts",
    "DecoderStack",
    "DeltaParts",
    "Draws",
    "Edits",
    "Experts",
    "GrammarFunctions",
    "HeldRow",
    "LayerShape",
    "LowRank",
    "MappedBlocks",
    "PackedWeight",
    "Quantization",
    "QuantizedWeight",
    "RoutedParts",
    "RowDraws",
    "StateParts",
    "Taken",
    "TokenGroups",
    "TokenRowsParts",
    "activate",
    "add_low_rank",
    "add_rms_norm",
    "biased_attention",
    "cache_width",
    "cached_linear",
    "causal_conv",
    "choose",
    "decoder_stack",
    "delta_gates",
    "delta_mixed",
    "delta_rule",
    "describe",
    "draw",
    "draw_held",
    "draw_rows",
    "edit",
    "empty_linear",
    "empty_quantized",
    "experts",
    "first_attention",
    "gated",
    "heard_attention",
    "layer_norm",
    "mapped_blocks",
    "mapped_linear",
    "maps_blocks",
    "multiplies_fp4",
    "norm_gated",
    "pack_linear",
    "paged_attention",
    "partial",
    "quantized_layout",
    "query_step",
    "rms_norm",
    "rope",
    "run_attention",
    "silu_mul",
    "take_held",
    "varlen_attention",
    "write_kv",
]

_REFERENCE: Backend = reference


def _for(x: Tensor) -> Backend:
    """What computes on tensors like this one."""
    if x.is_cpu:
        native = _native()
        return native if native is not None and native.supports(x.dtype, x.device) else _REFERENCE
    current = gpu_kernels().current
    return current if current.supports(x.dtype, x.device) else _REFERENCE


def _attending(q: Tensor) -> Backend:
    """What computes attention: native code takes float32 too, and itself leaves to the reference what it does not."""
    return (_native() or _REFERENCE) if q.is_cpu else _for(q)


def _for_weights(dtype: torch.dtype, device: torch.device) -> Backend:
    """What computes with weights of this kind."""
    backend = gpu_kernels().weights if device.type == "cuda" else _native()
    return backend if backend is not None and backend.supports(dtype, device) else _REFERENCE


def describe() -> str:
    """For the log: which kernels a CPU computes with."""
    return (_native() or _REFERENCE).describe()


def empty_linear(
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> PackedWeight:
    """A weight [out, in] in the layout that is best for this dtype and device, to be filled row by row."""
    if quantization is not None and quantization.blocks:
        backend = _told(_for_weights(dtype, device), dtype, device)
        return backend.empty_blocks(out_features, in_features, quantization.blocks, dtype=dtype, device=device)
    if quantization is not None:
        return empty_quantized(out_features, in_features, quantization, dtype=dtype, device=device)
    if onednn.suits(out_features, in_features, dtype, device):
        return onednn.OneDnnLinear(out_features, in_features)
    return _for_weights(dtype, device).empty_linear(out_features, in_features, dtype=dtype, device=device)


def empty_quantized(
    out_features: int, in_features: int, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> QuantizedWeight:
    is_fp8_on_cpu = quantization.is_fp8 and device.type == "cpu"
    backend = _told(_REFERENCE if is_fp8_on_cpu else _for_weights(dtype, device), dtype, device)
    return backend.empty_quantized(out_features, in_features, quantization, dtype=dtype, device=device)


def _told(backend: Backend, dtype: torch.dtype, device: torch.device) -> Backend:
    """The same; the log hears of one that is slow."""
    if backend is _REFERENCE:
        _say_slow(f"{dtype} on {device.type}".removeprefix("torch."))
    return backend


def multiplies_fp4(device: torch.device) -> bool:
    """Whether mxfp4 codes are multiplied as they are stored: on a CPU, and by the kernels for NVIDIA GPUs."""
    return device.type == "cpu" or (device.type == "cuda" and gpu_kernels().weights is not _REFERENCE)


@functools.cache
def _say_slow(where: str) -> None:
    logger.warning("quantised weights of %s are computed with torch alone: right, but slow", where)


def mapped_linear(parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int) -> PackedWeight | None:
    return _for(parts[0][1]).mapped_linear(parts, out_features, in_features)


def mapped_blocks(
    parts: Sequence[MappedBlocks], out_features: int, in_features: int, dtype: torch.dtype
) -> PackedWeight | None:
    """For x of this dtype on a CPU."""
    return _for_weights(dtype, torch.device("cpu")).mapped_blocks(parts, out_features, in_features)


def maps_blocks(kind: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether such blocks of a large file are multiplied where they are mapped, and as such when they are packed."""
    return _for_weights(dtype, torch.device("cpu")).maps_blocks(kind)


def quantized_layout(dtype: torch.dtype, device: torch.device) -> str | None:
    return _for_weights(dtype, device).quantized_layout()


def cached_linear(
    kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
) -> QuantizedWeight:
    """Wraps tensors from another weight's `parts()` (same layout) without copying.

    Raises ValueError on a shape or dtype mismatch, or where no kernels read that layout.
    """
    return (_native() or _REFERENCE).cached_linear(kept, out_features, in_features, quantization)


def pack_linear(weight: Tensor, bias: Tensor | None, *, quantization: Quantization | None = None) -> PackedWeight:
    """A packed weight filled from weight [out, in] and bias [out]; neither is kept."""
    packed = empty_linear(*weight.shape, dtype=weight.dtype, device=weight.device, quantization=quantization)
    packed.fill(0, weight)
    packed.set_bias(bias)
    return packed


def partial(weight: PackedWeight, x: Tensor) -> Tensor:
    """weight(x), to be added to products of other inputs: float32 where the kernel can, [.., in] -> [.., out]"""
    return weight(x, torch.float32) if isinstance(weight, NativeLinear) else weight(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return _for(x).rms_norm(x, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual). The sum may be written into `residual`."""
    return _for(x).add_rms_norm(x, residual, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _for(x).layer_norm(x, weight, bias, eps)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Elementwise. The result may be written into `x`."""
    return _for(x).activate(x, activation)


def silu_mul(gate_up: Tensor) -> Tensor:
    return _for(gate_up).silu_mul(gate_up)


def gated(x: Tensor, activation: Activation) -> Tensor:
    return _for(x).gated(x, activation)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k may be rotated in place."""
    return _for(q).rope(q, k, cos, sin)


def cache_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row of the KV cache: an int8 row has its float32 scale behind it."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    _for(k).write_kv(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    sliding_window: int | None = None,
    visible: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    return _attending(q).paged_attention(q, k_cache, v_cache, context, scale, sliding_window, visible, sinks)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
) -> Tensor:
    return _attending(q).varlen_attention(q, k, v, lengths, scale, window)


def heard_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], heard: list[int], scale: float) -> Tensor:
    return _attending(q).heard_attention(q, k, v, lengths, heard, scale)


def query_step(q: Tensor) -> int:
    return _attending(q).query_step(q)


def run_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _attending(q).run_attention(q, k, v, scale)


def experts(gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: Activation) -> Experts:
    """The MLPs of a routed layer, each two weights."""
    backend = gpu_kernels().current if gpu_kernels().is_switched else _native() or _REFERENCE
    made = backend.experts(gate_up, down, activation)
    return reference.experts(gate_up, down, activation) if made is None else made


def choose(logits: Tensor, per_token: int, *, renormalizes: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return _for(logits).choose(logits, per_token, renormalizes=renormalizes, scale=scale)


def add_low_rank(out: Tensor, x: Tensor, additions: Sequence[LowRank | None], groups: TokenGroups) -> None:
    _for(x).add_low_rank(out, x, additions, groups)


def edit(logits: Tensor, raw: Tensor, edits: Edits) -> None:
    _for(logits).edit(logits, raw, edits)


def draw(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor] | None:
    return _for(logits).draw(logits, draws)


def draw_rows(logits: NDArray[np.float32], draws: RowDraws) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return (_native() or _REFERENCE).draw_rows(logits, draws)


def draw_held(
    grammars: GrammarFunctions,
    logits: NDArray[np.float32],
    rows: Sequence[HeldRow],
    temperatures: Sequence[float],
    costs: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Of rows of logits [rows, vocab] on a CPU: the tokens that are drawn [n], and the highest logits of what is left
    [n], as `engine.choosing` says; minus infinity where a grammar leaves nothing. Temperature 0: the first token of the
    highest logit. `costs` [slots] has what the last masks took, in nanoseconds, and is written to. None where there is
    no kernel for it."""
    native = _native()
    return None if native is None else native.draw_held(grammars, logits, rows, temperatures, costs)


def take_held(
    grammars: GrammarFunctions, matchers: Sequence[int], tokens: Sequence[int]
) -> list[tuple[int, Taken]] | None:
    """Grammars at these addresses take a token each, and what that forces. What came of those, by number, where there
    is something to tell. None where there is no kernel for it."""
    native = _native()
    return None if native is None else native.take_held(grammars, matchers, tokens)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, segments: Segments, *, silu: bool = False
) -> Tensor:
    return _for(x).causal_conv(x, weight, bias, states, segments, silu=silu)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, learned: Tensor, states: Tensor, segments: Segments
) -> Tensor:
    return _for(v).delta_rule(q, k, v, decay, learned, states, segments)


def delta_gates(gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _for(gates).delta_gates(gates, rate, bias)


def delta_mixed(
    delta: DeltaParts, mixed: Tensor, gates: Tensor, z: Tensor, memory: Tensor, segments: Segments
) -> Tensor:
    """See `reference.delta_mixed`."""
    return reference.delta_mixed(_for(mixed), delta, mixed, gates, z, memory, segments)


def norm_gated(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _for(x).norm_gated(x, z, weight, eps)


def decoder_stack(
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
) -> DecoderStack | None:
    """All layers as one call, the numbers those of kernel by kernel; None where that is not supported."""
    return _for(final_norm).decoder_stack(
        layers,
        final_norm,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        eps=eps,
        activation=activation,
        norm_offset=norm_offset,
        norms_whole_qk=norms_whole_qk,
    )
