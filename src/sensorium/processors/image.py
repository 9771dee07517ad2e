"""Pixels from bytes for every image processor: PIL resizing, cropping, and uint8 to normalised float32.

Torch-free and without state. The results equal transformers' `…ImageProcessorPil` classes: the same bytes out of PIL,
and within 1e-6 after rescaling and normalising, which are one multiplication and one addition here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
BLOCK_BYTES = 1 << 18  # of sums while bytes are resized: what a core's cache holds


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


def mean_color(preprocessor: Mapping[str, Any], mean: Sequence[float] = CLIP_MEAN) -> list[int]:
    """The file's `image_mean`, of bytes."""
    return [int(255 * one) for one in _channels(preprocessor, "image_mean", mean)]


def switch(preprocessor: Mapping[str, Any], name: str, default: bool = True) -> bool:
    """A `do_…` field; absent and null mean the default."""
    value = preprocessor.get(name)
    return default if value is None else bool(value)


def resample_filter(
    preprocessor: Mapping[str, Any], default: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Resampling:
    """The file's `resample` (PIL's number); `default` where it does not say."""
    code = preprocessor.get("resample")
    try:
        return default if code is None else Image.Resampling(code)
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


def resize_bytes(pixels: Pixels, height: int, width: int, resample: Image.Resampling) -> Pixels:
    """As torch resizes bytes, which families do that have no processor on PIL: its bilinear weights have 16 bits, so
    that some bytes are one more or less than PIL's. Other filters are PIL's."""
    if resample is not Image.Resampling.BILINEAR:
        return resize(pixels, height, width, resample)
    stretched = _stretched(_stretched(pixels.transpose(1, 0, 2), width).transpose(1, 0, 2), height)
    return np.ascontiguousarray(stretched)


def _stretched(pixels: Pixels, size: int) -> Pixels:
    """Along the first axis, a block of lines at a time."""
    lines = len(pixels)
    if lines == size:
        return pixels
    pixels = np.ascontiguousarray(pixels)
    first, weights, precision = _bilinear_weights(lines, size)
    out = np.empty((size, *pixels.shape[1:]), np.uint8)
    block = max(BLOCK_BYTES // (4 * pixels[0].size), 1)
    for start in range(0, size, block):
        places = first[start : start + block]
        total = np.full((len(places), *pixels.shape[1:]), 1 << (precision - 1), np.int32)
        for tap, weight in enumerate(weights[:, start : start + block, None, None]):
            total += pixels[np.minimum(places + tap, lines - 1)] * weight
        out[start : start + block] = np.minimum(total >> precision, 255)
    return out


def _bilinear_weights(lines: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """(first line that each of `size` lines sees, weights [taps, size] of it and those after it, bits of a weight)."""
    scale = lines / size
    reach = max(scale, 1.0)
    centers = scale * (np.arange(size) + 0.5)
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    seen = np.minimum((centers + reach + 0.5).astype(np.int64), lines) - first
    taps = np.arange(seen.max())[:, None]
    distances = np.abs((taps + first - centers + 0.5) / reach)
    weights = np.where(taps < seen, np.maximum(1 - distances, 0), 0)
    weights /= weights.sum(0)
    precision = next((bits for bits in range(22) if int(0.5 + weights.max() * (1 << (bits + 1))) >= 1 << 15), 22)
    return first, (weights * (1 << precision) + 0.5).astype(np.int32), precision


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


def patches(
    frames: Iterable[Pixels], grid: tuple[int, int, int], side: int, merge: int, depth: int = 1
) -> NDArray[np.uint8]:
    """[patches, 3 * depth * side * side] in the order of blocks of merge x merge; `depth` frames to a patch, the last
    frame is repeated to fill it. `grid` counts (frame groups, lines, columns).

    In bytes, which the engine normalises: a quarter of the memory while a request waits, and to hand over.
    """
    groups, lines, columns = grid
    shape = (lines // merge, merge, side, columns // merge, merge, side, 3)
    out = np.empty((groups, lines * columns, 3, depth, side * side), np.uint8)
    index = 0
    for index, frame in enumerate(frames):
        # [lines, columns, merge, merge, 3, side, side]
        cut = frame.reshape(shape).transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side * side)
        out[index // depth, :, :, index % depth] = cut
    last = index % depth
    out[-1, :, :, last + 1 :] = out[-1, :, :, last : last + 1]
    return out.reshape(-1, 3 * depth * side * side)


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
