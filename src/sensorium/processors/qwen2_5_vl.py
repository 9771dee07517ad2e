"""Qwen2.5-VL: Qwen2-VL's images and videos, a video's frames on a time axis in seconds."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sensorium.processors.qwen2_vl import FPS, Qwen2VLProcessor
from sensorium.types import MediaFeatures, MediaItem

TOKENS_PER_SECOND = 4  # where config.json does not say


class Qwen25VLProcessor(Qwen2VLProcessor):
    def _configure(self) -> None:
        super()._configure()
        self._positions_per_second = self._time_scale()

    def _time_scale(self) -> float:
        """Positions on the time axis to a second of video."""
        vision = self.checkpoint.config.get("vision_config") or {}
        return float(vision.get("tokens_per_second", TOKENS_PER_SECOND))

    def process(self, item: MediaItem) -> MediaFeatures:
        features = super().process(item)
        return self._timed(features, item) if item.kind == "video" else features

    def _timed(self, features: MediaFeatures, item: MediaItem) -> MediaFeatures:
        """With the seconds from one group of frames to the next. They decide over positions, so they are in the key."""
        seconds = np.float32(self._interval_s(item) * self._frames)
        key = hashlib.sha256(features.key + struct.pack("<f", seconds)).digest()
        arrays: dict[str, NDArray[np.generic]] = {**features.arrays, "seconds": np.array([seconds])}
        return replace(features, key=key, arrays=arrays)

    def _interval_s(self, item: MediaItem) -> float:
        """Between two frames on the average: the duration shared among them, as qwen-omni-utils counts it."""
        count, times = len(item.data), item.timestamps_s
        if item.duration_s > 0:
            return item.duration_s / count
        if len(times) > 1:
            return (times[-1] - times[0]) / (len(times) - 1)
        return 1 / (self._sampling.fps or FPS)

    def _times(self, media: MediaFeatures, count: int) -> NDArray[np.int32]:
        if "seconds" not in media.arrays:
            return super()._times(media, count)
        # In float32 and in this order, because the rounding decides over positions.
        seconds = np.arange(count, dtype=np.float32) * np.asarray(media.arrays["seconds"], np.float32)
        return np.asarray(seconds * np.float32(self._positions_per_second), np.int32)
