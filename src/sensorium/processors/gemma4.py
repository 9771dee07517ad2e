"""Gemma 4: an image keeps its aspect and is scaled, up or down, to as many fields of patches as its budget holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError, MediaError, StartupError
from sensorium.processors import image
from sensorium.processors.base import ImageProcessor, Piece, PlaceholderRun, Setting
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

BUDGETS = (70, 140, 280, 560, 1120)
IDS = {"boi_token_id": 255_999, "image_token_id": 258_880, "eoi_token_id": 258_882}


def budget(value: Any) -> int:
    """`max_soft_tokens`: rows of an image, at most."""
    if isinstance(value, bool) or value not in BUDGETS:
        raise ValueError(f"must be one of {', '.join(map(str, BUDGETS))}")
    return int(value)


class Gemma4Processor(ImageProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {"max_soft_tokens": budget}

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        ids = {name: positive_int(checkpoint.config, name, default) for name, default in IDS.items()}
        missing = [name for name, token_id in ids.items() if tokenizer.id_to_token(token_id) is None]
        if missing:
            raise StartupError(f"The tokenizer lacks tokens that config.json names: {', '.join(missing)}.")
        self._begin, self._fill, self._end = ids.values()
        self._marker = self._fill
        self._text = str(tokenizer.id_to_token(self._fill))

    def _configure(self) -> None:
        given = {name: value for name, value in self.checkpoint.preprocessor.items() if value is not None}
        files = {"do_normalize": False, **given}
        vision = self.checkpoint.config.get("vision_config") or {}
        self._patch = positive_int(vision, "patch_size", 16)
        self._kernel = positive_int(vision, "pooling_kernel_size", 3)
        if (files.get("patch_size", self._patch), files.get("pooling_kernel_size", self._kernel)) != (
            self._patch,
            self._kernel,
        ):
            raise CheckpointError("preprocessor_config.json: patch_size or pooling_kernel_size is not config.json's")
        if not image.switch(files, "do_resize"):
            raise CheckpointError("preprocessor_config.json: do_resize false is not supported")
        self._most: int = self._setting("max_soft_tokens", 280)
        self._resample = image.resample_filter(files)
        self._normalization = image.Normalization.of(files, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        lines, columns = self._fields(height, width)
        return lines * columns

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        lines, columns = self._fields(*item.data.shape[:2])
        step, patch = self._kernel * self._patch, self._patch
        pixels = image.resize(item.data.astype(np.uint8, copy=False), lines * step, columns * step, self._resample)
        planes = image.planes(pixels, self._normalization)  # [3, height, width]
        grid = lines * self._kernel, columns * self._kernel
        cut = planes.reshape(3, grid[0], patch, grid[1], patch).transpose(1, 3, 2, 4, 0)
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": cut.reshape(grid[0] * grid[1], -1),  # [patches, side * side * 3]
            "grid": np.array(grid, np.int32),
        }
        return MediaFeatures("image", self._feature_key(item), lines * columns, arrays)

    def _fields(self, height: int, width: int) -> tuple[int, int]:
        """Lines and columns of rows, after the image was scaled to its budget."""
        step = self._kernel * self._patch
        factor = math.sqrt(self._most * self._kernel**2 * self._patch**2 / (height * width))
        lines, columns = math.floor(factor * height / step), math.floor(factor * width / step)
        if not lines and not columns:
            raise MediaError(f"An image of {width} x {height} pixels cannot be scaled to {self._most} rows.")
        if not lines:
            return 1, min(width // height, self._most)
        if not columns:
            return min(height // width, self._most), 1
        return lines, columns

    def _expanded(self, token_ids: NDArray[np.int32], media: Sequence[MediaFeatures]) -> Iterator[Piece]:
        """With a token before each image and one behind it."""
        for piece in super()._expanded(token_ids, media):
            if not isinstance(piece, PlaceholderRun):
                yield piece
                continue
            yield np.array([self._begin], np.int32)
            yield piece
            yield np.array([self._end], np.int32)
