"""The reference implementation of every kernel, a `Backend` in plain torch: the fallback on any device, and what faster
kernels are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sensorium.kernels.backend import Activation, Blocks, DecoderLayerParts, Draws, MappedBlocks, Quantization
from sensorium.kernels.reference.adapters import add_low_rank
from sensorium.kernels.reference.attention import (
    dequantize_heads,
    first_attention,
    heard_attention,
    heard_places,
    paged_attention,
    quantize_heads,
    query_step,
    run_attention,
    varlen_attention,
    write_kv,
)
from sensorium.kernels.reference.block_linear import BlockLinear
from sensorium.kernels.reference.drawing import draw_rows
from sensorium.kernels.reference.experts import PlainExperts, choose, experts
from sensorium.kernels.reference.fp4 import Fp4Linear
from sensorium.kernels.reference.fp8 import Fp8Linear
from sensorium.kernels.reference.linear import PlainLinear, empty_linear
from sensorium.kernels.reference.logits import edit
from sensorium.kernels.reference.norms import activate, add_rms_norm, gated, layer_norm, rms_norm, rope, silu_mul
from sensorium.kernels.reference.quantized import QuantizedLinear
from sensorium.kernels.reference.states import causal_conv, delta_gates, delta_mixed, delta_rule, norm_gated

__all__ = [
    "BlockLinear",
    "Fp4Linear",
    "Fp8Linear",
    "PlainExperts",
    "PlainLinear",
    "QuantizedLinear",
    "activate",
    "add_low_rank",
    "add_rms_norm",
    "cached_linear",
    "causal_conv",
    "choose",
    "decoder_stack",
    "delta_gates",
    "delta_mixed",
    "delta_rule",
    "dequantize_heads",
    "describe",
    "draw",
    "draw_rows",
    "edit",
    "empty_blocks",
    "empty_linear",
    "empty_quantized",
    "experts",
    "first_attention",
    "gated",
    "heard_attention",
    "heard_places",
    "layer_norm",
    "mapped_blocks",
    "mapped_linear",
    "maps_blocks",
    "norm_gated",
    "paged_attention",
    "quantize_heads",
    "quantized_layout",
    "query_step",
    "rms_norm",
    "rope",
    "run_attention",
    "silu_mul",
    "supports",
    "varlen_attention",
    "write_kv",
]


def describe() -> str:
    return "torch reference kernels"


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Every kind that torch computes with."""
    return True


def empty_quantized(
    out_features: int, in_features: int, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> QuantizedLinear:
    """An unfilled quantised weight [out, in]."""
    made = QuantizedLinear
    if quantization.floats:
        made = Fp8Linear if quantization.is_fp8 else Fp4Linear
    return made(out_features, in_features, quantization, dtype=dtype, device=device)


def empty_blocks(
    out_features: int, in_features: int, blocks: Blocks, *, dtype: torch.dtype, device: torch.device
) -> BlockLinear:
    """An unfilled weight [out, in] in blocks."""
    return BlockLinear(out_features, in_features, blocks, dtype=dtype, device=device)


def mapped_linear(parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int) -> None:
    """Weights are always copied."""


def mapped_blocks(parts: Sequence[MappedBlocks], out_features: int, in_features: int) -> None:
    """Likewise."""


def maps_blocks(kind: str) -> bool:
    """Likewise."""
    return False


def quantized_layout() -> None:
    """Its quantised weights are not kept on disk."""


def cached_linear(
    kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
) -> QuantizedLinear:
    """Raises ValueError: there is nothing to wrap."""
    raise ValueError("its layout has no kernels here")


def draw(logits: Tensor, draws: Draws) -> None:
    """The sampler draws by itself."""


def decoder_stack(
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
    norms_whole_qk: bool,
) -> None:
    """Layers are computed kernel by kernel."""
