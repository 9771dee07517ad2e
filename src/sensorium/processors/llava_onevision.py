"""LLaVA-OneVision: LLaVA-NeXT's tiles, made fewer rows where there are many; a square for each of several images, and
for each frame of a video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import unsupported
from sensorium.media.sampling import VideoSampling
from sensorium.processors import image
from sensorium.processors.base import Setting, boolean, integer, number
from sensorium.processors.llava_next import LlavaNextProcessor, Tiling
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

NUM_FRAMES = 32  # of the models' evaluation; their files name none
PREFIX = "anyres_max_"
SQUARE = Tiling(0, 0, 0, 1, 0, 0)  # the whole image alone, and the row that ends a line


class LlavaOnevisionProcessor(LlavaNextProcessor):
    modalities: frozenset[Modality] = frozenset({"image", "video"})
    settings: ClassVar[Mapping[str, Setting]] = {
        **LlavaNextProcessor.settings,
        "tiles": boolean,
        "num_frames": integer(1, 512),
        "fps": number(0.01, 1000),
    }

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        config = checkpoint.config
        self._video_fill: int = config.get("video_token_index", config.get("video_token_id", 151647))
        self._video_text, self._video_marker = self._find_marker("<video>", self._video_fill)

    def _configure(self) -> None:
        super()._configure()
        stated = str(self.checkpoint.config.get("vision_aspect_ratio") or f"{PREFIX}9")
        most = stated.removeprefix(PREFIX)
        if not stated.startswith(PREFIX) or not most.isdecimal() or not int(most):
            raise unsupported("vision_aspect_ratio", stated, (f"{PREFIX}9",))
        self._most = int(most)
        files = self.checkpoint.video_preprocessor
        self._video_normalization = image.Normalization.of(files or self.checkpoint.preprocessor)
        asked = self.overrides.keys() & {"fps", "num_frames"} == {"fps"}
        self._sampling = VideoSampling(
            fps=self.overrides.get("fps"),
            num_frames=None if asked else self._value(files, "num_frames", NUM_FRAMES),
            placement="floors",
        )

    def implied(self, kinds: Sequence[Modality]) -> dict[str, Any]:
        """Of several images none is cut into tiles."""
        return {"tiles": False} if kinds.count("image") > 1 and "tiles" not in self.overrides else {}

    def video_sampling(self) -> VideoSampling:
        return self._sampling

    def placeholder(self, kind: Modality, index: int) -> str:
        return self._video_text if kind == "video" else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._video_fill if kind == "video" else super().placeholder_id(kind)

    def _marker_id(self, kind: Modality) -> int:
        return self._video_marker if kind == "video" else super()._marker_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """A video ends with one row that is of no frame."""
        if kind == "video":
            return frames * math.ceil(self.geometry.side / 2) ** 2 + 1
        return super().num_tokens(kind, height, width, frames)

    def _tiling(self, height: int, width: int, param: str = "") -> Tiling:
        """With fewer rows where the grid has more than so many times those of a square."""
        if not self.overrides.get("tiles", True):
            return SQUARE
        tiling = super()._tiling(height, width, param)
        shrink = math.sqrt(tiling.lines * tiling.columns / (self._most * self.geometry.side**2))
        if shrink <= 1.1:
            return tiling
        return replace(tiling, kept_lines=int(tiling.lines // shrink), kept_columns=int(tiling.columns // shrink))

    def _tiles(self, pixels: image.Pixels, tiling: Tiling) -> NDArray[np.float32]:
        """What is not cut is made a square by borders of the mean colour."""
        if tiling is not SQUARE:
            return super()._tiles(pixels, tiling)
        height, width = pixels.shape[:2]
        longest, side = max(height, width), self.geometry.image_size
        canvas = np.empty((longest, longest, 3), np.uint8)
        canvas[:] = image.mean_color(self.checkpoint.preprocessor)
        top, left = (longest - height) // 2, (longest - width) // 2
        canvas[top : top + height, left : left + width] = pixels
        return image.planes(image.resize(canvas, side, side, self._resample), self._normalization)[None]

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "video":
            return super().process(item)
        side = self.geometry.image_size
        frames = item.data.astype(np.uint8, copy=False)
        squares = (image.resize(frame, side, side, self._resample) for frame in frames)
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": np.stack([image.planes(square, self._video_normalization) for square in squares])
        }
        return MediaFeatures("video", self._feature_key(item), self.num_tokens("video", 1, 1, len(frames)), arrays)
