"""Qwen2-Audio: a clip is one window of 30 s, padded with silence that is not attended to; 25 rows to the second.

Source: transformers' Qwen2AudioProcessor. What a clip has beyond the window is cut, there and here.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.values import positive_int
from sensorium.processors.audio import HOP_SAMPLES, log_mel
from sensorium.processors.speech import SpeechProcessor
from sensorium.types import Modality


class Qwen2AudioProcessor(SpeechProcessor):
    marks: ClassVar[tuple[str, str, str]] = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    token_id: ClassVar[int] = 151646
    least_samples: ClassVar[int] = 2 * HOP_SAMPLES + 1

    def _configure(self) -> None:
        super()._configure()
        self._window = 2 * HOP_SAMPLES * positive_int(self._audio, "max_source_positions", 1500)  # samples
        self.longest_audio_s = self._window / self.sample_rate

    def placeholder(self, kind: Modality, index: int) -> str:
        """Clips are numbered, over the whole conversation."""
        text = super().placeholder(kind, index)
        return f"Audio {index + 1}: {text}\n"

    def _frames(self, samples: int) -> int:
        """Mel frames of the clip's own: every hop that has begun counts."""
        return -(-min(samples, self._window) // HOP_SAMPLES)

    def _num_rows(self, samples: int) -> int:
        """Two strided steps: the second convolution, and the mean of pairs."""
        return ((self._frames(samples) - 1) // 2 + 1) // 2

    def _features(self, samples: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        """`mel` [bins, frames of the window] and `frames` [1] that are the clip's own."""
        padded = np.pad(samples[: self._window], (0, max(self._window - len(samples), 0)))
        frames = np.array([self._frames(len(samples))], np.int64)
        return {"mel": log_mel(padded, self._mel_bins), "frames": frames}
