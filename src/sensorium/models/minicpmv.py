"""MiniCPM-V 2.6, 4.0 and 4.5: SigLIP on slices of any size, a resampler that makes 64 rows of each, and a Qwen2, Llama
or Qwen3 decoder.

Source of the resampler: Bai et al. 2023 (Qwen-VL), with positions of the slice's own grid; 4.5 reads several frames of
a video as one, each with its time (Yu et al. 2025).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.layers import Linear, declare
from sensorium.models.towers.blocks import MAX_ROWS, LayerNorm
from sensorium.models.towers.clip import clip_map
from sensorium.models.towers.siglip import Grid, SiglipTower, area, encoded_slices, grids_of, siglip_config
from sensorium.types import Modality

EPS = 1e-6
HEAD_DIM = 128
THETA = 10000.0
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Pack:
    """Slices that the resampler reads as one: their grids and, of frames with a time, that in tenths of a second."""

    grids: tuple[Grid, ...]
    times: tuple[int, ...] = ()

    @property
    def num_patches(self) -> int:
        return sum(map(area, self.grids))


class CrossAttention(nn.Module):
    """Queries [rows, size], the same for every pack, look at the pack's keys and values [patches, size]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_proj_weight = declare(3 * size, size)  # one tensor for three different inputs
        self.in_proj_bias = declare(3 * size)
        self.out_proj = Linear(size, size, bias=True)
        self.num_heads = size // HEAD_DIM

    def forward(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        """-> [packs, rows, size]"""
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (functional.linear(*part).view(len(part[0]), self.num_heads, -1) for part in parts)
        attended, start = [], 0
        for length, run in itertools.groupby(lengths):
            count = len(list(run))
            end = start + count * length
            keys, values = (x[start:end].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (k, v))
            queries = q.transpose(0, 1).expand(count, -1, -1, -1)  # [packs, heads, rows, head_dim]
            out = functional.scaled_dot_product_attention(queries, keys, values)
            attended.append(out.transpose(1, 2).flatten(2))
            start = end
        rows: Tensor = self.out_proj(torch.cat(attended))
        return rows


class Resampler(nn.Module):
    """States [patches, tower] of packs -> [packs, queries, size]."""

    def __init__(self, num_queries: int, size: int, tower_size: int) -> None:
        super().__init__()
        self.size = size
        self.query = declare(num_queries, size)
        self.kv_proj = Linear(tower_size, size) if tower_size != size else None
        self.ln_q = LayerNorm(size, EPS)
        self.ln_kv = LayerNorm(size, EPS)
        self.ln_post = LayerNorm(size, EPS)
        self.attn = CrossAttention(size)
        self.proj = declare(size, size)  # [in, out]

    def forward(self, states: Tensor, packs: Sequence[Pack]) -> Tensor:
        value = self.ln_kv(states if self.kv_proj is None else self.kv_proj(states))
        key = value + self._positions([grid for pack in packs for grid in pack.grids], value)
        if any(pack.times for pack in packs):
            key += self._moments(packs, value)
        rows = self.attn(self.ln_q(self.query), key, value, [pack.num_patches for pack in packs])
        return torch.matmul(self.ln_post(rows), self.proj)

    def _positions(self, grids: Sequence[Grid], like: Tensor) -> Tensor:
        """[patches, size]: the first half of the channels tells the column, the second the line."""
        table = self._sinusoids(range(max(map(max, grids))), self.size // 2, like)
        parts = []
        for grid in grids:
            lines, columns = (
                index.flatten()
                for index in torch.meshgrid(*(torch.arange(count, device=like.device) for count in grid), indexing="ij")
            )
            parts.append(torch.cat([table[columns], table[lines]], dim=1))
        return torch.cat(parts)

    def _moments(self, packs: Sequence[Pack], like: Tensor) -> Tensor:
        """[patches, size]: the time of each patch's frame in all channels, zero where it has none."""
        parts = []
        for pack in packs:
            sizes = torch.tensor([*map(area, pack.grids)], device=like.device)
            if pack.times:
                parts.append(self._sinusoids(pack.times, self.size, like).repeat_interleave(sizes, dim=0))
            else:
                parts.append(like.new_zeros(pack.num_patches, self.size))
        return torch.cat(parts)

    def _sinusoids(self, places: Sequence[int], width: int, like: Tensor) -> Tensor:
        """[places, width]: sines, then cosines, of falling frequencies; float64, as an hour has 36,000 places."""
        omega = THETA ** -(torch.arange(width // 2, dtype=torch.float64, device=like.device) / (width // 2))
        angles = torch.tensor([*places], dtype=torch.float64, device=like.device).unsqueeze(1) * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class MiniCPMV(DecoderForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {"llm.": ""}
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *clip_map("vpm"))
    pixel_scale: Tensor  # float32 [3, 1]
    pixel_shift: Tensor

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config, size = checkpoint.config, self.text.hidden_size
        versions = checkpoint.family.text_versions
        if str(config.get("version")) not in versions:
            raise CheckpointError(
                f"config.json: MiniCPM-V version {config.get('version')} is not supported "
                f"(supported: {', '.join(versions)})"
            )
        if size % HEAD_DIM:
            raise CheckpointError(f"config.json: hidden_size {size} is no multiple of the resampler's {HEAD_DIM}")
        vision = siglip_config(config.get("vision_config") or {})
        self.vpm = SiglipTower(vision, vision.num_layers - bool(config.get("drop_vision_last_layer", True)))
        self.num_queries: int = config.get("query_num", 64)
        self.resampler = Resampler(self.num_queries, size, vision.hidden_size)
        self.ignored = (*self.ignored, "resampler.pos_embed", *(f"vpm.{name}" for name in self.vpm.unused))
        mean, std = (
            torch.tensor(checkpoint.preprocessor.get(name) or default, device="cpu")
            for name, default in (("norm_mean", MEAN), ("norm_std", STD))
        )
        self.register_buffer("pixel_scale", (1 / 255 / std).unsqueeze(1), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).unsqueeze(1), persistent=False)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        patches, packs = [item["patches"] for item in items], [*map(_packs_of, items)]
        count = self.num_queries
        return (yield from encoded_slices(patches, packs, self._encode, lambda _: count, lambda one: one.num_patches))

    def _encode(self, patches: Tensor, packs: Sequence[Pack]) -> Steps[Tensor]:
        """uint8 [patches, 3 * side * side] -> [packs * queries, hidden]"""
        yield patches.numel()
        pixels = patches.view(len(patches), 3, -1).float().mul_(self.pixel_scale).add_(self.pixel_shift)
        states = yield from self.vpm.steps(pixels.flatten(1), [grid for pack in packs for grid in pack.grids])
        yield len(states) * self.text.hidden_size * (states.shape[1] + 2 * self.text.hidden_size)
        out: Tensor = self.resampler(states, packs).flatten(0, 1)
        return out

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        resampled = MAX_ROWS * size * 5 * self.text.hidden_size
        return max(super().activation_bytes(tokens), self.vpm.activation_bytes(size), resampled)


def _packs_of(item: Mapping[str, Tensor]) -> list[Pack]:
    """Each slice alone, or `packs` int32 [packs], how many are read together, with `times` int32 [slices]."""
    grids = grids_of(item)
    if "packs" not in item:
        return [Pack((grid,)) for grid in grids]
    left, times = iter(grids), iter(item["times"].tolist())
    take = itertools.islice
    return [Pack(tuple(take(left, count)), tuple(take(times, count))) for count in item["packs"].tolist()]
