"""Voxtral Mini and Small: a recording is padded with silence to whole windows of 30 s, whose rows, 12.5 to the second,
all stand in the prompt. The features are those of the whole recording, cut into windows: one loudest bin for all.

Source: mistral-common's prompts, transformers' VoxtralProcessor.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.values import positive_int
from sensorium.processors.audio import HOP_SAMPLES, log_mel
from sensorium.processors.speech import SpeechProcessor
from sensorium.processors.transcripts import Transcriber

TRANSCRIBE = "[TRANSCRIBE]"


class VoxtralProcessor(Transcriber, SpeechProcessor):
    takes_context: ClassVar[bool] = False
    translates: ClassVar[bool] = True
    marks: ClassVar[tuple[str, str, str]] = ("[BEGIN_AUDIO]", "[AUDIO]", "")
    token_id: ClassVar[int] = 24

    def _configure(self) -> None:
        super()._configure()
        positions = positive_int(self._audio, "max_source_positions", 1500)
        size = positive_int(self._audio, "hidden_size", 1280)
        self._window = 2 * HOP_SAMPLES * positions  # samples
        self._window_rows = positions * size // positive_int(self._audio, "intermediate_size", 5120)

    @property
    def transcribes(self) -> bool:
        return self.tokenizer.token_to_id(TRANSCRIBE) is not None

    def transcription(self, language: str | None, context: str) -> str:
        """The code stands behind the turn as text."""
        told = f"lang:{language}" if language else ""
        return f"{self.tokenizer.bos_token or ''}[INST]{self._text}[/INST]{told}{TRANSCRIBE}"

    def _windows(self, samples: int) -> int:
        return max(-(-samples // self._window), 1)

    def _num_rows(self, samples: int) -> int:
        return self._windows(samples) * self._window_rows

    def _features(self, samples: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        silence = self._windows(len(samples)) * self._window - len(samples)
        return {"mel": log_mel(np.pad(samples, (0, silence)), self._mel_bins)}
