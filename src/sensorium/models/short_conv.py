"""LFM2's gated short convolution, in the place of a layer's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.state_layers import ShortConvSpec
from sensorium.kernels.context import AttentionContext, StateCache
from sensorium.models.cache import StatePart
from sensorium.models.layers import Linear, declare


class CausalConv(nn.Module):
    """Every channel by itself over the last `taps` tokens of its sequence."""

    def __init__(self, channels: int, taps: int, *, bias: bool = False, silu: bool = False) -> None:
        super().__init__()
        self.weight = declare(channels, 1, taps)
        self.bias = declare(channels) if bias else None
        self.silu = silu

    @property
    def state(self) -> StatePart:
        channels, _, taps = self.weight.shape
        return StatePart((taps - 1, channels))

    def token_bytes(self, size: int) -> int:
        """What a token of a step takes at most, with elements of so many bytes: all taps in float32, and their sum."""
        channels, _, taps = self.weight.shape
        return channels * (4 * (taps + 3) + 2 * size)

    def forward(self, x: Tensor, states: Tensor, context: AttentionContext) -> Tensor:
        """x [tokens, channels] -> the same"""
        return kernels.causal_conv(x, self.weight[:, 0], self.bias, states, context.runs, silu=self.silu)


class StateMixer(nn.Module):
    """What mixes the tokens of a layer in attention's place: of the tokens before, a state of fixed size is kept."""

    in_proj: Linear
    out_proj: Linear

    @property
    def state_parts(self) -> tuple[StatePart, ...]:
        raise NotImplementedError

    def token_bytes(self, size: int) -> int:
        """What a token of a step takes at most, with elements of so many bytes."""
        raise NotImplementedError

    def state_layer(self) -> kernels.StateParts:
        """What stands between `in_proj` and `out_proj`."""
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """What `kernels.DecoderLayerParts` has of it, by field."""
        return {
            "qkv": self.in_proj.packed,
            "q_norm": None,
            "k_norm": None,
            "o": self.out_proj.packed,
            "sliding_window": None,
            "state": self.state_layer(),
        }


class ShortConv(StateMixer):
    """Of three projections the product of the first and the last goes through the convolution, and what comes out is
    multiplied by the second."""

    def __init__(self, hidden_size: int, spec: ShortConvSpec) -> None:
        super().__init__()
        self.in_proj = Linear(hidden_size, 3 * hidden_size, bias=spec.bias)
        self.conv = CausalConv(hidden_size, spec.taps, bias=spec.bias)
        self.out_proj = Linear(hidden_size, hidden_size, bias=spec.bias)

    @property
    def state_parts(self) -> tuple[StatePart, ...]:
        return (self.conv.state,)

    def token_bytes(self, size: int) -> int:
        return self.conv.token_bytes(size) + 5 * self.out_proj.out_features * size

    def state_layer(self) -> kernels.StateParts:
        return kernels.StateParts(self.conv.weight[:, 0], self.conv.bias, None)

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
        before, after, inner = self.in_proj(x).chunk(3, dim=-1)
        mixed = self.conv(before * inner, cache.parts[0], context).mul_(after)
        out: Tensor = self.out_proj(mixed if rows is None else mixed[rows])
        return out
