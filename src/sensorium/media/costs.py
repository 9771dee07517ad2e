"""How much memory a media item takes at most while it is decoded and processed, told from its header and its length.

Workers are held to it, job by job, and it is summed over all that are decoded at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from sensorium.config import Limits
from sensorium.media.header import ImageHeader
from sensorium.media.source import MediaSize, Refusal, StreamInfo
from sensorium.units import MiB, size_text

FIXED_BYTES = 8 * MiB  # whatever the item
RESULT_BYTES = 3  # of a pixel that has arrived
PROCESSED_BYTES = 11  # of a pixel: it, the library's copy of four bytes, and one that is narrowed already
PROCESSED_FRAME_BYTES = 6  # of a video's pixels, which are processed frame by frame: they and what is made of them
FRAME_BYTES = 32  # of a pixel in a video's decoder: 16 reference frames, and some on the way
SAMPLE_BYTES = 4
MEL_BYTES = 40 * MiB  # of one transform of audio
FRAME_PART = 0.6  # of all memory for media, that one frame's decoder may take


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes: `worker` of the process that decodes, `total` of both at the worst moment."""

    worker: int
    total: int


def image_cost(header: ImageHeader, file_bytes: int) -> Cost:
    pixels = header.width * header.height
    fixed = 2 * file_bytes + FIXED_BYTES
    return Cost(header.decoded_bytes * pixels + fixed, _pixel_bytes(header) * pixels + fixed)


def frame_list_cost(info: StreamInfo, file_bytes: int) -> Cost:
    """Images of one size, decoded one after the other; they may be JPEG files of any kind."""
    area = info.height * info.width
    return _video_cost(16 * area, info.frames * area, file_bytes)


def video_cost(info: StreamInfo, size: MediaSize, file_bytes: int) -> Cost:
    """`size` is that of the frames that are taken, `info` has that of those which are decoded."""
    return _video_cost(FRAME_BYTES * info.height * info.width, size.frames * size.height * size.width, file_bytes)


def audio_cost(samples: int, file_bytes: int) -> Cost:
    worker = 2 * file_bytes + SAMPLE_BYTES * samples + FIXED_BYTES
    processed = 2 * SAMPLE_BYTES * samples + 2 * samples + MEL_BYTES
    return Cost(worker, max(worker + SAMPLE_BYTES * samples, processed))


def inspection_cost(file_bytes: int, frame_pixels: int) -> Cost:
    """Of counting packets, and decoding one frame of a video."""
    worker = 2 * file_bytes + FRAME_BYTES * frame_pixels + FIXED_BYTES
    return Cost(worker, worker)


def most_frame_pixels(limits: Limits) -> int:
    """Of one frame of a video: such a decoder takes most of the memory for media."""
    return min(limits.max_video_side**2, int(FRAME_PART * limits.media_memory) // FRAME_BYTES)


def most_video_pixels(limits: Limits) -> int:
    """Of all frames that are taken from one video; larger ones are scaled down."""
    return min(limits.max_video_pixels, int((1 - FRAME_PART) * limits.media_memory) // PROCESSED_FRAME_BYTES)


def most_pixels(memory_bytes: int) -> int:
    """Of a small file of the usual kind, for which so much memory is enough."""
    return max(memory_bytes - FIXED_BYTES, 0) // PROCESSED_BYTES


def check_image(header: ImageHeader, file_bytes: int, memory_bytes: int) -> None:
    """Refusal of an image that would never fit."""
    if image_cost(header, file_bytes).total <= memory_bytes:
        return
    most = max(memory_bytes - 2 * file_bytes - FIXED_BYTES, 0) // _pixel_bytes(header)
    side = isqrt(most)
    raise Refusal(
        "large",
        f"The {{kind}} has {header.width}x{header.height} pixels, which this server has no memory to decode "
        f"({size_text(memory_bytes)} for media): such a {header.format} file may have at most {most} pixels, "
        f"as {side}x{side} has. Send a smaller one.",
    )


def check_stream(cost: Cost, memory_bytes: int) -> None:
    """The same for a video or audio."""
    if cost.total > memory_bytes:
        raise Refusal(
            "large",
            f"The {{kind}} takes {size_text(cost.total)} to decode, and this server has {size_text(memory_bytes)} for "
            "media. Send a shorter or smaller one.",
        )


def _pixel_bytes(header: ImageHeader) -> int:
    return max(PROCESSED_BYTES, header.decoded_bytes + RESULT_BYTES)


def _video_cost(decoder_bytes: int, pixels: int, file_bytes: int) -> Cost:
    worker = 2 * file_bytes + decoder_bytes + FIXED_BYTES
    return Cost(worker, max(worker + RESULT_BYTES * pixels, PROCESSED_FRAME_BYTES * pixels + FIXED_BYTES))
