"""Video file -> the sampled frames, upright RGB. Runs in decode workers only.

Two passes: the packets' timestamps first (cheap, and the only count that is believed), then decoding, from key frame
to key frame where the wanted frames lie far apart. Frames leave one by one, so that a video is never whole in here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from numpy.typing import NDArray

from sensorium.media.container import damaged, opened
from sensorium.media.magic import Demuxer
from sensorium.media.sampling import VideoSampling, fitted_size
from sensorium.media.source import Refusal

Pixels = NDArray[np.uint8]
MATRIX_SIZE = 9
MAX_PACKETS = 300_000  # ten minutes at 500 frames a second


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored frame is shown: first `is_transposed`, rows for columns, then mirrored. All eight can be said so."""

    is_transposed: bool = False
    mirrors_x: bool = False
    mirrors_y: bool = False

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """A frame's display matrix: a stored point (p, q) is shown at (a p + c q, b p + d q), plus an offset. What lies
        between quarter turns is taken for the nearest one."""
        found = frame.side_data.get(SideDataType.DISPLAYMATRIX)
        if found is None or len(matrix := np.frombuffer(bytes(found), "<i4")) != MATRIX_SIZE:
            return cls()
        a, b, _, c, d = (int(value) for value in matrix[:5])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, mirrors_x=c < 0, mirrors_y=b < 0)
        return cls(mirrors_x=a < 0, mirrors_y=d < 0)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown of the stored ones, and the other way round."""
        return (width, height) if self.is_transposed else (height, width)

    def apply(self, pixels: Pixels) -> Pixels:
        """[height, width, 3] as stored -> a view of it as shown."""
        shown = pixels.transpose(1, 0, 2) if self.is_transposed else pixels
        return shown[:: -1 if self.mirrors_y else 1, :: -1 if self.mirrors_x else 1]


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What the packets say. `times` are the presentation times of all frames, ascending, in the stream's unit; None
    where the container (AVI) has none that can be trusted and frames are counted instead."""

    frames: int
    duration_s: float
    height: int
    width: int
    orientation: Orientation
    times: list[int] | None
    keys: list[int]  # times of key frames
    unit_s: float

    @property
    def upright(self) -> tuple[int, int]:
        return self.orientation.size(self.height, self.width)

    def time_s(self, index: int) -> float:
        """Of a frame, from the first one on."""
        if self.times is None:
            return index * self.duration_s / self.frames
        return (self.times[index] - self.times[0]) * self.unit_s


@dataclass(frozen=True, slots=True)
class Video:
    """Decoded frames to come, all of one shape."""

    shape: tuple[int, int, int, int]
    timestamps_s: tuple[float, ...]
    frames: Iterator[Pixels]


def inspect_video(payload: bytes, demuxer: Demuxer, max_side: int, max_frame_pixels: int) -> VideoInfo:
    """Reads all packets and decodes one frame, which alone tells size and rotation for sure."""
    with opened(payload, "video", demuxer) as (container, stream):
        _check_size(stream.codec_context, max_side, max_frame_pixels)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise damaged()
        _check_size(frame, max_side, max_frame_pixels)
    with opened(payload, "video", demuxer) as (container, stream):
        return _scan(container, stream, demuxer, frame)


def decode_video(
    payload: bytes,
    demuxer: Demuxer,
    sampling: VideoSampling,
    *,
    max_side: int,
    max_frame_pixels: int,
    max_frames: int,
    max_pixels: int,
) -> Video:
    """Which frames and of what size is known at once; the frames are decoded as they are taken."""
    info = inspect_video(payload, demuxer, max_side, max_frame_pixels)
    indices = sampling.indices(info.frames, info.duration_s, max_frames)
    height, width = fitted_size(*info.upright, len(indices), max_pixels)
    stored = info.orientation.size(height, width)
    return Video(
        (len(indices), height, width, 3),
        tuple(info.time_s(i) for i in indices),
        _frames(payload, demuxer, info, indices, stored),
    )


def _check_size(sized: Any, max_side: int, max_pixels: int) -> None:
    """`max_pixels` are what there is memory for, which may be less than the square."""
    if max(sized.height, sized.width) > max_side or sized.height * sized.width > max_pixels:
        raise Refusal(
            "large", f"The {{kind}}'s frames may have at most {max_side} pixels on a side, and {max_pixels} in all."
        )


def _scan(container: InputContainer, stream: Any, demuxer: Demuxer, first: Any) -> VideoInfo:
    packets = [(packet.pts, packet.is_keyframe) for packet in _packets(container, stream) if not packet.is_discard]
    if not packets:
        raise damaged()
    unit_s = float(stream.time_base)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    times = sorted({pts for pts, _ in packets if pts is not None})
    duration_s = len(packets) / rate
    orientation = Orientation.of(first)
    if demuxer == "avi" or len(times) < len(packets):
        return VideoInfo(len(packets), duration_s, first.height, first.width, orientation, None, [], unit_s)
    if len(times) > 1:
        duration_s = (times[-1] - times[0]) * unit_s * len(times) / (len(times) - 1)
    keys = sorted(pts for pts, is_key in packets if is_key and pts is not None)
    return VideoInfo(len(times), duration_s, first.height, first.width, orientation, times, keys, unit_s)


def _packets(container: InputContainer, stream: Any) -> Iterator[Any]:
    for number, packet in enumerate(container.demux(stream)):
        if number > MAX_PACKETS:
            raise Refusal("long", "The {kind} has too many frames.")
        if packet.size:
            yield packet


def _frames(
    payload: bytes, demuxer: Demuxer, info: VideoInfo, indices: list[int], stored: tuple[int, int]
) -> Iterator[Pixels]:
    """The wanted frames in order, at the stored (height, width) and then as they are shown."""
    with opened(payload, "video", demuxer) as (container, stream):
        found = (
            _counted(container, stream, indices)
            if info.times is None
            else (_timed(container, stream, [info.times[i] for i in indices], info.keys))
        )
        for frame in found:
            if (frame.height, frame.width) != (info.height, info.width):
                raise Refusal("parse", "The {kind}'s frames change their size, which is not supported.")
            small = None if stored == (frame.height, frame.width) else "AREA"
            pixels = frame.to_ndarray(format="rgb24", height=stored[0], width=stored[1], interpolation=small)
            yield info.orientation.apply(pixels)


def _counted(container: InputContainer, stream: Any, indices: list[int]) -> Iterator[Any]:
    """By number, from the beginning on. Where the end comes early the last frame stands in."""
    wanted, last = iter(indices), None
    index = next(wanted, None)
    for number, last in enumerate(container.decode(stream)):
        if number == index:
            yield last
            index = next(wanted, None)
        if index is None:
            return
    yield from _stand_in(last, 1 + sum(1 for _ in wanted))


def _timed(container: InputContainer, stream: Any, times: list[int], keys: list[int]) -> Iterator[Any]:
    """By presentation time; jumps to the last key frame before a wanted one if decoding has not come that far."""
    wanted = frozenset(times)
    frames, frame = _decoded(container, stream, wanted), None
    for number, time in enumerate(times):
        at = bisect_right(keys, time) - 1
        is_ahead = at > 0 and (frame is None or keys[at] > frame.pts)
        if is_ahead:
            container.seek(keys[at], stream=stream, backward=True)
            frames = _decoded(container, stream, wanted)
        if is_ahead or frame is None or frame.pts < time:
            frame = next((new for new in frames if new.pts is not None and new.pts >= time), None) or frame
            if frame is None or frame.pts < time:
                yield from _stand_in(frame, len(times) - number)
                return
        yield frame


def _decoded(container: InputContainer, stream: Any, wanted: frozenset[int]) -> Iterator[Any]:
    """The wanted frames and those that others need; the rest, about half of a usual video, is not decoded at all."""
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted or packet.pts is None else "NONREF"
        yield from packet.decode()


def _stand_in(frame: Any, count: int) -> Iterator[Any]:
    if frame is None:
        raise damaged()
    for _ in range(count):
        yield frame
