"""GLM-4.1V, GLM-4.5V and GLM-OCR: Qwen2-VL's images within other bounds, whose frame counts twice. A video's pairs of
frames stand in the prompt as images do, each before the second of its first frame.

Source: transformers' Glm4vProcessor and Glm46VProcessor, of which the checkpoint's files name one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.media.sampling import VideoSampling
from sensorium.processors.base import Setting
from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.processors.qwen3_vl import clip_bounds, clip_resize
from sensorium.processors.shown import ShownProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality

CLIP_MIN_PIXELS, CLIP_MAX_PIXELS = 112 * 112, 28 * 28 * 2 * 30_000  # of all frames, where the checkpoint has no file
FPS, MAX_FRAMES = 2.0, 600  # of Glm4vProcessor: two a second, in the first five minutes
MAX_PACED_FRAMES = 640  # of Glm46VProcessor
RATE = 24.0  # frames a second of a clip that brings no times


class Glm4VProcessor(ShownProcessor, Qwen2VLProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {
        name: Qwen2VLProcessor.settings[name] for name in ("min_pixels", "max_pixels", "fps", "num_frames")
    }
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {
        "image": ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"),
        "video": ("<|begin_of_video|>", "<|video|>", "<|end_of_video|>"),
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 151343, "video": 151344}
    pixel_bounds: ClassVar[tuple[int, int]] = (112 * 112, 28 * 28 * 15000)  # of both frames

    def _configure(self) -> None:
        files: Sequence[Mapping[str, Any]] = (self.checkpoint.preprocessor, self.checkpoint.video_preprocessor)
        named = [str(one.get(key)) for one in files for key in ("processor_class", "video_processor_type")]
        self._is_46 = any(name.startswith("Glm46V") for name in named)
        super()._configure()

    def placeholder_id(self, kind: Modality) -> int:
        """Frames have the rows of images."""
        return super().placeholder_id("image" if kind == "video" else kind)

    def _mark(self, kind: Modality) -> str:
        return self._markers[kind][0]

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """Of a video with times below ten seconds; each later one may take a token more."""
        rows = super().num_tokens(kind, height, width, frames)
        groups = -(-frames // self._frames)
        return rows + self._text_tokens(self._timed([0.0] * groups)) if kind == "video" else rows

    def process(self, item: MediaItem) -> MediaFeatures:
        features = super().process(item)
        if item.kind != "video":
            return features
        times = np.array(item.timestamps_s or [i / RATE for i in range(len(item.data))], np.float64)
        arrays: dict[str, NDArray[np.generic]] = {**features.arrays, "seconds": times[:: self._frames]}
        return replace(features, arrays=arrays)

    def _counts(self, media: MediaFeatures) -> list[int]:
        groups = int(media.arrays["grid"][0])
        return [media.num_rows // groups] * groups

    def _shown(self, media: MediaFeatures) -> str:
        return self._mark("image") if media.kind == "image" else self._timed(media.arrays["seconds"].tolist())

    def _timed(self, seconds: Sequence[float]) -> str:
        begin, _, end = self.marks["image"]
        times = (f"{time:.1f} seconds" if self._is_46 else f"{int(time)}" for time in seconds)
        return "".join(f"{begin}{self._mark('image')}{end}{time}" for time in times)

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        return self._resized(self._frames, height, width, (self._min_pixels, self._max_pixels))

    def _frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """The clip's last frame fills a pair."""
        return self._resized(frames + frames % self._frames, height, width, self._video_bounds)

    def _resized(self, frames: int, height: int, width: int, bounds: tuple[int, int]) -> tuple[int, int]:
        group = self._frames
        return clip_resize(frames, height, width, group=group, factor=self._factor, low=bounds[0], high=bounds[1])

    def _video_pixel_bounds(self) -> tuple[int, int]:
        return clip_bounds(self.checkpoint, CLIP_MIN_PIXELS, CLIP_MAX_PIXELS)

    def _video_sampling(self) -> VideoSampling:
        if (count := self.overrides.get("num_frames")) is not None:
            return VideoSampling(num_frames=count)
        if self._is_46 and "fps" not in self.overrides:
            return VideoSampling(max_frames=MAX_PACED_FRAMES, placement="paced")
        fps = self._value(self.checkpoint.video_preprocessor, "fps", FPS)
        return VideoSampling(fps=fps, max_frames=MAX_FRAMES, placement="ceilings")


class GlmOcrProcessor(Glm4VProcessor):
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 59280, "video": 59281}
