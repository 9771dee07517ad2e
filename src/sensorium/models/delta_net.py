"""The gated delta net (Yang et al. 2024) of Qwen3.5 and later, in the place of a layer's attention: a matrix for each
head that forgets, and learns of every token what it did not know."""

from __future__ import annotations

import torch
from torch import Tensor

from sensorium import kernels
from sensorium.checkpoint.state_layers import DeltaNetSpec
from sensorium.kernels.context import AttentionContext, StateCache
from sensorium.kernels.reference.states import regrouped
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

    def state_layer(self) -> kernels.StateParts:
        spec, decay, norm = self.spec, self.decay, self.norm
        sizes = (spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim)
        takes_turns = spec.takes_turns and spec.key_heads != spec.value_heads
        delta = kernels.DeltaParts(
            self.gates.packed, decay.rate, decay.bias, norm.weight, norm.eps, *sizes, takes_turns
        )
        return kernels.StateParts(self.conv.weight[:, 0], self.conv.bias, delta)

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
        spec, (before, memory) = self.spec, cache.parts
        mixed, z = self.in_proj(x).split([sum(self.widths), self.widths[2]], dim=1)
        decay, learned = kernels.delta_gates(self.gates(x), self.decay.rate, self.decay.bias)
        q, k, v = self.conv(mixed, before, context).split(self.widths, dim=1)
        q, k = (part.view(len(x), spec.key_heads, spec.key_dim) for part in (q, k))
        v = self._by_keys(v.view(len(x), spec.value_heads, spec.value_dim))
        decay, learned = self._by_keys(decay), self._by_keys(learned)
        out = self._in_turn(kernels.delta_rule(q, k, v, decay, learned, memory, context.runs))
        if rows is not None:
            out, z = out[rows], z[rows]
        projected: Tensor = self.out_proj(kernels.norm_gated(out, z, self.norm.weight, self.norm.eps))
        return projected

    def _by_keys(self, states: Tensor) -> Tensor:
        """[tokens, value heads, ..], those of each key head side by side."""
        return self._regrouped(states, -1, self.spec.key_heads)

    def _in_turn(self, states: Tensor) -> Tensor:
        """The same in the order that they are stored in."""
        return self._regrouped(states, self.spec.key_heads, -1)

    def _regrouped(self, states: Tensor, first: int, second: int) -> Tensor:
        if not self.spec.takes_turns or self.spec.key_heads == self.spec.value_heads:
            return states
        return regrouped(states, first, second)
