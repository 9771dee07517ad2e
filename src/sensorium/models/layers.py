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
from sensorium.kernels.context import Additions, AttentionContext, LayerCache
from sensorium.parallel.ranks import Ranks, Span


def declare(*shape: int) -> nn.Parameter:
    """A parameter without memory. CheckpointError if no memory could hold it."""
    try:
        return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    except (TypeError, RuntimeError, OverflowError) as error:  # by what overflows
        raise CheckpointError(f"the configuration asks for a weight of {' x '.join(map(str, shape))}") from error


def activation_name(name: str) -> kernels.Activation:
    """The kernels' name of what a configuration calls so."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: unknown activation {name!r} (known: {', '.join(ACTIVATIONS)})")
    return cast("kernels.Activation", ACTIVATIONS[name])


def at_least(bits: int, wanted: kernels.Quantization | None) -> kernels.Quantization | None:
    """`wanted`, raised to at least `bits`; None (not quantised) if `bits` > 8. int8 is nearer than fp8."""
    if wanted is None or wanted.bits > bits or (wanted.bits == bits and not wanted.floats):
        return wanted
    return kernels.Quantization(8) if bits <= 8 else None


class Linear(nn.Module):
    """x [.., in_features] -> [.., out_features]. `shards` names the row ranges that a checkpoint stores separately."""

    packed: kernels.PackedWeight
    is_split = False  # whether it has a part of the whole weight
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
        self.spans = [Span(0, 0, out_features)]  # which rows of the whole weight these are; of its shards, see `keep`
        self.columns = slice(None)  # of the whole weight
        self.whole = out_features, in_features
        self.weight: nn.Parameter | None = declare(out_features, in_features)
        self.bias: nn.Parameter | None = declare(out_features) if bias else None

    def quantization(self, wanted: kernels.Quantization | None) -> kernels.Quantization | None:
        """How this layer is quantised in a model that is quantised as `wanted`."""
        return at_least(self.least_bits, wanted)

    def keep(self, **parts: tuple[int, int]) -> None:
        """Have some rows only: (first, number) of each shard, which `shards` counts in the whole weight."""
        self.spans = []
        for name, (first, count) in parts.items():
            here = sum(span.rows for span in self.spans)
            self.spans.append(Span(here, self.shards[name][0] + first, count))
        self._declare(sum(span.rows for span in self.spans))

    def keep_rows(self, first: int, count: int) -> None:
        """The same of a layer without shards."""
        self.spans = [Span(0, first, count)]
        self._declare(count)

    def _declare(self, out_features: int) -> None:
        self.is_split = True
        self.out_features = out_features
        self.weight = declare(out_features, self.in_features)
        self.bias = None if self.bias is None else declare(out_features)

    def settle(self, quantization: kernels.Quantization | None) -> None:
        """Told how it is quantised, before its weight is read."""

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

    def map_blocks(self, parts: Sequence[kernels.MappedBlocks], dtype: torch.dtype) -> kernels.PackedWeight | None:
        """The same of blocks."""
        mapped = kernels.mapped_blocks(parts, self.out_features, self.in_features, dtype)
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

    def adapted(self, x: Tensor, adapters: Additions | None) -> Tensor:
        """The same of all tokens of a step, with what adapters add."""
        out: Tensor = self.packed(x)
        if adapters is not None:
            adapters.add(self, out, x)
        return out


class SplitInputs(Linear):
    """A layer whose inputs the ranks have a part of each, in their order, and whose output all have.

    A rank has the weight's columns of its inputs, and products are added up. Where the weight is quantised, inputs are
    joined first and each rank has a part of the rows: columns would be cut through codes' groups, and activations
    rounded by the largest of a part.
    """

    def __init__(self, layer: Linear, ranks: Ranks, first: int, count: int) -> None:
        """`layer` is not filled yet; inputs [first, first + count) are this rank's."""
        super().__init__(count, layer.out_features, bias=layer.bias is not None)
        self.is_split, self.whole = True, layer.whole
        self.columns = slice(first, first + count)
        self.ranks = ranks
        self.joins = False

    def settle(self, quantization: kernels.Quantization | None) -> None:
        self.joins = quantization is not None
        if self.joins:
            outputs, self.in_features = self.whole
            self.columns = slice(None)
            self.keep_rows(*self.ranks.part(outputs))
        elif self.ranks.rank:
            self.bias = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapted(x, None)

    forward = __call__

    def adapted(self, x: Tensor, adapters: Additions | None) -> Tensor:
        joined = self.ranks.join(x) if self.joins else x
        out: Tensor = self.packed(joined) if self.joins else kernels.partial(self.packed, joined)
        if adapters is not None:
            adapters.add(self, out, joined)  # what is linear may be added before the parts are
        return self.ranks.join(out) if self.joins else self.ranks.sum(out).to(x.dtype)


class QKVLinear(Linear):
    """Queries, keys and values of one attention in one product: [.., (heads + 2 * kv_heads) * head_dim]; fewer where
    `kinds` leaves some out."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        kinds: str = "qkv",
    ) -> None:
        q, kv = num_heads * head_dim, num_kv_heads * head_dim
        starts = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
        shards = {kind: starts[kind] for kind in kinds}
        super().__init__(hidden_size, sum(rows for _, rows in shards.values()), bias=bias, shards=shards)


class GateUpLinear(Linear):
    """Gate and up projection of a gated MLP in one product: [.., 2 * intermediate], gates first."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__(
            hidden_size,
            2 * intermediate_size,
            bias=bias,
            shards={"gate": (0, intermediate_size), "up": (intermediate_size, intermediate_size)},
        )


class MLP(nn.Module):
    """down(activation(gate) * up)"""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = GateUpLinear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation_name(hidden_act)

    def split(self, ranks: Ranks) -> list[nn.Module]:
        """Have a part of the inner states, and of every module something."""
        part = ranks.part(self.down_proj.in_features)
        self.gate_up_proj.keep(gate=part, up=part)
        self.down_proj = SplitInputs(self.down_proj, ranks, *part)
        return []

    def forward(self, x: Tensor, adapters: Additions | None = None) -> Tensor:
        inner = kernels.gated(self.gate_up_proj.adapted(x, adapters), self.activation)
        return self.down_proj.adapted(inner, adapters)


class LanguageHead(Linear):
    """Hidden states to logits; where the two are tied its rows are the embeddings. Eight bits are as few as it gets."""

    least_bits = 8
    ranks: Ranks | None = None

    def split(self, ranks: Ranks) -> None:
        """Have a part of the vocabulary."""
        self.ranks = ranks
        self.keep_rows(*ranks.part(self.whole[0]))

    def __call__(self, x: Tensor) -> Tensor:
        """Of a part of the vocabulary all logits on rank 0, and nothing of use elsewhere."""
        logits: Tensor = self.packed(x)
        if self.ranks is None:
            return logits
        size, each = self.whole[0], -(-self.whole[0] // self.ranks.size)
        padded = nn.functional.pad(logits, (0, each - logits.shape[-1]))  # of the last ranks, which have fewer
        return self.ranks.join_on_first(padded)[..., :size]

    forward = __call__


class SmallLinear(Linear):
    """Never quantised: a small part of the weights, on which much depends."""

    least_bits = 16


class Exact(nn.Module):
    """Its parameters are float32, whatever the model's type."""


class Head(Exact):
    """The last layer of a classifier: small, read by people, so computed in float32."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = declare(out_features, in_features)
        self.bias = declare(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] -> float32 [n, out]"""
        return nn.functional.linear(x.float(), self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids int64 [n] -> rows [n, hidden]; ids outside the table, as media have, give its first or last row. Tied:
    reads the rows of a Linear."""

    packed: kernels.PackedWeight | None = None  # of a quantised table
    is_split = False  # whether it has a part of the whole table
    least_bits: ClassVar[int] = 8

    def __init__(self, vocab_size: int, hidden_size: int, tied: Linear | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.weight = declare(vocab_size, hidden_size) if tied is None else None
        self._tied = [] if tied is None else [tied]  # in a list: not a submodule of two parents
        self.spans = [Span(0, 0, vocab_size)]
        self.whole = vocab_size, hidden_size
        self.ranks: Ranks | None = None

    def split(self, ranks: Ranks) -> None:
        """Have a part of the table, which is the part of the layer that it is tied to."""
        self.is_split, self.ranks = True, ranks
        first, count = ranks.part(self.whole[0])
        self.spans = [Span(0, first, count)]
        self.vocab_size = count
        if self.weight is not None:
            self.weight = declare(count, self.hidden_size)

    def settle(self, quantization: kernels.Quantization | None) -> None:
        """See `Linear`."""

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

    def map_blocks(self, parts: Sequence[kernels.MappedBlocks], dtype: torch.dtype) -> kernels.PackedWeight | None:
        """See `Linear`."""
        mapped = kernels.mapped_blocks(parts, self.vocab_size, self.hidden_size, dtype)
        if mapped is not None:
            self.packed, self.weight = mapped, None
        return mapped

    def restore(self, kept: Mapping[str, Tensor], quantization: kernels.Quantization) -> kernels.QuantizedWeight:
        """Wraps `parts()` that the disk cache kept; ValueError if their shapes do not fit."""
        self.packed = kernels.cached_linear(kept, self.vocab_size, self.hidden_size, quantization)
        self.weight = None
        return self.packed

    def __call__(self, ids: Tensor) -> Tensor:  # without nn.Module's, which takes longer than a small step's look-up
        if self.ranks is None:
            return self._rows(ids.clamp(0, self.vocab_size - 1))
        ids = ids.clamp(0, self.whole[0] - 1) - self.spans[0].first
        rows = self._rows(ids.clamp(0, self.vocab_size - 1))
        return self.ranks.sum(rows.masked_fill(((ids < 0) | (ids >= self.vocab_size)).unsqueeze(1), 0))

    def _rows(self, ids: Tensor) -> Tensor:
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


class PlainNorm(nn.Module):
    """RMSNorm without weights."""

    ones: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(size, device="cpu"), persistent=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.ones.to(x.dtype), self.eps)


class Attention:
    """Paged attention of one decoder layer: writes the new keys and values, unless it reads another layer's, then
    attends. Has no parameters.

    Without a cache (None) every token of a prompt, which is then computed whole, attends to all of it.
    """

    __slots__ = ("head_dim", "num_heads", "num_kv_heads", "spec")

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, spec: AttentionSpec) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.spec = spec

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache | None,
        context: AttentionContext,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]

        `sinks` [heads]: see `Backend.paged_attention`."""
        spec = self.spec
        if cache is None:
            out = kernels.varlen_attention(q, k, v, context.query_lens, spec.scale, spec.window)
            return out.reshape(out.shape[0], -1)
        k_cache, v_cache, table = cache
        visible = context.visible if spec.media_both_ways else None
        context = context.by_table(table)
        if spec.source is None:
            kernels.write_kv(k, v, k_cache, v_cache, context.slots)
        out = kernels.paged_attention(q, k_cache, v_cache, context, spec.scale, spec.window, visible, sinks)
        return out.reshape(out.shape[0], -1)
