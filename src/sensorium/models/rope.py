"""Rotary position embedding: positions -> cos and sin, computed once per step for all layers.

Kinds: default, linear, llama3, longrope; `dynamic` is the default kind, because it only differs beyond the positions
that the checkpoint states, and no request is admitted there. M-RoPE takes each frequency's position from one axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sensorium.checkpoint import RopeConfig


class RotaryEmbedding(nn.Module):
    """positions int64 [tokens] or [axes, tokens] -> (cos, sin), float32 [tokens, rotated / 2].

    LongRoPE has two sets of frequencies; `long_context` (bool [tokens]) says which tokens take the long one, so that
    one batch may mix sequences of both kinds.
    """

    inv_freq: Tensor  # float32 [rotated / 2]
    long_inv_freq: Tensor | None
    axes: Tensor | None  # int64 [rotated / 2], the axis of each frequency

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.scale = _scale(config)
        base = _frequencies(config, head_dim)
        long_inv_freq = None
        if config.kind == "longrope":
            long_inv_freq = base / torch.tensor(config.long_factor, device="cpu")
            base = base / torch.tensor(config.short_factor, device="cpu")
        axes = None
        if config.mrope_section:
            sections = torch.tensor(config.mrope_section, device="cpu")
            axes = torch.repeat_interleave(torch.arange(len(config.mrope_section), device="cpu"), sections)
        self.register_buffer("inv_freq", base, persistent=False)
        self.register_buffer("long_inv_freq", long_inv_freq, persistent=False)
        self.register_buffer("axes", axes, persistent=False)

    def forward(self, positions: Tensor, long_context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq
        if long_context is not None and self.long_inv_freq is not None:
            inv_freq = torch.where(long_context.unsqueeze(1), self.long_inv_freq, inv_freq)  # [tokens, rotated / 2]
        wide = positions.float()
        if wide.dim() == 1:
            angles = wide.unsqueeze(1) * inv_freq
        elif self.axes is None:
            angles = wide[0].unsqueeze(1) * inv_freq
        else:
            angles = wide.index_select(0, self.axes).t() * inv_freq
        if self.scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos().mul_(self.scale), angles.sin().mul_(self.scale)


def _frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    dim = int(head_dim * config.partial)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    inv_freq = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return inv_freq / config.factor
    if config.kind == "llama3":
        return _llama3(inv_freq, config)
    return inv_freq


def _llama3(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, between them it depends on the turns per context."""
    turns = config.original_max_positions * inv_freq / (2 * math.pi)
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / config.factor + smooth * inv_freq


def _scale(config: RopeConfig) -> float:
    """LongRoPE multiplies cos and sin, for short and long sequences alike."""
    if config.kind != "longrope":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_positions))
