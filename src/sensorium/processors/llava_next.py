"""LLaVA-NeXT (v1.6): an image is seen whole and as tiles of the resolution that fits it best ("anyres").

The tower gets square tiles, the whole image first, and `layout`, which says how their rows are packed: tiles form a
grid, the rows and columns that only saw padding are cut off, and a newline row ends every line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError, MediaError
from sensorium.processors import image
from sensorium.processors.base import ImageProcessor, Setting
from sensorium.processors.llava import ClipGeometry, image_token
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # transformers' default


@dataclass(frozen=True, slots=True)
class Tiling:
    """Where the tiles of one image come from and which of their patches are kept. Lengths in patches."""

    grid_h: int  # tiles
    grid_w: int
    top: int  # first line that is kept of the assembled grid
    lines: int
    left: int
    columns: int
    kept_lines: int | None = None  # of the grid once it is made smaller; None: it is not
    kept_columns: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Lines and columns of rows."""
        if self.kept_lines is None or self.kept_columns is None:
            return self.lines, self.columns
        return self.kept_lines, self.kept_columns

    def num_rows(self, side: int) -> int:
        lines, columns = self.size
        return side * side + lines * (columns + 1)


def pinpoints(value: Any) -> list[tuple[int, int]]:
    """Setting: the resolutions, [[height, width], …], that an image may be cut from."""
    if not isinstance(value, Sequence) or not 0 < len(value) <= 64:
        raise ValueError("must be a list of 1 to 64 [height, width] pairs")
    for pair in value:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(n) is int and 0 < n <= 8192 for n in pair):
            raise ValueError("must hold [height, width] pairs of integers from 1 to 8192")
    return [(pair[0], pair[1]) for pair in value]


def best_resolution(height: int, width: int, choices: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The choice that keeps most of the image's pixels, then wastes least; the first of equals."""
    best, best_score = None, (0, -math.inf)
    for target_h, target_w in choices:
        scale = min(target_w / width, target_h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        score = (kept, kept - target_h * target_w)
        if score > best_score and kept > 0:
            best, best_score = (target_h, target_w), score
    return best


def fitted_size(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The size of the image once it fills one axis of `target` with its aspect kept."""
    scale_h, scale_w = target[0] / height, target[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), target[0]), target[1]
    return target[0], min(math.ceil(width * scale_h), target[1])


class LlavaNextProcessor(ImageProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {"image_grid_pinpoints": pinpoints}

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        self._fill = image_token(checkpoint.config)
        self._text, self._marker = self._find_marker("<image>", self._fill)

    def _configure(self) -> None:
        files = self.checkpoint.preprocessor
        self.geometry = ClipGeometry.of(self.checkpoint.config)
        side = self.geometry.image_size
        self._normalization = image.Normalization.of(files)
        self._resample = image.resample_filter(files)
        default = self.checkpoint.config.get("image_grid_pinpoints") or PINPOINTS
        self._pinpoints = self._setting("image_grid_pinpoints", default)
        for name in ("size", "crop_size"):
            if image.size_of(files.get(name) or side, name) not in (side, (side, side)):
                raise CheckpointError(f"preprocessor_config.json: '{name}' must be the vision tower's {side} pixels")
        if any(height % side or width % side for height, width in self._pinpoints):
            raise CheckpointError(f"image_grid_pinpoints must be multiples of the vision tower's {side} pixels")

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        return self._tiling(height, width).num_rows(self.geometry.side)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        pixels = item.data.astype(np.uint8, copy=False)
        height, width = pixels.shape[:2]
        tiling = self._tiling(height, width, item.param)
        layout = [tiling.grid_h, tiling.grid_w, tiling.top, tiling.lines, tiling.left, tiling.columns, *tiling.size]
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": self._tiles(pixels, tiling),  # [tiles, 3, side, side]
            "layout": np.array(layout, np.int32),
        }
        return MediaFeatures("image", self._feature_key(item), tiling.num_rows(self.geometry.side), arrays)

    def _tiling(self, height: int, width: int, param: str = "") -> Tiling:
        best = best_resolution(height, width, self._pinpoints)
        if best is None:
            raise MediaError(
                f"An image of {width}x{height} pixels is too narrow for this model.",
                param=param or None,
                code="image_too_small",
            )
        side = self.geometry.side
        grid_h, grid_w = best[0] // self.geometry.image_size, best[1] // self.geometry.image_size
        full_h, full_w = grid_h * side, grid_w * side
        top = left = 0
        if width / height > full_w / full_h:
            # Rounded before it is cut, as in the reference, so that 24 / 24.000000001 is 1.
            top = (full_h - int(round(height * (full_w / width), 7))) // 2
        else:
            left = (full_w - int(round(width * (full_h / height), 7))) // 2
        return Tiling(grid_h, grid_w, top, full_h - 2 * top, left, full_w - 2 * left)

    def _tiles(self, pixels: NDArray[np.uint8], tiling: Tiling) -> NDArray[np.float32]:
        side = self.geometry.image_size
        target = (tiling.grid_h * side, tiling.grid_w * side)
        height, width = fitted_size(pixels.shape[0], pixels.shape[1], target)
        canvas = np.zeros((*target, 3), np.uint8)
        top, left = (target[0] - height) // 2, (target[1] - width) // 2
        canvas[top : top + height, left : left + width] = image.resize(pixels, height, width, self._resample)
        tiles = np.empty((1 + tiling.grid_h * tiling.grid_w, 3, side, side), np.float32)
        tiles[0] = image.planes(image.resize(pixels, side, side, self._resample), self._normalization)
        for row in range(tiling.grid_h):
            for column in range(tiling.grid_w):
                cell = canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]
                tiles[1 + row * tiling.grid_w + column] = image.planes(cell, self._normalization)
        return tiles
