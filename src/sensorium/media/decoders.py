"""What each role of worker can do: job name -> decoder. The job's fields were checked by the parent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoder's answer: a record for the parent and, unless `shape` is None, the array in pieces."""

    record: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    dtype: str = "uint8"
    pieces: Iterable[NDArray[np.generic]] = ()


Decoder = Callable[[bytes, dict[str, Any]], Decoded]


def decoders_for(role: str) -> dict[str, Decoder]:
    """Imports everything that a job of this role can need, for later the worker can open no file."""
    if role == "image":
        return _image_decoders()
    if role == "stream":
        return _stream_decoders()
    raise ValueError(role)


def _image_decoders() -> dict[str, Decoder]:
    from sensorium.media.framelist import frames_of
    from sensorium.media.image import decode_image

    def image(payload: bytes, job: dict[str, Any]) -> Decoded:
        found = decode_image(payload, job["max_pixels"])
        return Decoded(shape=(found.height, found.width, 3), pieces=found.strips)

    def frames(payload: bytes, job: dict[str, Any]) -> Decoded:
        images = frames_of(payload)
        max_pixels = job["max_pixels"] // len(images)
        return Decoded(
            shape=(len(images), job["height"], job["width"], 3),
            pieces=(strip for image in images for strip in decode_image(image, max_pixels).strips),
        )

    return {"image": image, "frames": frames}


def _stream_decoders() -> dict[str, Decoder]:
    from sensorium.media.audio import decode_audio, in_blocks, inspect_audio
    from sensorium.media.sampling import VideoSampling
    from sensorium.media.video import decode_video, inspect_video

    def video_info(payload: bytes, job: dict[str, Any]) -> Decoded:
        info = inspect_video(payload, job["demuxer"], job["max_side"], job["max_frame_pixels"])
        height, width = info.upright
        return Decoded({"frames": info.frames, "duration_s": info.duration_s, "height": height, "width": width})

    def video(payload: bytes, job: dict[str, Any]) -> Decoded:
        frames = decode_video(
            payload,
            job["demuxer"],
            VideoSampling(**job["sampling"]),
            max_side=job["max_side"],
            max_frame_pixels=job["max_frame_pixels"],
            max_frames=job["max_frames"],
            max_pixels=job["max_pixels"],
        )
        return Decoded({"timestamps_s": frames.timestamps_s}, frames.shape, pieces=frames.frames)

    def audio_info(payload: bytes, job: dict[str, Any]) -> Decoded:
        return Decoded({"duration_s": inspect_audio(payload, job["demuxer"]).duration_s})

    def audio(payload: bytes, job: dict[str, Any]) -> Decoded:
        pieces = decode_audio(payload, job["demuxer"], job["sample_rate"], job["max_seconds"])
        return Decoded(shape=(sum(map(len, pieces)),), dtype="float32", pieces=in_blocks(pieces))

    return {"video_info": video_info, "video": video, "audio_info": audio_info, "audio": audio}
