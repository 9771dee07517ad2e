"""Processors of language models that hear: one token marks a recording, log-mel features are what the tower takes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.values import positive_int
from sensorium.errors import MediaError, UnsupportedModalityError
from sensorium.processors.audio import SAMPLE_RATE
from sensorium.processors.base import MarkedProcessor
from sensorium.types import MediaFeatures, MediaItem, Modality


class SpeechProcessor(MarkedProcessor):
    """A family says its marks, the id where config.json has none, how many rows a recording is, and its features."""

    modalities: frozenset[Modality] = frozenset({"audio"})
    sample_rate: ClassVar[int] = SAMPLE_RATE
    marks: ClassVar[tuple[str, str, str]]  # what stands before the marker, the marker, what stands behind it
    token_id: ClassVar[int]
    least_samples: ClassVar[int] = 1  # fewer give no row

    def _configure(self) -> None:
        config = self.checkpoint.config
        self._audio = config.get("audio_config") or {}
        self._mel_bins = positive_int(self._audio, "num_mel_bins", 128)
        self._fill = int(config.get("audio_token_id", config.get("audio_token_index", self.token_id)))
        begin, marker, end = self.marks
        text, self._marker = self._find_marker(marker, self._fill)
        self._text = f"{begin}{text}{end}"

    def _num_rows(self, samples: int) -> int:
        raise NotImplementedError

    def _features(self, samples: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        raise NotImplementedError

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "audio":
            return super().num_tokens(kind, height, width, frames)
        return self._num_rows(self._long_enough(frames))

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "audio":
            raise UnsupportedModalityError(item.kind, param=item.param)
        samples = item.data.astype(np.float32, copy=False)
        rows = self._num_rows(self._long_enough(len(samples), item.param))
        return MediaFeatures("audio", self._feature_key(item), rows, self._features(samples))

    def _long_enough(self, samples: int, param: str = "") -> int:
        if samples < self.least_samples:
            raise MediaError(
                f"A recording of {samples / SAMPLE_RATE * 1000:.0f} ms is too short for this model, which takes "
                f"{self.least_samples / SAMPLE_RATE * 1000:.0f} ms or more.",
                param=param or None,
                code="audio_too_short",
            )
        return samples
