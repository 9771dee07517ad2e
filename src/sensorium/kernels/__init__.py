"""The computations that matter, each behind one name: native code where it can be used, else the torch reference.

Shapes: x [tokens, hidden]; q [tokens, heads, head_dim] and k, v [tokens, kv_heads, head_dim], which may be strided
views of one fused projection; cos and sin float32 [tokens, rotated / 2], half-rotation (NeoX) layout; caches
[blocks, kv_heads, block_size, head_dim]. `native.Native` has the same functions as methods, and `supports(tensor)`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from sensorium.kernels.cpu import onednn
from sensorium.kernels.reference import plain as reference
from sensorium.kernels.reference.quantized import Quantization

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext, KVCache

logger = logging.getLogger(__name__)

__all__ = [
    "Activation",
    "DecoderLayerParts",
    "DecoderStack",
    "KeptForm",
    "LinearForm",
    "Quantization",
    "QuantizedForm",
    "activate",
    "add_rms_norm",
    "cache_width",
    "decoder_stack",
    "describe",
    "empty_linear",
    "empty_quantized",
    "first_attention",
    "gated",
    "layer_norm",
    "linear_activate",
    "linear_add",
    "linear_in_place",
    "pack_linear",
    "paged_attention",
    "quantized_in_place",
    "quantized_layout",
    "query_step",
    "rms_norm",
    "rope",
    "run_attention",
    "silu_mul",
    "varlen_attention",
    "write_kv",
]


Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh"]


class LinearForm(Protocol):
    """A linear layer's weight in the layout that its kernel reads."""

    @property
    def nbytes(self) -> int: ...

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Put rows [n, in] of the weight at `first_row`; the tensor is not kept. Every row must be filled once."""
        ...

    def set_bias(self, bias: Tensor | None) -> None: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [.., in] -> [.., out]"""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n] (tied embeddings use one copy)."""
        ...


class QuantizedForm(LinearForm, Protocol):
    """A quantised weight. `fill` quantises."""

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Put rows that are quantised already at `first_row`.

        `codes` uint8 [n, in]: 0 to 15 (int4), or the signed value + 128 (int8). `scales` [n, groups]. `zeros` uint8
        [n, groups]: the code that means zero (int4, default 8); all rows of a layer have them or none.
        """
        ...


class KeptForm(QuantizedForm, Protocol):
    """One of a layout that has a name (`quantized_layout`): another start can compute with its memory."""

    def parts(self) -> dict[str, Tensor]:
        """What `quantized_in_place` takes, of a form that `fill` alone has filled and that has no bias yet."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayerParts:
    """What one Llama-like decoder layer is made of: norms' weights and linear forms."""

    input_norm: Tensor
    qkv: LinearForm
    q_norm: Tensor | None  # over each head
    k_norm: Tensor | None
    o: LinearForm
    post_norm: Tensor
    gate_up: LinearForm
    down: LinearForm
    sliding_window: int | None


class DecoderStack(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] -> the same after all layers and the last norm.

        `rows` int64 [n], ascending: the tokens whose states are read, others are undefined.
        """
        ...


@functools.cache
def _native() -> Any | None:
    try:
        return importlib.import_module("sensorium.kernels.cpu.library").load()
    except (ImportError, OSError, AttributeError) as error:
        logger.warning("native kernels cannot be used, computing with torch alone (slower): %s", error)
        return None


def _for(x: Tensor) -> Any:
    """What computes on tensors like this one."""
    native = _native() if x.is_cpu else None
    return native if native is not None and native.supports(x) else reference


def _attending(q: Tensor) -> Any:
    """What computes attention: native code takes float32 too, and knows itself what it leaves to the reference."""
    return (_native() if q.is_cpu else None) or reference


def _for_weights(dtype: torch.dtype, device: torch.device) -> Any:
    """What computes with weights of this kind."""
    return _for(torch.empty(0, dtype=dtype, device=device))


def describe() -> str:
    """For the log: which kernels a CPU computes with."""
    native = _native()
    said: str = "torch reference kernels" if native is None else native.describe()
    return said


def empty_linear(
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> LinearForm:
    """The form of a weight [out, in] that is best for this dtype and device, to be filled row by row."""
    if quantization is not None:
        return empty_quantized(out_features, in_features, quantization, dtype=dtype, device=device)
    if (
        dtype == torch.float32
        and device.type == "cpu"
        and out_features * in_features >= onednn.fewest_elements()
        and onednn.usable()
    ):
        return onednn.OneDnnLinear(out_features, in_features)
    module = _for_weights(dtype, device)
    form: LinearForm = module.empty_linear(out_features, in_features, dtype=dtype, device=device)
    return form


def empty_quantized(
    out_features: int, in_features: int, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> QuantizedForm:
    module = _for_weights(dtype, device)
    if module is reference:
        _say_slow(f"{dtype} on {device.type}".removeprefix("torch."))
    form: QuantizedForm = module.empty_linear(
        out_features, in_features, dtype=dtype, device=device, quantization=quantization
    )
    return form


@functools.cache
def _say_slow(where: str) -> None:
    logger.warning("quantised weights of %s are computed with torch alone: right, but slow", where)


def linear_in_place(parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int) -> LinearForm | None:
    """A form over rows [n, in] at (first row, rows) where they lie, None where a packed copy is needed."""
    module = _for(parts[0][1])
    if module is reference:
        return None
    form: LinearForm | None = module.linear_in_place(parts, out_features, in_features)
    return form


def quantized_layout(dtype: torch.dtype, device: torch.device) -> str | None:
    """Names the form of quantised weights there, if it is one that can be kept and computed with where it lies."""
    module = _for_weights(dtype, device)
    return None if module is reference else module.quantized_layout


def quantized_in_place(
    kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
) -> QuantizedForm:
    """A form over what another one's `parts` gave, of the layout that is named; ValueError if it does not fit."""
    native = _native()
    if native is None:
        raise ValueError("there are no kernels for it")
    form: QuantizedForm = native.quantized_in_place(kept, out_features, in_features, quantization)
    return form


def pack_linear(weight: Tensor, bias: Tensor | None, *, quantization: Quantization | None = None) -> LinearForm:
    """A form filled from weight [out, in] and bias [out]; neither is kept."""
    form = empty_linear(*weight.shape, dtype=weight.dtype, device=weight.device, quantization=quantization)
    form.fill(0, weight)
    form.set_bias(bias)
    return form


def linear_activate(form: LinearForm, x: Tensor, activation: Activation) -> Tensor:
    """activation(form(x)) in as few passes as there can be."""
    fused = form.activated(x, activation) if isinstance(form, onednn.OneDnnLinear) else None
    return activate(form(x), activation) if fused is None else fused


def linear_add(form: LinearForm, x: Tensor, other: Tensor) -> Tensor:
    """form(x) + other, which is left as it is."""
    return form.added(x, other) if isinstance(form, onednn.OneDnnLinear) else form(x).add_(other)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = _for(x).rms_norm(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual). The native kernel may write the sum into `residual`."""
    out: tuple[Tensor, Tensor] = _for(x).add_rms_norm(x, residual, weight, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out: Tensor = _for(x).layer_norm(x, weight, bias, eps)
    return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Elementwise. Native code may write into `x`."""
    out: Tensor = _for(x).activate(x, activation)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * n], gates first -> silu(gate) * up [tokens, n]"""
    out: Tensor = _for(gate_up).silu_mul(gate_up)
    return out


def gated(x: Tensor, activation: Activation) -> Tensor:
    """[tokens, 2 * n], gates first -> activation(gate) * up [tokens, n]"""
    out: Tensor = _for(x).gated(x, activation)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first 2 * cos.shape[-1] dimensions of every head. Native code may rotate in place."""
    out: tuple[Tensor, Tensor] = _for(q).rope(q, k, cos, sin)
    return out


def cache_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row of the KV cache: an int8 row has its float32 scale behind it."""
    return head_dim + reference.SCALE_BYTES if dtype == torch.int8 else head_dim


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Caches of k's dtype, or int8 [blocks, kv_heads, block_size, cache_width]."""
    _for(k).write_kv(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens to its cached ones, their own included; grouped queries.

    With a window, position p sees p - sliding_window + 1 .. p.
    """
    out: Tensor = _attending(q).paged_attention(q, k_cache, v_cache, context, scale, sliding_window)
    return out


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
) -> Tensor:
    """Attention in both directions inside each run of `lengths` tokens, never across; grouped queries.

    With a window, a token sees as many others on either side of itself.
    """
    out: Tensor = _attending(q).varlen_attention(q, k, v, lengths, scale, window)
    return out


def query_step(q: Tensor) -> int:
    """Queries that `run_attention` takes at a time, or a multiple of it, or all that remain if they are more."""
    step: int = _attending(q).query_step(q)
    return step


def run_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`varlen_attention` of one run, for consecutive ones of its queries: q [n, heads, head_dim], k and v of all its
    tokens. The numbers are those of all queries at once, to the last bit."""
    out: Tensor = _attending(q).run_attention(q, k, v, scale)
    return out


def first_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
) -> Tensor:
    """`varlen_attention` of nothing but each run's first token: q and the result are [runs, heads, head_dim]."""
    return reference.first_attention(q, k, v, lengths, scale, window)


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
) -> DecoderStack | None:
    """All layers as one native call, the numbers those of kernel by kernel; None where that is not to be had."""
    module = _for(final_norm)
    if module is reference:
        return None
    stack: DecoderStack | None = module.decoder(
        layers,
        final_norm,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        eps=eps,
        activation=activation,
    )
    return stack
