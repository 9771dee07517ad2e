"""What the HTTP process and its workers may take, so that a small machine or control group holds all of it together.

The engine sizes its caches itself, of what is free when its weights are there; this is about the rest, and is known
before anything is started. Flags say the most, never the least.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sensorium.checkpoint.weight_files import find_weight_files
from sensorium.config import Limits, ServeOptions
from sensorium.errors import CheckpointError
from sensorium.media.costs import most_pixels
from sensorium.units import MiB, size_text

BASE_BYTES = 320 * MiB  # of all processes before they do anything
LEAST_PART = 8  # a part of what is free that is there in any case: weights may lie on a GPU, or come out smaller
MEDIA_PART, BODIES_PART = 0.3, 0.08  # of what is left; a body is there about three times while it is taken apart
LEAST_MEDIA_BYTES, LEAST_BODIES_BYTES = 48 * MiB, 8 * MiB
BYTES_PER_WORKER = 256 * MiB  # of memory for media, from which a second decoder is worth its own

log = logging.getLogger("sensorium")


def fitted(options: ServeOptions, folders: Iterable[Path], free_bytes: int) -> ServeOptions:
    """The same options with limits that `free_bytes` hold beside the models in `folders`."""
    spare = max(free_bytes - BASE_BYTES - _weights_bytes(folders), free_bytes // LEAST_PART)
    limits = fitted_limits(options.limits, spare)
    workers = min(options.server.media_workers, max(limits.media_memory // BYTES_PER_WORKER, 1))
    if limits != options.limits:
        log.info(
            "%s of memory are free: media may take %s (an image up to %.1f megapixels), requests' bodies %s",
            size_text(free_bytes),
            size_text(limits.media_memory),
            limits.max_image_pixels / 1e6,
            size_text(limits.max_pending_bytes),
        )
    return replace(options, limits=limits, server=replace(options.server, media_workers=workers))


def fitted_limits(limits: Limits, spare_bytes: int) -> Limits:
    media = min(limits.media_memory, max(int(MEDIA_PART * spare_bytes), LEAST_MEDIA_BYTES))
    bodies = min(limits.max_pending_bytes, max(int(BODIES_PART * spare_bytes), LEAST_BODIES_BYTES))
    return replace(
        limits,
        media_memory=media,
        max_pending_bytes=bodies,
        max_body_bytes=min(limits.max_body_bytes, bodies),
        max_upload_bytes=min(limits.max_upload_bytes, bodies),
        max_image_bytes=min(limits.max_image_bytes, media // 4),
        max_audio_bytes=min(limits.max_audio_bytes, media // 4),
        max_video_bytes=min(limits.max_video_bytes, media // 8),
        max_image_pixels=min(limits.max_image_pixels, most_pixels(media)),
    )


def _weights_bytes(folders: Iterable[Path]) -> int:
    try:
        return sum(file.stat().st_size for folder in folders for file in find_weight_files(folder))
    except (CheckpointError, OSError):  # the engine says what is wrong with them
        return 0
