"""Qwen3-VL: a video is its pairs of frames, each of which stands behind its time in words; pixels of a clip are bounded
together. Frames are chosen as transformers' processor does it, whose file the checkpoint brings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError
from sensorium.processors import image
from sensorium.processors.base import PlaceholderRun
from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

FPS = 24.0  # of a clip that brings no times
CLIP_MIN_PIXELS, CLIP_MAX_PIXELS = 128 * 32 * 32, 768 * 32 * 32  # of all frames, where the checkpoint has no file
MAX_FRAME_TOKENS = 768  # with `cap_pixels_per_frame`


def clip_resize(
    frames: int, height: int, width: int, *, group: int, factor: int, low: int, high: int
) -> tuple[int, int]:
    """The nearest multiples of `factor` at which so many frames have between `low` and `high` pixels together."""
    if (short := min(height, width)) < factor:
        height, width = int(height * (factor / short)), int(width * (factor / short))
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    pixels = max(round(frames / group), 1) * group * new_h * new_w
    if pixels > high:
        shrink = math.sqrt(frames * height * width / high)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if pixels < low:
        grow = math.sqrt(low / (frames * height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return new_h, new_w


def clip_bounds(checkpoint: Checkpoint, low: int, high: int) -> tuple[int, int]:
    """Pixels of all frames together, by the edges of `size`; these where the checkpoint has no file that says it."""
    size = checkpoint.video_preprocessor.get("size")
    if size is None:
        return low, high
    least, most = (size.get(edge) if isinstance(size, dict) else None for edge in ("shortest_edge", "longest_edge"))
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise CheckpointError(f"video_preprocessor_config.json: 'size' is {size!r}, which has no pixel bounds")
    return least, most


def _words(video: MediaFeatures) -> list[str]:
    """The time of each group of frames as it stands in the prompt."""
    return [f"<{tenths // 10}.{tenths % 10} seconds>" for tenths in video.arrays["tenths"].tolist()]


class Qwen3VLProcessor(Qwen2VLProcessor):
    fills_groups: ClassVar[bool] = False

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """Of a video with times below ten seconds; each later one may take a token more."""
        rows = super().num_tokens(kind, height, width, frames)
        groups = math.ceil(frames / self._frames)
        return rows if kind == "image" else rows + self._around(["<0.0 seconds>"] * groups)

    def prompt_tokens(self, features: MediaFeatures) -> int:
        if features.kind == "image":
            return features.num_rows
        return features.num_rows + self._around(_words(features))

    def _around(self, times: Sequence[str]) -> int:
        """Tokens of the times and of begin and end behind each: one pair of these stands in the text already."""
        lengths = {time: len(self.tokenizer.encode(time)) for time in times}
        return sum(lengths[time] + 2 for time in times) - 2

    def process(self, item: MediaItem) -> MediaFeatures:
        features = super().process(item)
        if item.kind != "video":
            return features
        times = np.array(item.timestamps_s or [i / FPS for i in range(len(item.data))], np.float64)
        arrays: dict[str, NDArray[np.generic]] = {**features.arrays, "tenths": self._group_tenths(times)}
        return replace(features, arrays=arrays)

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        """The text's markers of videos become one for each pair of frames first, as text: so a time is tokenized with
        what stands before it."""
        kinds: tuple[Modality, ...] = ("image", "video")
        self._check_counts([kind for kind in kinds for _ in range(text.count(self._markers[kind][0]))], media)
        videos = [one for one in media if one.kind == "video"]
        timed = self._with_times(text, videos)
        token_ids = np.array(self.tokenizer.encode(timed, add_special_tokens=add_special_tokens), np.int32)
        return self._assemble(self._expanded(token_ids, media), media)

    def _with_times(self, text: str, videos: Sequence[MediaFeatures]) -> str:
        begin, _, end = self.marks["video"]
        marker = self._markers["video"][0]
        waiting = iter(videos)

        def groups(_: re.Match[str]) -> str:
            return "".join(f"{words}{begin}{marker}{end}" for words in _words(next(waiting)))

        return re.sub(f"{re.escape(begin + marker + end)}|{re.escape(marker)}", groups, text)

    def _runs(self, kind: Modality, media: Sequence[MediaFeatures]) -> Iterator[PlaceholderRun]:
        for run in super()._runs(kind, media):
            groups = int(media[run.item].arrays["grid"][0])
            for row in range(0, run.count, run.count // groups):
                yield replace(run, row=row, count=run.count // groups)

    def _group_tenths(self, times: NDArray[np.float64]) -> NDArray[np.int32]:
        """Of each group of frames the middle between its first and its last, in tenths of seconds rounded as they are
        written; the clip's last frame fills a group."""
        size = self._frames
        filled = np.pad(times, (0, -len(times) % size), mode="edge")
        middles = (filled[::size] + filled[size - 1 :: size]) / 2
        return np.array([int(f"{time:.1f}".replace(".", "")) for time in middles.tolist()], np.int32)

    def _video_normalization(self) -> image.Normalization:
        return image.Normalization.of(self.checkpoint.video_preprocessor, image.HALF, image.HALF)

    def _video_pixel_bounds(self) -> tuple[int, int]:
        """Of all frames together, as the checkpoint's file says: settings are of a frame."""
        return clip_bounds(self.checkpoint, CLIP_MIN_PIXELS, CLIP_MAX_PIXELS)

    def _frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        low, high = self._video_bounds
        files = self.checkpoint.video_preprocessor
        if files.get("cap_pixels_per_frame"):
            most = files.get("max_video_tokens") or MAX_FRAME_TOKENS
            high = frames * max(min(most * self._factor**2, high // frames), int(low * 1.05))
        if (asked := self.overrides.get("max_pixels")) is not None:
            high = min(high, max(asked, self._factor**2) * frames)
        if (asked := self.overrides.get("min_pixels")) is not None:
            low = max(low, asked * frames)
        return clip_resize(
            frames, height, width, group=self._frames, factor=self._factor, low=min(low, high), high=high
        )
