"""Videos and sounds for the tests, made with PyAV's encoders: frames of known grey values, tones of known pitch."""

from __future__ import annotations

import io
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import av
import numpy as np

VALUES = 8 * np.arange(32)  # of consecutive frames, then again from the start


@contextmanager
def usual_priority() -> Iterator[None]:
    """SVT-AV1 makes the thread that calls it a real-time one where it may. All processes that are started from there
    inherit that, and as many of them as there are cores, in loops, leave nobody else any time."""
    if sys.platform != "linux":
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def video(
    codec: str = "libx264",
    container: str = "mp4",
    *,
    frames: int = 30,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    pixel_format: str = "yuv420p",
    gop: int | None = None,
    turn: int = 0,
    draw: Callable[[int], np.ndarray] | None = None,
    **options: str,
) -> bytes:
    """`size` is (width, height). Frame i is filled with VALUES[i % 32] unless `draw` gives its pixels."""
    buffer = io.BytesIO()
    with usual_priority(), av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt, stream.options = pixel_format, dict(options)
        if codec != "libsvtav1":  # has its own idea of rates
            stream.codec_context.bit_rate = 4_000_000
        if gop:
            stream.codec_context.gop_size = gop
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            pixels = draw(number) if draw else np.full((size[1], size[0], 3), VALUES[number % 32], np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(stream.encode())
    return buffer.getvalue()


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def sound(
    samples: np.ndarray,
    rate: int,
    codec: str = "pcm_s16le",
    container: str = "wav",
    sample_format: str = "s16",
    **options: str,
) -> bytes:
    """`samples` float [count] or [channels, count], full scale 1."""
    channels = np.atleast_2d(samples)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(channels)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.format, stream.options = av.AudioFormat(sample_format), dict(options)
        resampler = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
        step = 4096 if container == "wav" else stream.codec_context.frame_size or 1024
        for start in range(0, channels.shape[1], step):
            part = np.ascontiguousarray(channels[:, start : start + step], np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            for converted in resampler.resample(frame):
                output.mux(stream.encode(converted))
        output.mux(stream.encode())
    return buffer.getvalue()


def wav(
    data: bytes, *, rate: int = 16000, channels: int = 1, bits: int = 16, tag: int = 1, claimed: int | None = None
) -> bytes:
    """A header by hand, to say what no encoder would."""
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", tag, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    size = len(data) if claimed is None else claimed
    return (
        b"RIFF"
        + struct.pack("<I", min(36 + size, 0xFFFFFFFF))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + struct.pack("<I", size)
        + data
    )


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The boxes of an MP4 file or of a container box: (type, body)."""
    found, offset = [], 0
    while offset + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        found.append((kind, data[offset + 8 : offset + size]))
        offset += size
    return found


def replaced(data: bytes, path: list[bytes], change: Callable[[bytes], bytes]) -> bytes:
    """The same boxes with the body of the box at `path` changed; all sizes on the way are right again."""
    out = b""
    for kind, body in boxes(data):
        new = body
        if kind == path[0]:
            new = change(body) if len(path) == 1 else replaced(body, path[1:], change)
        out += struct.pack(">I4s", len(new) + 8, kind) + new
    return out


def with_matrix(payload: bytes, matrix: tuple[float, float, float, float]) -> bytes:
    """An MP4 with another display matrix: a, b, c, d of its track header."""

    def change(header: bytes) -> bytes:
        at = 40 if header[0] == 0 else 52  # behind times of 4 or 8 bytes
        a, b, c, d = (round(value * 65536) for value in matrix)
        return header[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + header[at + 36 :]

    return replaced(payload, [b"moov", b"trak", b"tkhd"], change)
