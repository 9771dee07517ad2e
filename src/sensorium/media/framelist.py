"""`data:video/jpeg;base64,…,…`: a video as a list of JPEG images. Frames are counted before anything is split."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Self

from sensorium.media.header import read_header
from sensorium.media.inline import decode_base64
from sensorium.media.source import Refusal
from sensorium.units import size_text

MEDIA_TYPE = "video/jpeg"
LENGTH = struct.Struct("<I")


class FrameList(bytes):
    """Images' bytes, each behind its length. Its type alone says what it is: no name that a client gives does."""

    formats = ("JPEG",)

    @classmethod
    def of(cls, frames: Sequence[bytes]) -> Self:
        return cls(b"".join(piece for frame in frames for piece in (LENGTH.pack(len(frame)), frame)))

    @property
    def frames(self) -> list[bytes]:
        return frames_of(self)


class LosslessFrames(FrameList):
    """What a Python program gives as arrays."""

    formats = ("PNG",)


def read_frame_list(text: str, max_frames: int, max_bytes: int) -> FrameList:
    """Base64 images joined by commas."""
    count = text.count(",") + 1
    if count > max_frames:
        raise Refusal("long", f"The {{kind}} has {count} frames; at most {max_frames} are taken.")
    frames, left = [], max_bytes
    for part in text.split(","):
        if not part.strip():
            raise Refusal("base64", "The {kind}'s frame list has an empty frame.")
        frame = decode_base64(part, max(left, 1))
        left -= len(frame)
        if left < 0:
            raise Refusal("file_size", f"The {{kind}}'s frames are larger than {size_text(max_bytes)} in all.")
        frames.append(frame)
    return FrameList.of(frames)


def frames_of(packed: bytes) -> list[bytes]:
    frames, offset = [], 0
    while offset < len(packed):
        (length,) = LENGTH.unpack_from(packed, offset)
        frames.append(packed[offset + LENGTH.size : offset + LENGTH.size + length])
        offset += LENGTH.size + length
    return frames


def frame_list_size(packed: FrameList) -> tuple[int, int, int]:
    """(frames, height, width), all frames of one size and of the format that they must have."""
    headers = [read_header(frame) for frame in packed.frames]
    if any(header.format not in packed.formats for header in headers):
        raise Refusal("type", f"The {{kind}}'s frame list must hold {' or '.join(packed.formats)} images.")
    if len({header.upright for header in headers}) > 1:
        raise Refusal("parse", "The {kind}'s frames must all have one size.")
    return len(headers), *headers[0].upright
