"""PaddleOCR-VL: Qwen2-VL's images within other bounds; a side shorter than a row is enlarged first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sensorium.processors.base import Setting
from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.types import Modality


class PaddleOCRVLProcessor(Qwen2VLProcessor):
    modalities: frozenset[Modality] = frozenset({"image"})
    settings: ClassVar[Mapping[str, Setting]] = {
        name: Qwen2VLProcessor.settings[name] for name in ("min_pixels", "max_pixels")
    }
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {
        "image": ("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>")
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 100295}
    pixel_bounds: ClassVar[tuple[int, int]] = (384 * 384, 1536 * 1536)

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        least = self._factor
        if height < least:
            height, width = least, round(width * least / height)
        if width < least:
            height, width = round(height * least / width), least
        return super()._image_size(height, width)
