"""Qwen2-VL: its own vision tower and a Qwen2 decoder with three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from sensorium.checkpoint.configs import Checkpoint
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP, DecoderForCausalLM
from sensorium.models.towers.blocks import normalised
from sensorium.models.towers.qwen_vit import QWEN_VIT_MAP, QwenVit, QwenVitConfig
from sensorium.types import Modality


class Qwen2VL(DecoderForCausalLM):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {"model.language_model.": "model.", "model.visual.": "visual."}
    weight_map: ClassVar[tuple[Rename, ...]] = (*DECODER_MAP, *QWEN_VIT_MAP)

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
            pixels.append(normalised(item, self.model.norm.weight.dtype))
        return (yield from self.visual.steps(pixels, grids))

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        largest = self.checkpoint.max_model_len * self.visual.config.spatial_merge_size**2
        if (max_pixels := self._max_pixels()) is not None:
            largest = min(largest, max_pixels // self.visual.config.patch_size**2)
        return max(super().activation_bytes(tokens), self.visual.activation_bytes(size, largest))

    def _max_pixels(self) -> int | None:
        """Of an image as the tower gets it, if there is a bound beside that of the prompt."""
        files = self.checkpoint.preprocessor
        most: int | None = files.get("max_pixels") or (files.get("size") or {}).get("longest_edge")
        return most
