"""Qwen3-Omni's thinker: images, videos and audio in one prompt, on time axes of 13 positions to the second.

A video stands in the prompt without words of time: its rows' positions tell it, also between whole numbers. With
`use_audio_in_video` the n-th audio item is the n-th video's sound, and the rows of both stand in the order of time.
Source: transformers' Qwen3OmniMoeProcessor and its `get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.values import positive_int
from sensorium.errors import RequestError
from sensorium.processors.audio import FFT_SAMPLES, HOP_SAMPLES, log_mel
from sensorium.processors.base import Piece, PlaceholderRun, Setting, boolean
from sensorium.processors.qwen2_omni import Qwen2OmniProcessor
from sensorium.processors.qwen2_vl import Qwen2VLProcessor
from sensorium.processors.qwen3_asr import chunked_rows
from sensorium.types import MediaFeatures, MediaItem, MediaSpan, Modality, Prompt

POSITIONS_PER_SECOND = 13
FRAME_MIN_PIXELS, FRAME_MAX_PIXELS = 128 * 32 * 32, 768 * 32 * 32
MIN_SAMPLES = FFT_SAMPLES // 2 + 1  # what one frame needs; shorter audio is padded with silence
USE_AUDIO = "use_audio_in_video"

Positions = NDArray[np.float32]


class Qwen3OmniProcessor(Qwen2OmniProcessor):
    settings: ClassVar[Mapping[str, Setting]] = {**Qwen2OmniProcessor.settings, USE_AUDIO: boolean}
    marks: ClassVar[Mapping[Modality, tuple[str, str, str]]] = {
        **Qwen2VLProcessor.marks,
        "audio": ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
    }
    token_ids: ClassVar[Mapping[Modality, int]] = {"image": 151655, "video": 151656, "audio": 151675}

    def _configure(self) -> None:
        super()._configure()
        self._hears_videos = self._setting(USE_AUDIO, False)
        self._chunk = 2 * positive_int(self.checkpoint.config.get("audio_config") or {}, "n_window", 50)

    def _time_scale(self) -> float:
        return float(self.checkpoint.config.get("position_id_per_seconds", POSITIONS_PER_SECOND))

    def _video_pixel_bounds(self) -> tuple[int, int]:
        return self._pixel_bounds(self.checkpoint.video_preprocessor, (FRAME_MIN_PIXELS, FRAME_MAX_PIXELS))

    # Audio

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        if kind == "audio":
            return chunked_rows(max(frames, MIN_SAMPLES) // HOP_SAMPLES, self._chunk)
        return super().num_tokens(kind, height, width, frames)

    def process(self, item: MediaItem) -> MediaFeatures:
        if item.kind != "audio":
            return super().process(item)
        samples = item.data.astype(np.float32, copy=False)
        mel = log_mel(np.pad(samples, (0, max(MIN_SAMPLES - len(samples), 0))), self._mel_bins)
        return MediaFeatures("audio", self._feature_key(item), chunked_rows(mel.shape[1], self._chunk), {"mel": mel})

    # Prompts

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        if not self._hears_videos:
            return super().build(text, media, add_special_tokens=add_special_tokens)
        given = [one.kind for one in media]
        if given.count("video") != given.count("audio"):
            raise RequestError(
                f"With `{USE_AUDIO}` every video needs an audio item that is its sound, but the request brings "
                f"{given.count('video')} video(s) and {given.count('audio')} audio(s).",
                code="media_count_mismatch",
            )
        begin, marker, end = self.placeholder("video", 0).partition(self._markers["video"][0])
        heard, _, closed = self.placeholder("audio", 0).partition(self._markers["audio"][0])
        text = text.replace(self.placeholder("audio", 0), "")  # it stands in the video's place
        text = text.replace(f"{begin}{marker}{end}", f"{begin}{heard}{marker}{closed}{end}")
        token_ids = np.array(self.tokenizer.encode(text, add_special_tokens=add_special_tokens), np.int32)
        found: list[Modality] = [kind for _, kind in self._marked(token_ids)]
        found += ["audio"] * found.count("video")
        self._check_counts(found, media)
        return self._assemble(self._expanded(token_ids, media), media)

    def _expanded(self, token_ids: NDArray[np.int32], media: Sequence[MediaFeatures]) -> Iterator[Piece]:
        if not self._hears_videos:
            yield from super()._expanded(token_ids, media)
            return
        images, videos, audios = (
            iter([index for index, one in enumerate(media) if one.kind == kind]) for kind in ("image", "video", "audio")
        )
        start = 0
        for place, kind in self._marked(token_ids):
            yield token_ids[start:place]
            if kind == "image":
                yield self._run(media, next(images))
            else:
                yield from self._in_order_of_time(media, next(videos), next(audios))
            start = place + 1
        yield token_ids[start:]

    def _run(self, media: Sequence[MediaFeatures], item: int) -> PlaceholderRun:
        return PlaceholderRun(item, self.placeholder_id(media[item].kind), media[item].num_rows)

    def _in_order_of_time(self, media: Sequence[MediaFeatures], video: int, audio: int) -> Iterator[PlaceholderRun]:
        """Rows of a group of frames come before the first row of audio that is not earlier."""
        times = self._grid_times(media[video])
        per_group, heard = media[video].num_rows // len(times), media[audio].num_rows
        before = np.minimum(np.ceil(times).astype(np.int64), heard)  # rows of audio that come before each group
        shown, said = self._run(media, video), self._run(media, audio)
        done = 0
        for group, count in enumerate(before.tolist()):
            if count > done:
                yield PlaceholderRun(audio, said.token_id, count - done, done)
                done = count
            yield PlaceholderRun(video, shown.token_id, per_group, group * per_group)
        if heard > done:
            yield PlaceholderRun(audio, said.token_id, heard - done, done)

    # Positions

    def positions(
        self, token_ids: NDArray[np.int32], spans: Sequence[MediaSpan], media: Sequence[MediaFeatures]
    ) -> tuple[NDArray[np.int32] | NDArray[np.float32] | None, int | float]:
        """As Qwen2-VL's, with times that may lie between whole numbers. What belongs together begins together; what
        follows goes on after the largest position of the piece that ends it."""
        if not any("grid" in media[span.item].arrays for span in spans):
            return None, 0
        out = np.empty((3, len(token_ids)), np.float32)
        at, position = 0, np.float32(0)
        for group in _adjacent(spans) if self._hears_videos else ([span] for span in spans):
            first = group[0].offset
            out[:, at:first] = position + np.arange(first - at, dtype=np.float32)
            position = np.float32(position + (first - at))
            for span in group:
                part = slice(span.offset, span.offset + span.length)
                out[:, part] = position + self._places(media[span.item], span)
            at = group[-1].offset + group[-1].length
            position = np.float32(out[:, _tail_of(group).offset : at].max() + 1)
        out[:, at:] = position + np.arange(len(token_ids) - at, dtype=np.float32)
        delta = float(np.float32(out.max() + 1 - len(token_ids)))
        is_whole = (out == np.rint(out)).all()
        return out.astype(np.int32) if is_whole else out, int(delta) if delta.is_integer() else delta

    def _places(self, media: MediaFeatures, span: MediaSpan) -> Positions:
        """[3, rows of the span] (time, line, column), from 0 on."""
        rows = np.arange(span.row, span.row + span.length)
        if "grid" not in media.arrays:
            return np.broadcast_to(rows.astype(np.float32), (3, len(rows)))
        _, height, width = (int(n) for n in media.arrays["grid"])
        lines, columns = height // self._merge, width // self._merge
        groups, within = np.divmod(rows, lines * columns)
        return np.stack([self._grid_times(media)[groups], *np.divmod(within, columns)]).astype(np.float32)

    def _grid_times(self, media: MediaFeatures) -> Positions:
        """Of each group of frames, in float32 and in this order: the rounding decides over the order of rows."""
        groups = np.arange(int(media.arrays["grid"][0]), dtype=np.float32)
        seconds = np.asarray(media.arrays.get("seconds", np.float32(0)), np.float32)
        return groups * seconds * np.float32(self._positions_per_second)


def _adjacent(spans: Sequence[MediaSpan]) -> Iterator[list[MediaSpan]]:
    """Spans between which there is no text: those of a video and of its sound."""
    group: list[MediaSpan] = []
    for span in spans:
        if group and span.offset != group[-1].offset + group[-1].length:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _tail_of(group: Sequence[MediaSpan]) -> MediaSpan:
    """The first of the spans at the end that belong to one item."""
    tail = group[-1]
    for earlier, later in reversed(list(pairwise(group))):
        if earlier.item != later.item:
            break
        tail = earlier
    return tail
