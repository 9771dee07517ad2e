"""Ultravox v0.5: clips become log-mel chunks of 30 s; `<|audio|>` is no token but text that the prompt is split on.

Source: the published ultravox_processing.py. One row stands for 16 mel frames (0.16 s). There the clips of one request
are padded to the longest, which changes the last row of the others; here each equals what it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import UnsupportedModalityError
from sensorium.processors.audio import HOP_SAMPLES, SAMPLE_RATE, log_mel
from sensorium.processors.base import Piece, PlaceholderRun, Processor
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

PLACEHOLDER = "<|audio|>"
MIN_SAMPLES = 2 * HOP_SAMPLES  # shorter clips are padded with silence
CHUNK_FRAMES = 3000


def padded(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Silence up to a whole number of frames, two at least."""
    wanted = max(MIN_SAMPLES, -(-len(samples) // HOP_SAMPLES) * HOP_SAMPLES)
    return np.pad(samples, (0, wanted - len(samples)))


def chunk_lengths(frames: int, chunk_frames: int = CHUNK_FRAMES) -> list[int]:
    return [min(chunk_frames, frames - start) for start in range(0, frames, chunk_frames)]


class UltravoxProcessor(Processor):
    modalities: frozenset[Modality] = frozenset({"audio"})
    literals: ClassVar[tuple[str, ...]] = (PLACEHOLDER,)
    sample_rate: ClassVar[int] = SAMPLE_RATE

    def _configure(self) -> None:
        config: Mapping[str, Any] = self.checkpoint.config
        audio = config.get("audio_config") or {}
        self.num_mel_bins = int(audio.get("num_mel_bins", 128))
        self.chunk_frames = 2 * int(audio.get("max_source_positions", CHUNK_FRAMES // 2))
        self.frames_per_row = 2 * int(config.get("stack_factor", 8))
        index = int(config.get("audio_token_index", 0))
        self.filler = index if 0 <= index < self.checkpoint.vocab_size else 0

    def placeholder(self, kind: Modality, index: int) -> str:
        return PLACEHOLDER

    def placeholder_id(self, kind: Modality) -> int:
        return self.filler

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind != "audio":
            return super().num_tokens(kind, height, width, frames)
        return self._num_rows(max(2, -(-frames // HOP_SAMPLES)))

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "audio":
            raise UnsupportedModalityError(item.kind, param=item.param)
        mel = log_mel(padded(item.data.astype(np.float32, copy=False)), self.num_mel_bins)
        return MediaFeatures("audio", self._feature_key(item), self._num_rows(mel.shape[1]), {"mel": mel})

    def _num_rows(self, mel_frames: int) -> int:
        return sum(-(-frames // self.frames_per_row) for frames in chunk_lengths(mel_frames, self.chunk_frames))

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        return self._assemble(self._pieces(text.split(PLACEHOLDER), media, add_special_tokens), media)

    def text_length(self, text: str) -> int:
        return sum(len(self.tokenizer.encode(piece)) for piece in text.split(PLACEHOLDER))

    def _pieces(self, texts: list[str], media: Sequence[MediaFeatures], add_special_tokens: bool) -> Iterator[Piece]:
        self._check_counts(["audio"] * (len(texts) - 1), media)
        for index, text in enumerate(texts):
            if index:
                yield PlaceholderRun(index - 1, self.filler, media[index - 1].num_rows)
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens and index == 0)
            yield np.array(ids, np.int32)
