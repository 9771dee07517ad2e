"""The layers that every model is built from. Linear layers hold a packed weight of `kernels`, which knows its layout.

Parameters are declared on the meta device and given their memory by `weights`; nothing here initialises anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.text_config import ACTIVATIONS, AttentionSpec
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, LayerCache


def declare(*shape: int) -> nn.Parameter:
    """A parameter without memory."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def activation_name(name: str) -> kernels.Activation:
    """The kernels' name of what a configuration calls so."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: unknown activation {name!r} (known: {', '.join(ACTIVATIONS)})")
    return cast("kernels.Activation", ACTIVATIONS[name])


def at_least(bits: int, wanted: kernels.Quantization | None) -> kernels.Quantization | None:
    """`wanted`, raised to at least `bits`; None (not quantised) if `bits` > 8."""
    if wanted is None or wanted.bits >= bits:
        return wanted
    return kernels.Quantization(8) if bits <= 8 else None


class Linear(nn.Module):
    """x [.., in_features] -> [.., out_features]. `shards` names the row ranges that a checkpoint stores separately."""

    packed: kernels.PackedWeight
    least_bits: ClassVar[int] = 4  # that it may be quantised to; more than 8: never

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        shards: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.shards = dict(shards or {})  # name -> (first row, rows)
        self.weight: nn.Parameter | None = declare(out_features, in_features)
        self.bias: nn.Parameter | None = declare(out_features) if bias else None

    def quantization(self, wanted: kernels.Quantization | None) -> kernels.Quantization | None:
        """How this layer is quantised in a model that is quantised as `wanted`."""
        return at_least(self.least_bits, wanted)

    def allocate(
        self, dtype: torch.dtype, device: torch.device, quantization: kernels.Quantization | None = None
    ) -> kernels.PackedWeight:
        """Replace the declared parameters by an unfilled packed weight, to be filled with `fill` and `set_bias`."""
        self.packed = kernels.empty_linear(
            self.out_features, self.in_features, dtype=dtype, device=device, quantization=quantization
        )
        self.weight = None
        self.bias = None
        return self.packed

    def map(self, parts: Sequence[tuple[int, Tensor]]) -> kernels.PackedWeight | None:
        """A weight over memory-mapped rows at (first row, rows), without bias; None where the kernels need a copy."""
        mapped = kernels.mapped_linear(parts, self.out_features, self.in_features)
        if mapped is not None:
            self.packed, self.weight, self.bias = mapped, None, None
        return mapped

    def restore(self, kept: Mapping[str, Tensor], quantization: kernels.Quantization) -> kernels.QuantizedWeight:
        """Wraps `parts()` that the disk cache kept, without a bias; ValueError if their shapes do not fit."""
        self.packed = kernels.cached_linear(kept, self.out_features, self.in_features, quantization)
        self.weight, self.bias = None, None
        return self.packed

    def pack(self, weight: Tensor, bias: Tensor | None) -> None:
        """Allocate and fill from tensors at hand; neither is kept."""
        packed = self.allocate(weight.dtype, weight.device)
        packed.fill(0, weight.flatten(1))
        packed.set_bias(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)

    # No hooks are ever used: the module's own call machinery is time per token.
    def __call__(self, *args: Any) -> Any:
        return self.packed(*args)


class QKVLinear(Linear):
    """Queries, keys and values of one attention in one product: [.., (heads + 2 * kv_heads) * head_dim]."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool = False
    ) -> None:
        q, kv = num_heads * head_dim, num_kv_heads * head_dim
        super().__init__(hidden_size, q + 2 * kv, bias=bias, shards={"q": (0, q), "k": (q, kv), "v": (q + kv, kv)})


class GateUpLinear(Linear):
    """Gate and up projection of a gated MLP in one product: [.., 2 * intermediate], gates first."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__(
            hidden_size,
            2 * intermediate_size,
            bias=bias,
            shards={"gate": (0, intermediate_size), "up": (intermediate_size, intermediate_size)},
        )


class LanguageHead(Linear):
    """Hidden states to logits; where the two are tied its rows are the embeddings. Eight bits are as few as it gets."""

    least_bits = 8


class Head(nn.Module):
    """The last layer of a classifier: small, read by people, so kept and computed in float32 whatever the model's."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = declare(out_features, in_features)
        self.bias = declare(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> float32 [n, out]"""
        return nn.functional.linear(x.float(), self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids int64 [n] -> rows [n, hidden]; ids outside the table give row 0. Tied: reads the rows of a Linear."""

    packed: kernels.PackedWeight | None = None  # of a quantised table
    least_bits: ClassVar[int] = 8

    def __init__(self, vocab_size: int, hidden_size: int, tied: Linear | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.weight = declare(vocab_size, hidden_size) if tied is None else None
        self._tied = [] if tied is None else [tied]  # in a list: not a submodule of two parents

    def quantization(self, wanted: kernels.Quantization | None) -> kernels.Quantization | None:
        return at_least(self.least_bits, wanted)

    def allocate(
        self, dtype: torch.dtype, device: torch.device, quantization: kernels.Quantization | None = None
    ) -> kernels.PackedWeight:
        """Replace the declared parameter by an unfilled packed weight, for a quantised table."""
        self.packed = kernels.empty_linear(
            self.vocab_size, self.hidden_size, dtype=dtype, device=device, quantization=quantization
        )
        self.weight = None
        return self.packed

    def restore(self, kept: Mapping[str, Tensor], quantization: kernels.Quantization) -> kernels.QuantizedWeight:
        """Wraps `parts()` that the disk cache kept; ValueError if their shapes do not fit."""
        self.packed = kernels.cached_linear(kept, self.vocab_size, self.hidden_size, quantization)
        self.weight = None
        return self.packed

    def forward(self, ids: Tensor) -> Tensor:
        ids = torch.where((ids >= 0) & (ids < self.vocab_size), ids, 0)
        if self.weight is None:
            return (self.packed or self._tied[0].packed).rows(ids)
        return nn.functional.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """`offset` is added to the weights, which some families store around 0."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = declare(size)
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual)"""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps, self.offset)


class Attention:
    """Paged attention of one decoder layer: writes the new keys and values, then attends. Has no parameters.

    Without a cache (None) every token of a prompt, which is then computed whole, attends to all of it.
    """

    __slots__ = ("head_dim", "num_heads", "num_kv_heads", "spec")

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, spec: AttentionSpec) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.spec = spec

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, context: AttentionContext) -> Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]"""
        spec = self.spec
        if cache is None:
            out = kernels.varlen_attention(q, k, v, context.query_lens, spec.scale, spec.window)
            return out.reshape(out.shape[0], -1)
        k_cache, v_cache, table = cache
        visible = context.visible if spec.media_both_ways else None
        context = context.by_table(table)
        kernels.write_kv(k, v, k_cache, v_cache, context.slots)
        out = kernels.paged_attention(q, k_cache, v_cache, context, spec.scale, spec.window, visible)
        return out.reshape(out.shape[0], -1)
