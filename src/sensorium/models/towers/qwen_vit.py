"""Qwen2-VL's vision tower: patches of pictures and videos of any size, flat and unpadded, 2-D rotary positions.

Attention stays inside one temporal slice (a picture, or a pair of a video's frames), so slices are what a batch is
cut into. Patches of a slice come ordered by 2x2 blocks; each block becomes one row of the language model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.models.layers import Linear
from sensorium.models.towers.blocks import MAX_ROWS, LayerNorm, Mlp, PatchLinear, groups, separate

CACHED_GRIDS = 32
EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True, slots=True)
class QwenVitConfig:
    """`vision_config` of Qwen2-VL in either dialect; transformers' defaults. Its `hidden_size` is the output's."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    hidden_act: str = "quick_gelu"

    @classmethod
    def of(cls, vision: Mapping[str, Any]) -> QwenVitConfig:
        given = {field: vision.get(field) for field in cls.__dataclass_fields__}
        if given["patch_size"] is None:
            given["patch_size"] = vision.get("spatial_patch_size")
        return cls(**{field: value for field, value in given.items() if value is not None})


class VisionAttention(nn.Module):
    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = size // num_heads
        self.qkv = Linear(size, 3 * size, bias=True)
        self.proj = Linear(size, size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, self.head_dim).unbind(1)
        q, k = kernels.rope(q, k, cos, sin)
        attended = kernels.varlen_attention(q, k, v, lengths, self.head_dim**-0.5)
        out: Tensor = self.proj(attended.reshape(len(x), -1))
        return out


class VisionBlock(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        size = config.embed_dim
        self.norm1 = LayerNorm(size, EPS)
        self.norm2 = LayerNorm(size, EPS)
        self.attn = VisionAttention(size, config.num_heads)
        self.mlp = Mlp(size, int(size * config.mlp_ratio), config.hidden_act)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        x += self.mlp(self.norm2(x))
        return x


class PatchEmbed(nn.Module):
    """[patches, 3 * frames * side * side] -> [patches, embed]. A picture's patches come with one frame, shown twice."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.frames = config.temporal_patch_size
        self.area = config.patch_size**2
        self.proj = PatchLinear(config.embed_dim, 3, self.frames, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] == 3 * self.area:
            pixels = pixels.view(-1, 3, 1, self.area).expand(-1, 3, self.frames, self.area).reshape(len(pixels), -1)
        out: Tensor = self.proj(pixels)
        return out


class PatchMerger(nn.Module):
    """The patches of a block side by side -> one row of the language model."""

    def __init__(self, config: QwenVitConfig, out_features: int) -> None:
        super().__init__()
        self.block = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = LayerNorm(config.embed_dim, EPS)
        self.mlp = nn.ModuleDict({"0": Linear(self.block, self.block, bias=True),
                                  "2": Linear(self.block, out_features, bias=True)})

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.gelu(self.mlp["0"](self.ln_q(x).view(-1, self.block)))
        out: Tensor = self.mlp["2"](inner)
        return out


class QwenVit(nn.Module):
    def __init__(self, config: QwenVitConfig, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, out_features)
        self._rotary: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    def activation_bytes(self, element_size: int, largest_slice: int) -> int:
        """For groups of patches that hold no more than a slice of `largest_slice`, where that alone exceeds a group."""
        config = self.config
        patches = max(MAX_ROWS, largest_slice)
        pixels = 3 * config.temporal_patch_size * config.patch_size**2
        inner = 3 * config.embed_dim * config.mlp_ratio
        return int(element_size * (patches * (10 * config.embed_dim + 2 * pixels) + MAX_ROWS * inner))

    def forward(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Per medium: patches [frames * lines * columns, …] and their grid -> rows [patches / merge², out_features]."""
        slices = [part for whole, (_, h, w) in zip(pixels, grids, strict=True) for part in torch.split(whole, h * w)]
        sizes = [(h, w) for t, h, w in grids for _ in range(t)]
        rows = [self._encode(slices[group], sizes[group]) for group in groups([h * w for h, w in sizes])]
        merged = self.config.spatial_merge_size**2
        return separate(rows[0] if len(rows) == 1 else torch.cat(rows), [t * h * w // merged for t, h, w in grids])

    def _encode(self, slices: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        dtype = self.merger.ln_q.weight.dtype
        x = torch.cat([self.patch_embed(part.to(dtype)) for part in _alike(slices)])
        tables = [self._positions(h, w, x.device) for h, w in sizes]
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        lengths = [h * w for h, w in sizes]
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        out: Tensor = self.merger(x)
        return out

    def _positions(self, lines: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [patches, head_dim / 2] of a slice: half of the frequencies count lines, half columns."""
        key = (lines, columns)
        if key in self._rotary:
            self._rotary.move_to_end(key)
            return self._rotary[key]
        merge, quarter = self.config.spatial_merge_size, self.config.embed_dim // self.config.num_heads // 4
        exponents = torch.arange(0, quarter, dtype=torch.float32, device=device) / quarter
        inv_freq = 1.0 / THETA**exponents
        place = torch.arange(lines * columns, device=device).view(lines // merge, merge, columns // merge, merge)
        place = place.permute(0, 2, 1, 3).flatten()  # patches in block order
        both = torch.stack([place // columns, place % columns], dim=1)  # [patches, 2]
        angles = (both.unsqueeze(-1) * inv_freq).flatten(1)  # [patches, 2 * quarter]
        table = (angles.cos(), angles.sin())
        if lines * columns <= MAX_ROWS:
            self._rotary[key] = table
            if len(self._rotary) > CACHED_GRIDS:
                self._rotary.popitem(last=False)
        return table


def _alike(slices: Sequence[Tensor]) -> list[Tensor]:
    """One tensor where all patches hold as many frames, which is nearly always; else as they are."""
    if len(slices) > 1 and len({part.shape[1] for part in slices}) == 1:
        return [torch.cat(list(slices))]
    return list(slices)
