"""Qwen2.5-Omni's thinker: Qwen2-VL's images and videos on a time axis in seconds, and audio as log-mel features.

Audio rows are counted on like text, 25 to the second; a video's frames lie at 25 positions to the second too. The
audio track of a video is ignored; send it as a separate audio part.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.processors.audio import FFT_SAMPLES, HOP_SAMPLES, SAMPLE_RATE, log_mel
from sensorium.processors.qwen2_vl import FPS, Qwen2VLProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality

POSITIONS_PER_SECOND = 25
MIN_FRAMES = 3  # of mel features, for one row; shorter audio is padded with silence


def num_frames(samples: int) -> int:
    """Mel frames: every hop that has begun counts."""
    return max(-(-samples // HOP_SAMPLES), MIN_FRAMES)


def num_rows(frames: int) -> int:
    """Two strided steps: the tower's second convolution, and the mean of pairs after it."""
    return ((frames - 1) // 2 + 1) // 2


class Qwen2OmniProcessor(Qwen2VLProcessor):
    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video", "audio"})
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {
        "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
        "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
        "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 151655, "video": 151656, "audio": 151646}
    sample_rate: ClassVar[int] = SAMPLE_RATE

    def _configure(self) -> None:
        super()._configure()
        config = self.checkpoint.config
        self._mel_bins = int((config.get("audio_config") or {}).get("num_mel_bins", 128))
        self._positions_per_second = float(config.get("position_id_per_seconds", POSITIONS_PER_SECOND))

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind == "audio":
            return num_rows(num_frames(frames))
        return super().num_tokens(kind, height, width, frames)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind == "audio":
            mel = self._mel(item.data.astype(np.float32, copy=False))
            return MediaFeatures("audio", self._feature_key(item), num_rows(mel.shape[1]), {"mel": mel})
        features = super().process(item)
        return self._timed(features, item) if item.kind == "video" else features

    def _mel(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[bins, frames]. Silence follows the clip, as in the published features, which are padded to 300 s: the frames
        that reach beyond the end see it, and its start counts for the loudest bin."""
        frames = num_frames(len(samples))
        padded = np.pad(samples, (0, frames * HOP_SAMPLES + 2 * FFT_SAMPLES - len(samples)))
        return np.ascontiguousarray(log_mel(padded, self._mel_bins)[:, :frames])

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
