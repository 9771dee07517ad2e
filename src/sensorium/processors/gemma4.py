"""Gemma 4: an image or frame keeps its aspect and is scaled, up or down, to as many fields of patches as its budget
holds. Frames stand behind their times; a recording is a row for every four frames of 10 ms, in the first 30 s.

Source: transformers' Gemma4Processor, Gemma4VideoProcessor and Gemma4AudioFeatureExtractor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import number as config_number
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError, MediaError, StartupError, UnsupportedModalityError
from sensorium.media.sampling import VideoSampling
from sensorium.processors import image
from sensorium.processors.audio import SAMPLE_RATE, log_magnitude_mel, short_frames
from sensorium.processors.base import Setting, integer, number
from sensorium.processors.shown import ShownProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality

BUDGETS = (70, 140, 280, 560, 1120)
IDS: Mapping[Modality, tuple[tuple[str, int], tuple[str, int], tuple[str, int]]] = {  # begin, each row, end
    "image": (("boi_token_id", 255_999), ("image_token_id", 258_880), ("eoi_token_id", 258_882)),
    "video": (("boi_token_id", 255_999), ("video_token_id", 258_884), ("eoi_token_id", 258_882)),
    "audio": (("boa_token_id", 256_000), ("audio_token_id", 258_881), ("eoa_token_index", 258_883)),
}
VIDEO = "<|video|>"  # in templates, whatever the tokenizer calls its rows' token
RATE = 24.0  # frames a second of a clip that brings no times
MAX_FRAMES = 512
LONGEST_SAMPLES = 480_000
AUDIO_DEFAULTS = {
    **{"sampling_rate": SAMPLE_RATE, "frame_length_ms": 20.0, "hop_length_ms": 10.0, "fft_overdrive": False},
    **{"min_frequency": 0.0, "max_frequency": 8000.0, "preemphasis": 0.0, "dither": 0.0, "input_scale_factor": 1.0},
}
"""The feature extractor's, the only ones that are served."""


def budget(value: Any) -> int:
    """`max_soft_tokens`: rows of an image or frame, at most."""
    if isinstance(value, bool) or value not in BUDGETS:
        raise ValueError(f"must be one of {', '.join(map(str, BUDGETS))}")
    return int(value)


class Gemma4Processor(ShownProcessor):
    modalities: frozenset[Modality] = frozenset(IDS)
    literals: ClassVar[tuple[str, ...]] = (VIDEO,)
    longest_audio_s = LONGEST_SAMPLES / SAMPLE_RATE
    settings: ClassVar[Mapping[str, Setting]] = {
        "max_soft_tokens": budget,
        "num_frames": integer(1, MAX_FRAMES),
        "fps": number(0.01, 1000),
    }

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        super().__init__(checkpoint, tokenizer, overrides)
        if not checkpoint.config.get("audio_config"):
            self.modalities = self.modalities - {"audio"}
        if tokenizer.id_to_token(self._id(*IDS["video"][1])) is None:
            self.modalities = self.modalities - {"video"}
        self._marks = {kind: [self._token(*one) for one in IDS[kind]] for kind in self.modalities}

    def _token(self, name: str, default: int) -> tuple[str, int]:
        """(text, id) of a token that config.json names by its id."""
        token_id = self._id(name, default)
        text = self.tokenizer.id_to_token(token_id)
        if text is None:
            raise StartupError(f"The tokenizer lacks a token that config.json names: {name}.")
        return text, token_id

    def _id(self, name: str, default: int) -> int:
        return positive_int(self.checkpoint.config, name, default)

    def _configure(self) -> None:
        given = {name: value for name, value in self.checkpoint.preprocessor.items() if value is not None}
        files = {"do_normalize": False, **given}
        vision = self.checkpoint.config.get("vision_config") or {}
        self._patch = positive_int(vision, "patch_size", 16)
        self._kernel = positive_int(vision, "pooling_kernel_size", 3)
        for stated in (files, self.checkpoint.video_preprocessor):
            sizes = stated.get("patch_size") or self._patch, stated.get("pooling_kernel_size") or self._kernel
            if sizes != (self._patch, self._kernel) or not image.switch(stated, "do_resize"):
                raise CheckpointError(
                    f"{self._name_of(stated)}: patch_size and pooling_kernel_size must be config.json's, and "
                    "do_resize true"
                )
        self._most: dict[Modality, int] = {
            "image": self._setting("max_soft_tokens", 280),
            "video": self._value(self.checkpoint.video_preprocessor, "max_soft_tokens", 70),
        }
        self._resample = image.resample_filter(files)
        self._normalization = image.Normalization.of(files, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self._configure_audio(self.checkpoint.audio_preprocessor)

    def _configure_audio(self, files: Mapping[str, Any]) -> None:
        for name, value in AUDIO_DEFAULTS.items():
            if files.get(name, value) not in (value, None):
                raise CheckpointError(f"The feature extractor's {name} {files[name]!r} is not supported, only {value}.")
        self._bins = positive_int(files, "feature_size", 128)
        self._floor = config_number(files, "mel_floor", 1e-3)
        channels = (self.checkpoint.config.get("audio_config") or {}).get("subsampling_conv_channels") or [self._bins]
        if self._bins != channels[0]:
            raise CheckpointError(f"The feature extractor's {self._bins} bins do not fit the audio tower's {channels}.")

    def video_sampling(self) -> VideoSampling:
        """Evenly, as many as there are where a clip has fewer."""
        if "num_frames" not in self.overrides and (fps := self._value({}, "fps", None)) is not None:
            return VideoSampling(fps=fps, max_frames=MAX_FRAMES, placement="starts")
        frames = self._value(self.checkpoint.video_preprocessor, "num_frames", 32)
        return VideoSampling(num_frames=frames, placement="starts")

    def placeholder(self, kind: Modality, index: int) -> str:
        if kind not in self.modalities:
            return super().placeholder(kind, index)
        return VIDEO if kind == "video" else self._marks[kind][1][0]

    def placeholder_id(self, kind: Modality) -> int:
        return self._marks[kind][1][1] if kind in self.modalities else super().placeholder_id(kind)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind not in self.modalities:
            return super().num_tokens(kind, height, width, frames)
        if kind == "audio":
            return self._audio_rows(frames) + 2
        rows = math.prod(self._fields(kind, height, width))
        return rows + 2 if kind == "image" else frames * rows + self._text_tokens(self._timed([0] * frames))

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind not in self.modalities:
            raise UnsupportedModalityError(item.kind, param=item.param)
        arrays: dict[str, NDArray[np.generic]] = {}
        if item.kind == "audio":
            samples = item.data.astype(np.float32, copy=False)[:LONGEST_SAMPLES]
            rows = self._audio_rows(len(samples), item.param)
            arrays["mel"] = log_magnitude_mel(samples, self._bins, self._floor)  # [frames, bins]
            return MediaFeatures("audio", self._feature_key(item), rows, arrays)
        frames = item.data.astype(np.uint8, copy=False)
        frames = frames if item.kind == "video" else frames[None]
        lines, columns = self._fields(item.kind, *frames.shape[1:3])
        arrays["pixels"] = np.concatenate([self._patches(frame, lines, columns) for frame in frames])
        arrays["grid"] = np.array([len(frames), lines * self._kernel, columns * self._kernel], np.int32)
        if item.kind == "video":
            times = item.timestamps_s or [i / RATE for i in range(len(frames))]
            arrays["seconds"] = np.array(times).astype(np.int32)
        return MediaFeatures(item.kind, self._feature_key(item), len(frames) * lines * columns, arrays)

    def _patches(self, pixels: image.Pixels, lines: int, columns: int) -> NDArray[np.float32]:
        """[patches, side * side * 3], line by line."""
        step, patch = self._kernel * self._patch, self._patch
        resized = image.resize(pixels, lines * step, columns * step, self._resample)
        planes = image.planes(resized, self._normalization)  # [3, height, width]
        cut = planes.reshape(3, lines * self._kernel, patch, columns * self._kernel, patch).transpose(1, 3, 2, 4, 0)
        return cut.reshape(-1, 3 * patch**2)

    def _fields(self, kind: Modality, height: int, width: int) -> tuple[int, int]:
        """Lines and columns of rows, after the image was scaled to its budget."""
        step, most = self._kernel * self._patch, self._most[kind]
        factor = math.sqrt(most * self._kernel**2 * self._patch**2 / (height * width))
        lines, columns = math.floor(factor * height / step), math.floor(factor * width / step)
        if not lines and not columns:
            raise MediaError(f"An image of {width} x {height} pixels cannot be scaled to {most} rows.")
        if not lines:
            return 1, min(width // height, most)
        if not columns:
            return min(height // width, most), 1
        return lines, columns

    def _audio_rows(self, samples: int, param: str = "") -> int:
        if not (frames := short_frames(min(samples, LONGEST_SAMPLES))):
            raise MediaError(
                f"A recording of {samples} samples is too short for this model, which takes 161 or more.",
                param=param or None,
                code="audio_too_short",
            )
        return -(-frames // 4)

    def _counts(self, media: MediaFeatures) -> list[int]:
        frames = int(media.arrays["grid"][0]) if media.kind == "video" else 1
        return [media.num_rows // frames] * frames

    def _shown(self, media: MediaFeatures) -> str:
        return self._timed(media.arrays["seconds"].tolist()) if media.kind == "video" else self._marked_rows(media.kind)

    def _marked_rows(self, kind: Modality) -> str:
        return "".join(text for text, _ in self._marks[kind])

    def _timed(self, seconds: Iterator[int] | list[int]) -> str:
        frame = self._marked_rows("video")
        return " ".join(f"{second // 60:02d}:{second % 60:02d} {frame}" for second in seconds)
