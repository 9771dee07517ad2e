"""Pixels from bytes for every image processor: PIL resizing, cropping, and uint8 to normalised float32.

Torch-free and without state. The results equal transformers' `…ImageProcessorPil` classes: the same bytes out of PIL,
and within 1e-6 after rescaling and normalising, which are one multiplication and one addition here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sensorium.errors import CheckpointError

Pixels = NDArray[np.uint8]  # [height, width, 3]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Normalization:
    """Rescaling and normalisation of each channel as value * scale + shift."""

    scale: NDArray[np.float32]  # [3, 1, 1]
    shift: NDArray[np.float32]  # [3, 1, 1]

    @classmethod
    def of(
        cls, preprocessor: Mapping[str, Any], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
    ) -> Normalization:
        """As the file says, with the family's own mean and deviation where it is silent."""
        scale, shift = np.ones(3), np.zeros(3)
        if switch(preprocessor, "do_rescale"):
            scale *= _number(preprocessor, "rescale_factor", 1 / 255)
        if switch(preprocessor, "do_normalize"):
            deviation = np.array(_channels(preprocessor, "image_std", std))
            if not (deviation > 0).all():
                raise CheckpointError("preprocessor_config.json: 'image_std' must be positive")
            shift = -np.array(_channels(preprocessor, "image_mean", mean)) / deviation
            scale /= deviation
        return cls(scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None])

    def apply(self, values: NDArray[np.float32]) -> None:
        """In place on [..., 3, any, any]."""
        values *= self.scale
        values += self.shift


def switch(preprocessor: Mapping[str, Any], name: str, default: bool = True) -> bool:
    """A `do_…` field; absent and null mean the default."""
    value = preprocessor.get(name)
    return default if value is None else bool(value)


def resample_filter(preprocessor: Mapping[str, Any]) -> Image.Resampling:
    """The file's `resample` (PIL's number); bicubic where it does not say."""
    code = preprocessor.get("resample")
    try:
        return Image.Resampling.BICUBIC if code is None else Image.Resampling(code)
    except ValueError:
        raise CheckpointError(f"preprocessor_config.json: 'resample' {code!r} is not a filter of PIL's") from None


def size_of(value: Any, name: str) -> tuple[int, int] | int:
    """A `size` or `crop_size` of any dialect: (height, width), or an int for the shortest edge."""
    if isinstance(value, Mapping):
        edge, height, width = value.get("shortest_edge"), value.get("height"), value.get("width")
        if _is_side(edge) and value.get("longest_edge") is None:
            return edge
        if _is_side(height) and _is_side(width):
            return height, width
    elif isinstance(value, Sequence) and len(value) == 2 and all(map(_is_side, value)):
        return value[0], value[1]
    elif _is_side(value):
        return value
    raise CheckpointError(f"preprocessor_config.json: '{name}' is {value!r}, which is not a size this model can use")


def shortest_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Height and width after resizing so that the shorter of them is `edge`; the longer is cut to an integer."""
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def resize(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), resample))


def center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle of the image; where it is smaller than asked, black is added around it."""
    missing_h, missing_w = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if missing_h or missing_w:
        # transformers gives the odd pixel of a padded side to its beginning.
        before_h, before_w = math.ceil(missing_h / 2), math.ceil(missing_w / 2)
        pixels = np.pad(pixels, ((before_h, missing_h - before_h), (before_w, missing_w - before_w), (0, 0)))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def pad_to_square(pixels: Pixels, color: Sequence[int]) -> Pixels:
    """Bars of `color` on the shorter axis, the smaller half before the image."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = np.array(color, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def planes(pixels: Pixels, normalization: Normalization) -> NDArray[np.float32]:
    """uint8 [height, width, 3] -> float32 [3, height, width], normalised."""
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    out[...] = pixels.transpose(2, 0, 1)
    normalization.apply(out)
    return out


def _is_side(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(preprocessor: Mapping[str, Any], name: str, default: float) -> float:
    value = preprocessor.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"preprocessor_config.json: '{name}' must be a number")
    return float(value)


def _channels(preprocessor: Mapping[str, Any], name: str, default: Sequence[float]) -> list[float]:
    value = preprocessor.get(name)
    if value is None:
        return list(default)
    numbers = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(isinstance(n, int | float) for n in numbers):
        raise CheckpointError(f"preprocessor_config.json: '{name}' must be three numbers")
    return [float(number) for number in numbers]
