"""Qwen2.5-Omni's thinker: Qwen2.5-VL's images and videos, and audio as log-mel features.

Audio rows are counted on like text, 25 to the second; a video's frames lie at 25 positions to the second too. The
audio track of a video is ignored; send it as a separate audio part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.processors.audio import FFT_SAMPLES, HOP_SAMPLES, SAMPLE_RATE, log_mel
from sensorium.processors.qwen2_5_vl import Qwen25VLProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality

POSITIONS_PER_SECOND = 25
MIN_FRAMES = 3  # of mel features, for one row; shorter audio is padded with silence


def num_frames(samples: int) -> int:
    """Mel frames: every hop that has begun counts."""
    return max(-(-samples // HOP_SAMPLES), MIN_FRAMES)


def num_rows(frames: int) -> int:
    """Two strided steps: the tower's second convolution, and the mean of pairs after it."""
    return ((frames - 1) // 2 + 1) // 2


class Qwen2OmniProcessor(Qwen25VLProcessor):
    modalities: frozenset[Modality] = frozenset({"image", "video", "audio"})
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {
        "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
        "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
        "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 151655, "video": 151656, "audio": 151646}
    sample_rate: ClassVar[int] = SAMPLE_RATE

    def _configure(self) -> None:
        super()._configure()
        self._mel_bins = int((self.checkpoint.config.get("audio_config") or {}).get("num_mel_bins", 128))

    def _time_scale(self) -> float:
        return float(self.checkpoint.config.get("position_id_per_seconds", POSITIONS_PER_SECOND))

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind == "audio":
            return num_rows(num_frames(frames))
        return super().num_tokens(kind, height, width, frames)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind == "audio":
            mel = self._mel(item.data.astype(np.float32, copy=False))
            return MediaFeatures("audio", self._feature_key(item), num_rows(mel.shape[1]), {"mel": mel})
        return super().process(item)

    def _mel(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[bins, frames]. Silence follows the clip, as in the published features, which are padded to 300 s: the frames
        that reach beyond the end see it, and its start counts for the loudest bin."""
        frames = num_frames(len(samples))
        padded = np.pad(samples, (0, frames * HOP_SAMPLES + 2 * FFT_SAMPLES - len(samples)))
        return np.ascontiguousarray(log_mel(padded, self._mel_bins)[:, :frames])
