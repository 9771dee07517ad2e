"""Audio file -> mono float32 at the rate that a model wants. Runs in decode workers only.

Stereo becomes mono as the mean of left and right (both count the same for a listener); more channels are refused,
because every way to mix them makes audio that nobody would hear. Samples are counted while they are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av.error
import numpy as np
import soxr
from av.container import InputContainer
from numpy.typing import NDArray

from sensorium.media.container import damaged, opened
from sensorium.media.magic import Demuxer
from sensorium.media.source import PADDING_S, Refusal

Samples = NDArray[np.float32]

MIN_RATE, MAX_RATE, MAX_CHANNELS = 8_000, 192_000, 2
LOUDEST = 1000.0  # full scale is 1; nothing sane is beyond this
FULL_SCALE = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0}
MAX_BAD_PACKETS = 16
BLOCK_SAMPLES = 1 << 18


@dataclass(frozen=True, slots=True)
class Track:
    """What the packets say, without decoding."""

    duration_s: float
    rate: int


def inspect_audio(payload: bytes, demuxer: Demuxer) -> Track:
    with opened(payload, "audio", demuxer) as (container, stream):
        rate = _checked_rate(stream)
        ticks = sum(packet.duration or 0 for packet in container.demux(stream) if packet.size)
        return Track(float(ticks * stream.time_base), rate)


def decode_audio(payload: bytes, demuxer: Demuxer, sample_rate: int, max_seconds: float) -> list[Samples]:
    """float32 [samples] in pieces."""
    with opened(payload, "audio", demuxer) as (container, stream):
        rate = _checked_rate(stream)
        resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32") if rate != sample_rate else None
        pieces: list[Samples] = []
        count = 0
        for piece in _mono(container, stream, rate):
            count += len(piece)
            if count > (max_seconds + PADDING_S) * rate:
                raise Refusal("long", f"The {{kind}} is longer than {max_seconds:g} s. Send it in parts.")
            pieces.append(resampler.resample_chunk(piece) if resampler else piece)
        if not count:
            raise Refusal("empty", "The {kind} has no samples.")
        if resampler:
            pieces.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
        return pieces


def in_blocks(pieces: list[Samples]) -> Iterator[Samples]:
    """The same samples in blocks of about a megabyte, none of them empty."""
    block: list[Samples] = []
    count = 0
    for number, piece in enumerate(pieces, 1):
        block.append(piece)
        count += len(piece)
        if count and (count >= BLOCK_SAMPLES or number == len(pieces)):
            yield np.concatenate(block)
            block.clear()
            count = 0


def _checked_rate(stream: Any) -> int:
    context = stream.codec_context
    if not MIN_RATE <= context.sample_rate <= MAX_RATE:
        raise Refusal(
            "type", f"The {{kind}} has {context.sample_rate} samples a second; {MIN_RATE} to {MAX_RATE} are taken."
        )
    if not 1 <= context.layout.nb_channels <= MAX_CHANNELS:
        raise Refusal("type", f"The {{kind}} has {context.layout.nb_channels} channels; mono and stereo are taken.")
    return int(context.sample_rate)


def _mono(container: InputContainer, stream: Any, rate: int) -> Iterator[Samples]:
    for frame in _frames(container, stream):
        if frame.sample_rate != rate or frame.layout.nb_channels > MAX_CHANNELS:
            raise Refusal("parse", "The {kind} changes its rate or channels on the way, which is not supported.")
        samples = _as_float(frame)
        if not np.isfinite(samples).all() or np.abs(samples).max(initial=0) > LOUDEST:
            raise damaged()
        yield samples.mean(axis=0, dtype=np.float32)


def _frames(container: InputContainer, stream: Any) -> Iterator[Any]:
    """A few damaged packets are skipped, as players do."""
    bad = 0
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            bad += 1
            if bad > MAX_BAD_PACKETS:
                raise damaged() from None


def _as_float(frame: Any) -> Samples:
    """[channels, samples], full scale 1."""
    raw: NDArray[Any] = frame.to_ndarray()  # planar: [channels, samples]; packed: [1, samples * channels]
    if not frame.format.is_planar:
        raw = raw.reshape(-1, frame.layout.nb_channels).T
    kind = frame.format.name.removesuffix("p")
    if kind not in FULL_SCALE:
        return np.asarray(raw, np.float32)
    zero = 128 if kind == "u8" else 0
    return np.asarray((raw.astype(np.float64) - zero) / FULL_SCALE[kind], np.float32)
