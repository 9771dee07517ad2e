"""What a backend of kernels offers: `reference` in torch, `cpu` in C++. A new device is one more of these.

Shapes: x [tokens, hidden]; q [tokens, heads, head_dim] and k, v [tokens, kv_heads, head_dim], which may be strided
views of one fused projection; cos and sin float32 [tokens, rotated / 2], half-rotation (NeoX) layout; caches
[blocks, kv_heads, block_size, head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from sensorium.errors import StartupError

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext, KVCache

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is quantised. `group`: inputs that share an int4 scale."""

    bits: Literal[4, 8]
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits == 4 and (self.group % 8 or not 8 <= self.group <= 256):
            raise StartupError(
                f"there is no kernel for 4-bit weights in groups of {self.group}: it must be a multiple of 8 up to 256"
            )


class PackedWeight(Protocol):
    """A linear layer's weight [out, in] and bias in the layout that its kernel reads."""

    @property
    def nbytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int:
        """Part of `nbytes` that is a memory-mapped file."""
        ...

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Copy rows [n, in] of the weight to `first_row`. Every row must be filled once."""
        ...

    def set_bias(self, bias: Tensor | None) -> None:
        """Copy the bias [out]."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [.., in] -> [.., out]"""
        ...

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(self(x)), fused where the kernel can."""
        ...

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """self(x) + other [.., out], which is not changed; fused where the kernel can."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n] (tied embeddings use one copy)."""
        ...


class QuantizedWeight(PackedWeight, Protocol):
    """A quantised weight. `fill` quantises."""

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Copy rows that are quantised already to `first_row`.

        `codes` uint8 [n, in]: 0 to 15 (int4), or the signed value + 128 (int8). `scales` [n, groups]. `zeros` uint8
        [n, groups]: the code that means zero (int4, default 8); all rows of a layer have them or none.
        """
        ...


class CachedWeight(QuantizedWeight, Protocol):
    """A quantised weight of a named layout (`Backend.quantized_layout`), which the disk cache can keep."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that `Backend.cached_linear` takes; only of a weight filled by `fill`, without a bias."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayerParts:
    """What one Llama-like decoder layer is made of: weights of norms and of linear layers."""

    input_norm: Tensor
    qkv: PackedWeight
    q_norm: Tensor | None  # over each head
    k_norm: Tensor | None
    o: PackedWeight
    mlp_norm: Tensor  # before the MLP
    gate_up: PackedWeight
    down: PackedWeight
    sliding_window: int | None
    attended_norm: Tensor | None = None  # of what `o` gives, before it is added; after_norm: of what `down` gives
    after_norm: Tensor | None = None
    media_both_ways: bool = False  # sees as far as `AttentionContext.visible` says
    rotation: int = 0  # number of its cos and sin


class DecoderStack(Protocol):
    """All layers of a decoder in one call."""

    def __call__(
        self,
        hidden: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] -> the same after all layers and the last norm. `rotations`: pairs of cos and sin.

        `rows` int64 [n], ascending: the tokens whose states are needed, others are undefined.
        """
        ...


class Backend(Protocol):
    """Kernels for some dtypes on one kind of device. All are right for any CPU or GPU tensor that `supports` accepts.

    There is no call once per step yet: what a step needs is in its `AttentionContext`, whose tensors `engine.batch`
    builds once for all layers.
    """

    def describe(self) -> str:
        """For the log and `sensorium info`."""
        ...

    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether its kernels are meant for tensors and weights of this kind."""
        ...

    def empty_linear(
        self, out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device
    ) -> PackedWeight:
        """A weight [out, in] to be filled."""
        ...

    def empty_quantized(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> QuantizedWeight:
        """A quantised weight [out, in] to be filled; x and the result have `dtype`."""
        ...

    def mapped_linear(
        self, parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int
    ) -> PackedWeight | None:
        """A weight over memory-mapped rows [n, in] at (first row, rows), not copied; None where copying is faster."""
        ...

    def quantized_layout(self) -> str | None:
        """Names the layout of quantised weights; None if the disk cache cannot keep it."""
        ...

    def cached_linear(
        self, kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
    ) -> QuantizedWeight:
        """Wraps tensors from another weight's `parts()` (same layout) without copying.

        Raises ValueError on a shape or dtype mismatch, KeyError if a tensor is missing.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """`offset` is added to the weight, without rounding between."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual). The sum may be written into `residual`."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor: ...

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """Elementwise. The result may be written into `x`."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * n], gates first -> silu(gate) * up [tokens, n]"""
        ...

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """[tokens, 2 * n], gates first -> activation(gate) * up [tokens, n]"""
        ...

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first 2 * cos.shape[-1] dimensions of every head. q and k may be rotated in place."""
        ...

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """Caches of k's dtype, or int8 [blocks, kv_heads, block_size, cache_width]."""
        ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        context: AttentionContext,
        scale: float,
        sliding_window: int | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each sequence's new tokens to its cached ones, their own included; grouped queries.

        With a window, position p sees p - sliding_window + 1 .. p. `visible` int32 [tokens]: of its sequence's keys a
        token sees the first so many instead of those up to its own, the window's lower end staying where it is.
        """
        ...

    def varlen_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
    ) -> Tensor:
        """Attention in both directions inside each run of `lengths` tokens, never across; grouped queries.

        With a window, a token sees as many others on either side of itself.
        """
        ...

    def query_step(self, q: Tensor) -> int:
        """Queries that `run_attention` takes at a time, or a multiple of it, or all that remain if they are more."""
        ...

    def run_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`varlen_attention` of one run, for consecutive ones of its queries: q [n, heads, head_dim], k and v of all
        its tokens. The numbers are those of all queries at once, to the last bit."""
        ...

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
    ) -> DecoderStack | None:
        """All layers as one call, the numbers those of kernel by kernel; None where that is not supported."""
        ...
