"""The gated delta net (Yang et al. 2024) of Qwen3.5 and later, in the place of a layer's attention: a matrix for each
head that forgets, and learns of every token what it did not know."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sensorium import kernels
from sensorium.checkpoint.state_layers import DeltaNetSpec
from sensorium.kernels.context import AttentionContext, StateCache
from sensorium.models.cache import StatePart
from sensorium.models.layers import Exact, Linear, RMSNorm, SmallLinear, declare
from sensorium.models.short_conv import CausalConv, StateMixer


class Decay(Exact):
    """How much each head forgets."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.rate = declare(heads)
        self.bias = declare(heads)


class DeltaNet(StateMixer):
    def __init__(self, hidden_size: int, spec: DeltaNetSpec, eps: float) -> None:
        super().__init__()
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
        channels, heads = 2 * keys + values, spec.value_heads
        self.in_proj = Linear(hidden_size, channels + values, shards={"qkv": (0, channels), "z": (channels, values)})
        self.gates = SmallLinear(hidden_size, 2 * heads, shards={"b": (0, heads), "a": (heads, heads)})
        self.conv = CausalConv(channels, spec.taps, silu=True)
        self.decay = Decay(heads)
        self.norm = RMSNorm(spec.value_dim, eps)
        self.out_proj = Linear(values, hidden_size)
        self.spec = spec
        self.widths = [keys, keys, values]

    @property
    def state_parts(self) -> tuple[StatePart, ...]:
        spec = self.spec
        return self.conv.state, StatePart((spec.value_heads, spec.key_dim, spec.value_dim), torch.float32)

    def token_bytes(self, size: int) -> int:
        """Projections, and float32 copies of queries and keys for every value head, of values and of what is read."""
        spec = self.spec
        wide = spec.value_heads * (4 * spec.key_dim + 6 * spec.value_dim)
        return self.conv.token_bytes(size) + 2 * self.in_proj.out_features * size + 4 * wide

    @functools.cached_property
    def delta(self) -> kernels.DeltaParts:
        """Once the weights are there."""
        spec, decay, norm = self.spec, self.decay, self.norm
        sizes = (spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim)
        takes_turns = spec.takes_turns and spec.key_heads != spec.value_heads
        return kernels.DeltaParts(self.gates.packed, decay.rate, decay.bias, norm.weight, norm.eps, *sizes, takes_turns)

    def state_layer(self) -> kernels.StateParts:
        return kernels.StateParts(self.conv.weight[:, 0], self.conv.bias, self.delta)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: StateCache,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Of the tokens `rows` int64 [n], or of all. Positions play no part."""
        (before, memory), delta = cache.parts, self.delta
        mixed, z = self.in_proj(x).split([sum(self.widths), self.widths[2]], dim=1)
        gates, mixed = self.gates(x), self.conv(mixed, before, context)
        out = kernels.delta_mixed(delta, mixed, gates, z, memory, context.runs)
        projected: Tensor = self.out_proj(out if rows is None else out[rows])
        return projected
