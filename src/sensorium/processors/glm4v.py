"""GLM-4.1V, GLM-4.5V and GLM-OCR: Qwen2-VL's images within other bounds, whose frame counts twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.processors.base import Setting
from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.processors.qwen3_vl import clip_resize
from sensorium.types import Modality


class Glm4VProcessor(Qwen2VLProcessor):
    modalities: frozenset[Modality] = frozenset({"image"})
    settings: ClassVar[Mapping[str, Setting]] = {
        name: Qwen2VLProcessor.settings[name] for name in ("min_pixels", "max_pixels")
    }
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {
        "image": ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 151343}
    pixel_bounds: ClassVar[tuple[int, int]] = (112 * 112, 28 * 28 * 15000)  # of both frames

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        frames, bounds = self._frames, (self._min_pixels, self._max_pixels)
        return clip_resize(frames, height, width, group=frames, factor=self._factor, low=bounds[0], high=bounds[1])


class GlmOcrProcessor(Glm4VProcessor):
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 59280}
