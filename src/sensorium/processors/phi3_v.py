"""Phi-3-vision and Phi-3.5-vision: an image is seen whole and in square tiles, as many as fit ("HD transform").

`<|image_1|>`, `<|image_2|>`, … are no tokens: the text is split on them and every piece is tokenized for itself, BOS
included, as the published processor does it. The number, not the place, says which image stands there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import MediaError, RequestError, UnsupportedModalityError
from sensorium.processors import image
from sensorium.processors.base import Piece, PlaceholderRun, Processor, Setting, integer
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

TILE, PATCH = 336, 14  # of the CLIP-L tower that the published code builds whatever config.json says
WHITE = 255
MAX_CROPS = 64

_MARKER = re.compile(r"<\|image_([0-9]{1,4})\|>")
_HALF_WAY = (-0.09375, 0.59375, 0.59375, -0.09375)  # cubic convolution, a = -0.75, between the two middle pixels


@dataclass(frozen=True, slots=True)
class Tiling:
    """What becomes of an image. The sizes are those of the image lying down, if it is `upright`."""

    upright: bool  # higher than wide: it is turned for resizing and padding, and then turned back
    height: int  # pixels after resizing
    width: int
    high: int  # tiles after padding
    wide: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles of the image as it stands."""
        return (self.wide, self.high) if self.upright else (self.high, self.wide)

    def num_rows(self, side: int) -> int:
        """Embedding rows with `side` x `side` of them to a tile: tiles, whole image, separators."""
        lines = self.grid[0] + 1
        return (self.high * self.wide + 1) * side * side + 1 + lines * side


def tiling(height: int, width: int, num_crops: int, tile: int) -> Tiling:
    """As many tiles in the longer direction as `num_crops` allows with the aspect kept."""
    longer, shorter = max(height, width), min(height, width)
    ratio = longer / shorter
    wide = 1
    while (wide + 1) * math.ceil((wide + 1) / ratio) <= num_crops:
        wide += 1
    resized = int(wide * tile / ratio)
    return Tiling(width < height, resized, wide * tile, -(-resized // tile), wide)


def thumbnail(planes: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """[3, height, width], multiples of `side`, -> [3, side, side]: bicubic without antialiasing, as torch's
    `interpolate` has it. With whole steps every pixel lies on an old one or half-way between two."""
    return _thinned(_thinned(planes, 1, side), 2, side)


def _thinned(planes: NDArray[np.float32], axis: int, side: int) -> NDArray[np.float32]:
    length = planes.shape[axis]
    step = length // side
    middle = np.arange(side) * step + step // 2
    taken: NDArray[np.float32] = np.take(planes, middle, axis)
    if step % 2:
        return taken
    out = np.zeros_like(taken)
    for place, weight in enumerate(_HALF_WAY, start=-2):
        out += np.take(planes, np.clip(middle + place, 0, length - 1), axis) * np.float32(weight)
    return out


class Phi3VProcessor(Processor):
    modalities: frozenset[Modality] = frozenset({"image"})
    settings: ClassVar[Mapping[str, Setting]] = {"num_crops": integer(1, MAX_CROPS)}
    literals: ClassVar[tuple[str, ...]] = ("<|image_",)

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        self._fill = tokenizer.token_to_id("<|image|>") or 0

    def _configure(self) -> None:
        vision = (self.checkpoint.config.get("img_processor") or {}).get("vision_config") or {}
        self._tile: int = vision.get("image_size", TILE)
        self._side: int = self._tile // vision.get("patch_size", PATCH) // 2  # rows of a tile, along each edge
        self._num_crops: int = self._setting("num_crops", 1)
        self._normalization = image.Normalization.of(self.checkpoint.preprocessor)

    def placeholder(self, kind: Modality, index: int) -> str:
        return f"<|image_{index + 1}|>" if kind == "image" else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._fill if kind == "image" else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        return self._tiling(height, width).num_rows(self._side)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "image":
            return super().process(item)
        plan = self._tiling(item.data.shape[0], item.data.shape[1], item.param)
        planes = image.planes(self._canvas(item.data.astype(np.uint8, copy=False), plan), self._normalization)
        (high, wide), tile = plan.grid, self._tile
        tiles = np.empty((1 + high * wide, 3, tile, tile), np.float32)
        tiles[0] = thumbnail(planes, tile)
        cut = planes.reshape(3, high, tile, wide, tile).transpose(1, 3, 0, 2, 4)
        tiles[1:].reshape(high, wide, 3, tile, tile)[...] = cut
        arrays: dict[str, NDArray[np.generic]] = {"pixels": tiles, "grid": np.array([high, wide], np.int32)}
        return MediaFeatures("image", self._feature_key(item), plan.num_rows(self._side), arrays)

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        pieces = _MARKER.split(text)  # texts and, at odd places, numbers
        numbers = [int(number) for number in pieces[1::2]]
        self._check_numbers(numbers, media)
        return self._assemble(self._pieces(pieces[::2], numbers, media, add_special_tokens), media)

    def text_length(self, text: str) -> int:
        return sum(len(self.tokenizer.encode(piece)) for piece in _MARKER.split(text)[::2])

    def _pieces(
        self, texts: Sequence[str], numbers: Sequence[int], media: Sequence[MediaFeatures], add_special_tokens: bool
    ) -> Iterator[Piece]:
        for index, text in enumerate(texts):
            if index:
                item = numbers[index - 1] - 1
                yield PlaceholderRun(item, self._fill, media[item].num_rows)
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens or index > 0)
            yield np.array(ids, np.int32)

    def _check_numbers(self, numbers: Sequence[int], media: Sequence[MediaFeatures]) -> None:
        """Every image has its number, every number its image; in any order, and more than once if the prompt
        wants it."""
        for one in media:
            if one.kind != "image":
                raise UnsupportedModalityError(one.kind, param=None)
        if set(numbers) != set(range(1, len(media) + 1)):
            named = ", ".join(str(number) for number in sorted(set(numbers))[:16]) or "none"
            raise RequestError(
                f"The prompt has placeholders for the images {named}, but the request brings "
                f"{len(media)} image(s), which are 1 to {len(media)}.",
                code="media_count_mismatch",
            )

    def _tiling(self, height: int, width: int, param: str = "") -> Tiling:
        plan = tiling(height, width, self._num_crops, self._tile)
        if not plan.height:
            raise MediaError(
                f"An image of {width}x{height} pixels is too narrow for this model.",
                param=param or None,
                code="image_too_small",
            )
        return plan

    def _canvas(self, pixels: NDArray[np.uint8], plan: Tiling) -> NDArray[np.uint8]:
        """Resized to fill the tiles in one direction, centred between white bars in the other."""
        if plan.upright:  # not the same as resizing it upright: PIL rounds between its two passes
            pixels = np.ascontiguousarray(pixels.transpose(1, 0, 2))
        canvas = np.full((plan.high * self._tile, plan.width, 3), WHITE, np.uint8)
        top = (canvas.shape[0] - plan.height) // 2
        canvas[top : top + plan.height] = image.resize(pixels, plan.height, plan.width, Resampling.BILINEAR)
        return canvas.transpose(1, 0, 2) if plan.upright else canvas
