"""An image as one square of a vision tower's size: what CLIP's and SigLIP's image processors do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sensorium.errors import CheckpointError
from sensorium.processors import image


@dataclass(frozen=True, slots=True)
class Square:
    """`size` and `crop` as `image.size_of` reads them; what is None is not done."""

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: Image.Resampling
    normalization: image.Normalization
    pad_color: list[int]  # of bars beside an image that is made square first: the mean

    @classmethod
    def of(cls, files: Mapping[str, Any], side: int, *, is_siglip: bool = False) -> Square:
        """From preprocessor_config.json. `side` is the tower's; `is_siglip`: a file that names no class is SigLIP's,
        whose class has other defaults."""
        is_siglip = str(files.get("image_processor_type", "Siglip" * is_siglip)).startswith("Siglip")
        means = (image.HALF, image.HALF) if is_siglip else (image.CLIP_MEAN, image.CLIP_STD)
        plain = {"height": side, "width": side} if is_siglip else side
        stated = files.get("size") or plain
        size = image.size_of(stated, "size") if image.switch(files, "do_resize") else None
        cropped = image.size_of(files.get("crop_size") or side, "crop_size")
        crop: tuple[int, int] | None = (cropped, cropped) if isinstance(cropped, int) else cropped
        if not image.switch(files, "do_center_crop", not is_siglip):
            crop = None
        if (crop or size) != (side, side):
            raise CheckpointError(
                f"preprocessor_config.json makes images of {crop or size} pixels, "
                f"but the vision tower is built for {(side, side)}."
            )
        color = [int(mean * 255) for mean in files.get("image_mean") or means[0]]
        return cls(size, crop, image.resample_filter(files), image.Normalization.of(files, *means), color)

    def planes(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [height, width, 3] -> float32 [3, side, side], normalised."""
        if self.size is not None:
            size = self.size
            if isinstance(size, int):
                size = image.shortest_edge_size(pixels.shape[0], pixels.shape[1], size)
            pixels = image.resize(pixels, *size, self.resample)
        return image.planes(image.center_crop(pixels, *self.crop) if self.crop else pixels, self.normalization)
