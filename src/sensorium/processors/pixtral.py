"""Mistral Small 3.1 and Pixtral 12B: an image keeps its aspect, and every line of it ends with a token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError, StartupError
from sensorium.processors import image
from sensorium.processors.base import ImageProcessor, Piece, PlaceholderRun, Setting, integer
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

MAX_EDGE = 1 << 14


class Mistral3Processor(ImageProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {"longest_edge": integer(1, MAX_EDGE)}
    # Of config.json without `spatial_merge_size`; None: that key does not count.
    default_merge: ClassVar[int | None] = 2

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        config = checkpoint.config
        self._fill = config.get("image_token_index", config.get("image_token_id", 10))
        self._text, self._marker = self._find_marker("[IMG]", self._fill)
        self._break, self._end = (self._token(text) for text in ("[IMG_BREAK]", "[IMG_END]"))

    def _token(self, text: str) -> NDArray[np.int32]:
        token_id = self.tokenizer.token_to_id(text)
        if token_id is None:
            raise StartupError(f"The tokenizer has no token {text}, which stands behind the lines of an image.")
        return np.array([token_id], np.int32)

    def _configure(self) -> None:
        config, files = self.checkpoint.config, self.checkpoint.preprocessor
        vision = config.get("vision_config") or {}
        self._patch = positive_int(vision, "patch_size", 16)
        merge = self.default_merge
        self._merge = 1 if merge is None else positive_int(config, "spatial_merge_size", merge)
        self._normalization = image.Normalization.of(files)
        self._resample = image.resample_filter(files)
        size = files.get("size")
        stated = size.get("longest_edge") if isinstance(size, Mapping) else size
        if "longest_edge" in self.overrides:
            self._edge = self.overrides["longest_edge"]
        elif stated is None:
            self._edge = positive_int(vision, "image_size", 1024)
        else:
            self._edge = positive_int({"longest_edge": stated}, "longest_edge", 1024)
        if not image.switch(files, "do_resize"):
            raise CheckpointError("preprocessor_config.json: 'do_resize' must be true: sides must be whole patches")

    def _cells(self, height: int, width: int) -> tuple[int, int]:
        """Lines and columns of rows. What is larger than the longest edge is made smaller first, in whole pixels."""
        ratio = max(height, width) / self._edge
        if ratio > 1:
            height, width = max(math.floor(height / ratio), 1), max(math.floor(width / ratio), 1)
        cell = self._patch * self._merge
        return math.ceil(height / cell), math.ceil(width / cell)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        lines, columns = self._cells(height, width)
        return lines * (columns + 1)

    def prompt_tokens(self, features: MediaFeatures) -> int:
        return features.num_rows + self._lines(features)

    def _lines(self, features: MediaFeatures) -> int:
        return int(features.arrays["grid"][1]) // self._merge

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        lines, columns = self._cells(*item.data.shape[:2])
        grid = (1, lines * self._merge, columns * self._merge)
        pixels = item.data.astype(np.uint8, copy=False)
        resized = image.resize(pixels, grid[1] * self._patch, grid[2] * self._patch, self._resample)
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": image.patches([resized], grid, self._patch, self._merge),
            "grid": np.array(grid, np.int32),
            "scale": self._normalization.scale.reshape(3),
            "shift": self._normalization.shift.reshape(3),
        }
        return MediaFeatures("image", self._feature_key(item), lines * columns, arrays)

    def _expanded(self, token_ids: NDArray[np.int32], media: Sequence[MediaFeatures]) -> Iterator[Piece]:
        start = 0
        for item, (place, _) in enumerate(self._marked(token_ids)):
            yield token_ids[start:place]
            lines, rows = self._lines(media[item]), media[item].num_rows
            for line in range(lines):
                yield PlaceholderRun(item, self._fill, rows // lines, line * rows // lines)
                yield self._break if line + 1 < lines else self._end
            start = place + 1
        yield token_ids[start:]


class PixtralProcessor(Mistral3Processor):
    default_merge = None
