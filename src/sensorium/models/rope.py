"""Rotary position embedding: positions -> cos and sin, computed once per step for all layers.

Kinds: default, linear, dynamic, yarn, llama3, proportional, longrope. M-RoPE takes each frequency's position from one
axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sensorium.checkpoint.text_config import RopeConfig


class RotaryEmbedding(nn.Module):
    """positions int64 [tokens] or [axes, tokens] -> (cos, sin), float32 [tokens, rotated / 2].

    LongRoPE has two sets of frequencies; `long_context` (bool [tokens]) says which tokens take the long one, so that
    one batch may mix sequences of both kinds. Dynamic rope has a set for every length beyond the stated positions;
    `lengths` (int64 [tokens]) says which length each token takes, None that there is none beyond.
    """

    inv_freq: Tensor  # float32 [rotated / 2]
    long_inv_freq: Tensor | None
    axes: Tensor | None  # int64 [rotated / 2], the axis of each frequency

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int = 0) -> None:
        """`max_positions`: those that the checkpoint states, for the dynamic kind."""
        super().__init__()
        self.scale = _scale(config)
        self.config = config
        self.max_positions = max_positions
        base = _frequencies(config, head_dim)
        long_inv_freq = None
        if config.kind == "longrope":
            long_inv_freq = base / torch.tensor(config.long_factor, device="cpu")
            base = base / torch.tensor(config.short_factor, device="cpu")
        self.register_buffer("inv_freq", base, persistent=False)
        self.register_buffer("long_inv_freq", long_inv_freq, persistent=False)
        self.register_buffer("axes", _axes(config, len(base)), persistent=False)

    def forward(
        self, positions: Tensor, long_context: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq
        if lengths is not None and self.config.kind == "dynamic":
            inv_freq = self._stretched(lengths)
        if long_context is not None and self.long_inv_freq is not None:
            inv_freq = torch.where(long_context.unsqueeze(1), self.long_inv_freq, inv_freq)  # [tokens, rotated / 2]
        if positions.dim() == 1:
            angles = positions.unsqueeze(1) * inv_freq  # in float32
        elif self.axes is None:
            angles = positions[0].unsqueeze(1) * inv_freq
        else:
            angles = positions.t().index_select(1, self.axes) * inv_freq  # rows one behind the other
        if self.scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos().mul_(self.scale), angles.sin().mul_(self.scale)

    def _stretched(self, lengths: Tensor) -> Tensor:
        """The dynamic kind's frequencies [tokens, rotated / 2]: theta grows with the length ("NTK-aware")."""
        dim, factor = 2 * len(self.inv_freq), self.config.factor
        longest = lengths.clamp(min=self.max_positions)
        theta = self.config.theta * (factor * longest / self.max_positions - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / theta.unsqueeze(1) ** _exponents(dim, lengths.device)


def query_scales(config: RopeConfig, positions: Tensor, length: int | None) -> Tensor | None:
    """float32 [tokens]: what each token's queries are multiplied by, which is more than 1 once the positions that the
    model was first trained with are over. None: none of the sequences, the longest of which has `length` tokens (None:
    nobody knows), is so long. Source: Llama 4's attention temperature."""
    original = config.original_max_positions
    if not config.query_beta or (length is not None and length <= original):
        return None
    return 1 + config.query_beta * torch.log1p(torch.div(positions, original, rounding_mode="floor").float())


def _axes(config: RopeConfig, frequencies: int) -> Tensor | None:
    sections = config.mrope_section
    if not sections:
        return None
    if not config.mrope_interleaved:
        return torch.tensor([axis for axis, size in enumerate(sections) for _ in range(size)], device="cpu")
    count = len(sections)
    turns = [(i % count, i // count) for i in range(frequencies)]
    return torch.tensor([axis if turn < sections[axis] else 0 for axis, turn in turns], device="cpu")


def _frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    if config.kind == "proportional":
        return _proportional(config, head_dim)
    dim = int(head_dim * config.partial)
    inv_freq = 1.0 / (config.theta ** _exponents(dim, torch.device("cpu")))
    if config.kind == "linear":
        return inv_freq / config.factor
    if config.kind == "llama3":
        return _llama3(inv_freq, config)
    if config.kind == "yarn":
        return _yarn(inv_freq, config, dim)
    return inv_freq


def _proportional(config: RopeConfig, head_dim: int) -> Tensor:
    """All dimensions take part, most of them with frequency 0: the first ones turn as if they were all."""
    inv_freq = 1.0 / (config.theta ** _exponents(head_dim, torch.device("cpu"))) / config.factor
    inv_freq[int(config.partial * head_dim // 2) :] = 0
    return inv_freq


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _llama3(inv_freq: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, between them it depends on the turns per context."""
    turns = config.original_max_positions * inv_freq / (2 * math.pi)
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / config.factor + smooth * inv_freq


def _yarn(inv_freq: Tensor, config: RopeConfig, dim: int) -> Tensor:
    """Frequencies of many turns per original context are kept, those of few divided by `factor`, and between the two
    dimensions where that begins and ends the share changes evenly. Source: Peng et al. 2023 (YaRN), section 3.2."""
    first, last = (
        dim * math.log(config.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
        for turns in (config.beta_fast, config.beta_slow)
    )
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    divided = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    return inv_freq / config.factor * divided + inv_freq * (1 - divided)


def _yarn_scale(config: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 1.0 if config.factor <= 1.0 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _scale(config: RopeConfig) -> float:
    """LongRoPE and YaRN multiply cos and sin, for short and long sequences alike."""
    if config.kind not in ("longrope", "yarn"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.kind == "yarn":
        return _yarn_scale(config)
    if config.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_positions))
