"""Qwen2-VL: images and videos keep their aspect and become as many tokens as their size asks for, in M-RoPE's axes.

An image's patches carry their pixels once: the tower repeats them for its second frame. Patches are ordered so that
the four that become one token lie together. Frames are chosen and bounded as in qwen-vl-utils.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError, MediaError
from sensorium.media.sampling import VideoSampling
from sensorium.processors import image
from sensorium.processors.base import Processor, Setting, SettingError, integer, number
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, MediaSpan, Modality

MAX_ASPECT = 200
MAX_PIXELS = 1 << 28  # of a setting: sixteen times the largest that any checkpoint of the family names
FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
VIDEO_MIN_PIXELS = 128 * 28 * 28  # per frame; with the total below, qwen-vl-utils' own bounds
VIDEO_MAX_PIXELS = 768 * 28 * 28
VIDEO_TOTAL_PIXELS = int(128_000 * 28 * 28 * 0.9)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, *, least: int = 0
) -> tuple[int, int]:
    """The nearest multiples of `factor`, `least` or more, whose area lies within the bounds, with the aspect kept as
    well as may be."""
    # A very short side rounds to nothing here and so, if that is not too little, takes the second branch:
    # transformers' rule.
    new_h, new_w = (max(round(side / factor) * factor, least) for side in (height, width))
    if new_h * new_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if new_h * new_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return new_h, new_w


class Qwen2VLProcessor(Processor):
    modalities: frozenset[Modality] = frozenset({"image", "video"})
    settings: ClassVar[Mapping[str, Setting]] = {
        "min_pixels": integer(1, MAX_PIXELS),
        "max_pixels": integer(1, MAX_PIXELS),
        "fps": number(0.01, 1000),
        "num_frames": integer(1, MAX_FRAMES),
        "min_frames": integer(1, MAX_FRAMES),
        "max_frames": integer(1, MAX_FRAMES),
    }
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {  # begin, placeholder, end
        "image": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        "video": ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 151655, "video": 151656}  # where config.json has none
    pixel_bounds: ClassVar[tuple[int, int]] = (56 * 56, 28 * 28 * 1280)  # of an image, where no file says them
    fills_groups: ClassVar[bool] = True  # takes no odd number of frames where a longer clip has another one

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        config = checkpoint.config
        self._ids: dict[Modality, int] = {
            kind: config.get(f"{kind}_token_id", config.get(f"{kind}_token_index", default))
            for kind, default in self.token_ids.items()
        }
        self._markers = {kind: self._find_marker(self.marks[kind][1], self._ids[kind]) for kind in self._ids}

    def _configure(self) -> None:
        config, files = self.checkpoint.config, self.checkpoint.preprocessor
        vision = config.get("vision_config") or {}
        self._patch = files.get("patch_size") or vision.get("patch_size") or vision.get("spatial_patch_size", 14)
        self._frames = files.get("temporal_patch_size") or vision.get("temporal_patch_size", 2)
        self._merge: int = files.get("merge_size") or vision.get("spatial_merge_size", 2)
        self._factor = self._patch * self._merge
        self._normalizations: dict[Modality, image.Normalization] = {
            "image": image.Normalization.of(files),
            "video": self._video_normalization(),
        }
        self._resample = image.resample_filter(files)
        self._resizes = image.switch(files, "do_resize")
        self._min_pixels, self._max_pixels = self._pixel_bounds(files, self.pixel_bounds)
        self._video_bounds = self._video_pixel_bounds()
        self._sampling = self._video_sampling()

    def video_sampling(self) -> VideoSampling:
        return self._sampling

    def placeholder(self, kind: Modality, index: int) -> str:
        if kind not in self._ids:
            return super().placeholder(kind, index)
        begin, _, end = self.marks[kind]
        return f"{begin}{self._markers[kind][0]}{end}"

    def placeholder_id(self, kind: Modality) -> int:
        if kind not in self._ids:
            return super().placeholder_id(kind)
        return self._ids[kind]

    def _marker_id(self, kind: Modality) -> int:
        return self._markers[kind][1]

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind not in self._ids:
            return super().num_tokens(kind, height, width, frames)
        grid = self._grid(kind, height, width, frames)
        return self._num_rows(grid)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind not in self._ids:
            return super().process(item)
        frames = item.data.astype(np.uint8, copy=False)
        frames = frames if item.kind == "video" else frames[None]
        grid = self._grid(item.kind, frames.shape[1], frames.shape[2], len(frames), item.param)
        height, width = grid[1] * self._patch, grid[2] * self._patch
        resized = (image.resize(frame, height, width, self._resample) for frame in frames)
        arrays: dict[str, NDArray[np.generic]] = {
            "pixels": image.patches(
                resized, grid, self._patch, self._merge, 1 if item.kind == "image" else self._frames
            ),
            "grid": np.array(grid, np.int32),
            "scale": self._normalizations[item.kind].scale.reshape(3),
            "shift": self._normalizations[item.kind].shift.reshape(3),
        }
        return MediaFeatures(item.kind, self._feature_key(item), self._num_rows(grid), arrays)

    def positions(
        self, token_ids: NDArray[np.int32], spans: Sequence[MediaSpan], media: Sequence[MediaFeatures]
    ) -> tuple[NDArray[np.int32] | NDArray[np.float32] | None, int | float]:
        """Text and audio count on, equally on all axes; the rows of an image or video take their place in (time,
        height, width) from there on. What follows goes on after the largest position that the media item used."""
        spans = [span for span in spans if "grid" in media[span.item].arrays]
        if not spans:
            return None, 0
        out = np.empty((3, len(token_ids)), np.int32)
        at = position = 0
        for span in spans:
            text = span.offset - at
            out[:, at : span.offset] = np.arange(position, position + text)
            at, position = span.offset + span.length, position + text
            t, h, w = (int(n) for n in media[span.item].arrays["grid"])
            times = self._times(media[span.item], t)  # [t], of which the span may have fewer
            lines, columns = h // self._merge, w // self._merge
            places = np.indices((span.length // (lines * columns), lines, columns), np.int32).reshape(3, -1)
            places[0] = times[places[0]]
            out[:, span.offset : at] = places + position
            position += int(places.max()) + 1
        rest = len(token_ids) - at
        out[:, at:] = np.arange(position, position + rest)
        return out, position - at

    def _times(self, media: MediaFeatures, count: int) -> NDArray[np.int32]:
        """Positions on the time axis of a media item's frame groups, from 0 on: here they are counted, not timed."""
        return np.arange(count, dtype=np.int32)

    def _video_normalization(self) -> image.Normalization:
        return image.Normalization.of(self.checkpoint.preprocessor)

    def _num_rows(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // (self._merge * self._merge)

    def _grid(self, kind: Modality, height: int, width: int, frames: int, param: str = "") -> tuple[int, int, int]:
        """(frame groups, lines, columns) of patches."""
        height, width = self._size(kind, height, width, frames, param or None)
        return math.ceil(frames / self._frames), height // self._patch, width // self._patch

    def _size(self, kind: Modality, height: int, width: int, frames: int, param: str | None) -> tuple[int, int]:
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise MediaError(
                f"An image of {width}x{height} pixels is too narrow for this model, which takes sides of "
                f"at most {MAX_ASPECT}:1.",
                param=param,
                code="image_too_small",
            )
        if not self._resizes:
            if height % self._factor or width % self._factor:
                raise MediaError(
                    f"This model takes sizes in multiples of {self._factor} pixels, not {width}x{height}.",
                    param=param,
                    code="invalid_image",
                )
            return height, width
        if kind == "video":
            return self._frame_size(height, width, frames)
        return self._image_size(height, width)

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self._factor, self._min_pixels, self._max_pixels)

    def _frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        low, high = self._video_bounds
        high = max(min(high, VIDEO_TOTAL_PIXELS * self._frames // frames), min(high, int(low * 1.05)))
        return smart_resize(height, width, self._factor, low, high)

    def _pixel_bounds(self, files: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
        """Of an image or frame, in either dialect: by these names, or as the edges of `size`."""
        size = files.get("size")
        edges = size if isinstance(size, Mapping) else {}
        low = self._bound(files, "min_pixels", edges.get("min_pixels", edges.get("shortest_edge", default[0])))
        high = self._bound(files, "max_pixels", edges.get("max_pixels", edges.get("longest_edge", default[1])))
        if "min_pixels" not in self.overrides:
            low = min(low, high)
        elif "max_pixels" not in self.overrides:
            high = max(low, high)
        if high < max(low, self._factor**2):
            raise SettingError("max_pixels", f"is {high}: less than min_pixels or one token's {self._factor**2}")
        return low, high

    def _video_pixel_bounds(self) -> tuple[int, int]:
        return self._pixel_bounds(self.checkpoint.video_preprocessor, (VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS))

    def _bound(self, files: Mapping[str, Any], name: str, default: Any) -> int:
        value = self._value(files, name, default)
        if not isinstance(value, int):
            raise CheckpointError(f"{self._name_of(files)}: 'size' is {files.get('size')!r}, which has no pixel bounds")
        return value

    def _video_sampling(self) -> VideoSampling:
        """2 frames a second, 4 to 768 of them; in groups of as many as the tower takes together, if `fills_groups`. A
        given number of frames is not bounded."""
        files, group = self.checkpoint.video_preprocessor, self._frames if self.fills_groups else 1
        if self.overrides.keys() & {"fps", "num_frames"} != {"fps"}:
            wanted = self._value(files, "num_frames", None)
            if wanted is not None:
                return VideoSampling(num_frames=max(round(wanted / group), 1) * group, even=group == 2)
        low = self._value(files, "min_frames", MIN_FRAMES)
        high = self._value(files, "max_frames", MAX_FRAMES)
        if "min_frames" not in self.overrides:
            low = min(low, high)
        if high < low:
            raise SettingError("max_frames", f"is {high}: less than min_frames")
        return VideoSampling(
            fps=self._value(files, "fps", FPS),
            min_frames=math.ceil(low / group) * group,
            max_frames=max(high // group, 1) * group,
            even=group == 2,
        )
