"""Gemma 3: an image is one square whatever its aspect; with pan and scan, crops along its longer side follow it.

The text around an image's rows belongs to the family and is tokenized together with the prompt: its line breaks may
join those beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.families import vision_tower
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError, StartupError
from sensorium.processors import image
from sensorium.processors.base import ImageProcessor, Setting, boolean, integer, number
from sensorium.processors.shown import ShownProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

BILINEAR = 2  # PIL's number
MAX_CROPS = 16
IDS = {"boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144}


class Gemma3Processor(ShownProcessor, ImageProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {
        "do_pan_and_scan": boolean,
        "pan_and_scan_min_crop_size": integer(1, 65536),
        "pan_and_scan_max_num_crops": integer(1, MAX_CROPS),
        "pan_and_scan_min_ratio_to_activate": number(0, 1000),
    }

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        begin, end, fill = (self._token(name) for name in IDS)
        self._text, self._marker = begin
        self._soft, self._fill = fill
        self._around = f"\n\n{self._text}{self._soft}{end[0]}\n\n"

    def _token(self, name: str) -> tuple[str, int]:
        """(text, id) of a token that config.json names by its id."""
        config = self.checkpoint.config
        key = name.replace("_index", "_id") if name not in config else name
        token_id = positive_int(config, key, IDS[name])
        text = self.tokenizer.id_to_token(token_id)
        if text is None:
            raise StartupError(f"The tokenizer has no token {token_id}, which config.json calls {key}.")
        return text, token_id

    def _configure(self) -> None:
        config, files = self.checkpoint.config, {"resample": BILINEAR, **_given(self.checkpoint.preprocessor)}
        vision = {"model_type": "siglip_vision_model", **(config.get("vision_config") or {})}
        side = positive_int(vision, "image_size", 224)
        patches = side // positive_int(vision, "patch_size", vision_tower(vision).patch_size)
        self._rows = rows_of(patches, positive_int(config, "mm_tokens_per_image", 256)) ** 2
        self._side = side
        self._resample = image.resample_filter(files)
        self._normalization = image.Normalization.of(files, image.HALF, image.HALF)
        size = image.size_of(files.get("size") or side, "size")
        if not image.switch(files, "do_resize") or size not in (side, (side, side)):
            raise CheckpointError(
                f"preprocessor_config.json must resize images to {(side, side)}, for which the vision tower is built"
            )
        self._crops: bool = self._setting("do_pan_and_scan", False)
        self._least: int = self._setting("pan_and_scan_min_crop_size", 256)
        self._most: int = self._setting("pan_and_scan_max_num_crops", 4)
        self._ratio: float = self._setting("pan_and_scan_min_ratio_to_activate", 1.2)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        return self._rows * (1 + math.prod(self._cut(height, width)) * self._crops)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        whole = item.data.astype(np.uint8, copy=False)
        squares = [image.resize(one, self._side, self._side, self._resample) for one in self._squares(whole)]
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": np.stack([image.planes(square, self._normalization) for square in squares])
        }  # [squares, 3, side, side], the whole image first
        return MediaFeatures("image", self._feature_key(item), len(squares) * self._rows, arrays)

    def _squares(self, pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        yield pixels
        height, width = pixels.shape[:2]
        lines, columns = self._cut(height, width)
        if not self._crops or not lines:
            return
        high, wide = math.ceil(height / lines), math.ceil(width / columns)
        for index in range(lines * columns):
            top, left = index % lines * high, index % columns * wide  # one of the two is always 0
            yield pixels[top : top + high, left : left + wide]

    def _cut(self, height: int, width: int) -> tuple[int, int]:
        """(lines, columns) of crops, one of them 1; (0, 0) if the image is only seen whole."""
        longer, shorter = max(height, width), min(height, width)
        if longer / shorter < self._ratio:
            return 0, 0
        count = min(longer // self._least, math.floor(longer / shorter + 0.5))
        count = min(self._most, max(2, count))
        if min(math.ceil(longer / count), shorter) < self._least:
            return 0, 0
        return (1, count) if width >= height else (count, 1)

    def _shown(self, media: MediaFeatures) -> str:
        crops = media.num_rows // self._rows - 1
        if not crops:
            return self._around
        more = " ".join([self._around] * crops)
        return f"Here is the original image {self._around} and here are some crops to help you see better {more}"

    def _counts(self, media: MediaFeatures) -> list[int]:
        return [self._rows] * (media.num_rows // self._rows)


def rows_of(patches: int, tokens: int) -> int:
    """Rows along each edge that are left of `patches` when an image is averaged to `tokens` rows."""
    side = math.isqrt(tokens)
    if not 0 < side <= patches or patches // (patches // side) != side:
        raise CheckpointError(
            f"config.json: {patches} x {patches} patches of an image cannot be averaged to mm_tokens_per_image {tokens}"
        )
    return side


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without nulls, which mean the default."""
    return {name: value for name, value in values.items() if value is not None}
