"""Qwen2-VL: its own vision tower and a Qwen2 decoder with three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Steps
from sensorium.models.decoder import DecoderForCausalLM
from sensorium.models.towers.blocks import MAX_ROWS
from sensorium.models.towers.qwen_vit import QwenVit, QwenVitConfig
from sensorium.types import Modality


class Qwen2VL(DecoderForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {"model.language_model.": "model.", "model.visual.": "visual."}

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.visual = self.build_vision(checkpoint)

    def build_vision(self, checkpoint: Checkpoint) -> QwenVit:
        return QwenVit(QwenVitConfig.of(checkpoint.config.get("vision_config") or {}), self.text.hidden_size)

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        grids = [(int(t), int(h), int(w)) for t, h, w in (item["grid"].tolist() for item in items)]
        pixels = []
        for item in items:
            yield item["pixels"].numel()
            pixels.append(self._pixels(item))
        return (yield from self.visual.steps(pixels, grids))

    def _pixels(self, item: Mapping[str, Tensor]) -> Tensor:
        """Patches [n, 3 * …], normalised in float32 and then in the weights' type; a piece at a time."""
        pixels, dtype = item["pixels"], self.model.norm.weight.dtype
        if "scale" not in item:
            return pixels.to(dtype)
        out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
        scale, shift = item["scale"].unsqueeze(1), item["shift"].unsqueeze(1)
        for rows, into in zip(torch.split(pixels, MAX_ROWS), torch.split(out, MAX_ROWS), strict=True):
            channels = rows.view(len(rows), 3, -1).to(torch.float32, copy=True)
            into.view(channels.shape).copy_(channels.mul_(scale).add_(shift))
        return out

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        largest = self.checkpoint.max_model_len * self.visual.config.spatial_merge_size**2
        files = self.checkpoint.preprocessor
        max_pixels = files.get("max_pixels") or (files.get("size") or {}).get("longest_edge")
        if max_pixels is not None:
            largest = min(largest, max_pixels // self.visual.config.patch_size**2)
        return max(super().activation_bytes(tokens), self.visual.activation_bytes(size, largest))
