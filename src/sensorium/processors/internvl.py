"""InternVL: an image is cut into squares of the tower's size, in the grid whose aspect is nearest to its own, and seen
whole as one more. A video's frames are one square each, numbered in the prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.values import inverse, square
from sensorium.media.sampling import VideoSampling
from sensorium.processors import image
from sensorium.processors.base import Setting, boolean, integer
from sensorium.processors.shown import NamedProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality

MAX_TILES = 64
NUM_FRAMES = 8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def best_grid(height: int, width: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(lines, columns) of squares. Of grids that are as near, a later one counts only if the image has more than half
    as many pixels as its squares. Source: InternVL's `dynamic_preprocess`."""
    grids = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if fewest <= w * h <= most]
    best, nearest = (1, 1), math.inf
    for columns, lines in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / lines)
        is_large = height * width > 0.5 * side * side * columns * lines
        if distance < nearest or (distance == nearest and is_large):
            best, nearest = (lines, columns), distance
    return best


class InternVLProcessor(NamedProcessor):
    modalities: frozenset[Modality] = frozenset({"image", "video"})
    literals: ClassVar[tuple[str, ...]] = ("<video>",)
    settings: ClassVar[Mapping[str, Setting]] = {
        "crop_to_patches": boolean,
        "min_patches": integer(1, MAX_TILES),
        "max_patches": integer(1, MAX_TILES),
        "dynamic_image_size": boolean,  # what the published repositories call these three
        "min_dynamic_patch": integer(1, MAX_TILES),
        "max_dynamic_patch": integer(1, MAX_TILES),
        "use_thumbnail": boolean,
        "num_frames": integer(1, 512),
    }
    marks: ClassVar[Mapping[Modality, str]] = {"image": "<IMG_CONTEXT>", "video": "<video>"}
    _soft = "<IMG_CONTEXT>"

    def _configure(self) -> None:
        config, files = self.checkpoint.config, self.checkpoint.preprocessor
        vision = config.get("vision_config") or {}
        self._side = square(vision, "image_size", 448)
        patches = self._side // square(vision, "patch_size", 14)
        self._rows = (patches // inverse(config, "downsample_ratio", 0.5)) ** 2
        self._normalization = image.Normalization.of(files, IMAGENET_MEAN, IMAGENET_STD)
        self._resample = image.resample_filter(files)
        self._cuts = self._either("crop_to_patches", "dynamic_image_size", True)
        self._fewest = self._either("min_patches", "min_dynamic_patch", 1)
        self._most = max(self._either("max_patches", "max_dynamic_patch", 12), self._fewest)
        self._has_whole = self._either("use_thumbnail", "use_thumbnail", True)
        self._frames = self._value(self.checkpoint.video_preprocessor, "num_frames", NUM_FRAMES)

    def _either(self, name: str, published: str, default: Any) -> Any:
        """A setting by transformers' name or, in a request and in config.json, by the published one."""
        if name not in self.overrides and published in self.overrides:
            return self.overrides[published]
        stated = self.checkpoint.config.get(published)
        return self._setting(name, default if stated is None else stated)

    def video_sampling(self) -> VideoSampling:
        return VideoSampling(num_frames=self._frames, placement="centers")

    def placeholder(self, kind: Modality, index: int) -> str:
        return self.marks[kind] if kind in self.marks else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._fill if kind in self.marks else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind == "video":
            return frames * self._rows + self._text_tokens(self._numbered(frames))
        if kind != "image":
            return super().num_tokens(kind, height, width, frames)
        return len(list(self._squares_of(height, width))) * self._rows + 2

    def _squares_of(self, height: int, width: int) -> Iterator[tuple[int, int] | None]:
        """Place in the grid of each square, and None of the whole image."""
        lines, columns = best_grid(height, width, self._side, self._fewest, self._most) if self._cuts else (1, 1)
        if lines * columns > 1:
            yield from ((line, column) for line in range(lines) for column in range(columns))
        if lines * columns == 1 or self._has_whole:
            yield None

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind not in self.marks:
            return super().process(item)
        pixels = item.data.astype(np.uint8, copy=False)
        squares = [self._whole(frame) for frame in pixels] if item.kind == "video" else list(self._squares(pixels))
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": np.stack([image.planes(square, self._normalization) for square in squares])
        }  # [squares, 3, side, side]
        return MediaFeatures(item.kind, self._feature_key(item), len(squares) * self._rows, arrays)

    def _whole(self, pixels: image.Pixels) -> image.Pixels:
        return image.resize(pixels, self._side, self._side, self._resample)

    def _squares(self, pixels: image.Pixels) -> Iterator[image.Pixels]:
        places, side = list(self._squares_of(*pixels.shape[:2])), self._side
        cut = [place for place in places if place is not None]
        if cut:
            lines, columns = cut[-1][0] + 1, cut[-1][1] + 1
            grid = image.resize(pixels, lines * side, columns * side, self._resample)
            for line, column in cut:
                yield grid[line * side : (line + 1) * side, column * side : (column + 1) * side]
        if None in places:
            yield self._whole(pixels)

    def _shown(self, media: MediaFeatures) -> str:
        return f"<img>{self._soft}</img>" if media.kind == "image" else self._numbered(media.num_rows // self._rows)

    def _numbered(self, frames: int) -> str:
        return "\n".join(f"Frame{index + 1}: <img>{self._soft}</img>" for index in range(frames))

    def _counts(self, media: MediaFeatures) -> list[int]:
        if media.kind == "image":
            return [media.num_rows]
        return [self._rows] * (media.num_rows // self._rows)
