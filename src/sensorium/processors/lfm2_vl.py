"""LFM2-VL: an image keeps its aspect; a large one is cut into tiles, and seen whole as one more, smaller than it was.
Tiles are named in the prompt by their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.processors import image
from sensorium.processors.base import Setting, SettingError, boolean, integer, number
from sensorium.processors.internvl import best_grid
from sensorium.processors.qwen2_vl import smart_resize
from sensorium.processors.shown import NamedProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality

MAX_TILES = 64
MAX_TOKENS = 1 << 14


class Lfm2VLProcessor(NamedProcessor):
    modalities: frozenset[Modality] = frozenset({"image"})
    settings: ClassVar[Mapping[str, Setting]] = {
        "do_image_splitting": boolean,
        "min_tiles": integer(1, MAX_TILES),
        "max_tiles": integer(1, MAX_TILES),
        "use_thumbnail": boolean,
        "min_image_tokens": integer(1, MAX_TOKENS),
        "max_image_tokens": integer(1, MAX_TOKENS),
        "max_pixels_tolerance": number(0.01, 100),
    }
    _soft = "<image>"

    def _configure(self) -> None:
        files = self.checkpoint.preprocessor
        self._patch = positive_int(files, "encoder_patch_size", 16)
        self._merge = positive_int(files, "downsample_factor", 2)
        self._tile = positive_int(files, "tile_size", 512)
        step = self._step = self._patch * self._merge
        if self._tile % step:
            raise CheckpointError(f"preprocessor_config.json: tile_size {self._tile} is no multiple of {step} pixels")
        self._cuts = self._setting("do_image_splitting", True)
        self._fewest, self._most = self._setting("min_tiles", 2), self._setting("max_tiles", 10)
        low, high = self._setting("min_image_tokens", 64), self._setting("max_image_tokens", 256)
        for name, least, most in (("tiles", self._fewest, self._most), ("image_tokens", low, high)):
            if least > most:
                raise SettingError(f"max_{name}", f"is {most}: less than min_{name}, which is {least}")
        self._bounds = low * step**2, high * step**2  # pixels
        self._large = high * step**2 * self._setting("max_pixels_tolerance", 2.0)
        self._has_whole = self._setting("use_thumbnail", True)
        self._resample = image.resample_filter(files, Resampling.BILINEAR)
        self._normalization = image.Normalization.of(files, image.HALF, image.HALF)

    def placeholder(self, kind: Modality, index: int) -> str:
        return self._soft if kind == "image" else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._fill if kind == "image" else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        lines, columns = self._tiles(height, width)
        rows = lines * columns * (self._tile // self._step) ** 2 if lines * columns > 1 else 0
        if not rows or self._has_whole:
            whole = self._whole_size(height, width)
            rows += whole[0] * whole[1] // self._step**2
        return rows + self._text_tokens(self._text(lines, columns))

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        pixels = item.data.astype(np.uint8, copy=False)
        parts = list(self._parts(pixels))
        grids = [(part.shape[0] // self._patch, part.shape[1] // self._patch) for part in parts]
        cut = zip(parts, grids, strict=True)
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": np.concatenate([image.patches([part], (1, *grid), self._patch, 1) for part, grid in cut]),
            "grids": np.array(grids, np.int32),
            "layout": np.array(self._tiles(*pixels.shape[:2]), np.int32),
            "scale": self._normalization.scale.reshape(3),
            "shift": self._normalization.shift.reshape(3),
        }
        return MediaFeatures("image", self._feature_key(item), sum(self._rows(arrays)), arrays)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """(lines, columns) of tiles; (1, 1): the image is not cut."""
        step = self._step
        nearest = [max(round(side / step) * step, self._patch) for side in (height, width)]
        if not self._cuts or nearest[0] * nearest[1] <= self._large:
            return 1, 1
        return best_grid(height, width, self._tile, self._fewest, self._most)

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self._step, *self._bounds, least=self._step)

    def _parts(self, pixels: image.Pixels) -> Iterator[image.Pixels]:
        """Tiles, line by line, and the whole image."""
        height, width = pixels.shape[:2]
        (lines, columns), side = self._tiles(height, width), self._tile
        if lines * columns > 1:
            grid = image.resize_bytes(pixels, lines * side, columns * side, self._resample)
            for line in range(lines):
                for column in range(columns):
                    yield grid[line * side : (line + 1) * side, column * side : (column + 1) * side]
        if lines * columns == 1 or self._has_whole:
            yield image.resize_bytes(pixels, *self._whole_size(height, width), self._resample)

    def _layout(self, media: MediaFeatures) -> tuple[int, int]:
        lines, columns = media.arrays["layout"].tolist()
        return lines, columns

    def _rows(self, arrays: Mapping[str, NDArray[np.generic]]) -> list[int]:
        rows: list[int] = (arrays["grids"].prod(axis=1) // self._merge**2).tolist()
        return rows

    def _counts(self, media: MediaFeatures) -> list[int]:
        return self._rows(media.arrays)

    def _shown(self, media: MediaFeatures) -> str:
        return self._text(*self._layout(media))

    def _text(self, lines: int, columns: int) -> str:
        """With one soft token for the rows of each part."""
        parts = []
        if lines * columns > 1:
            places = [(line, column) for line in range(1, lines + 1) for column in range(1, columns + 1)]
            parts = [f"<|img_row_{line}_col_{column}|>{self._soft}" for line, column in places]
        if not parts or self._has_whole:
            parts.append(f"{'<|img_thumbnail|>' if parts else ''}{self._soft}")
        return f"<|image_start|>{''.join(parts)}<|image_end|>"
