"""What the HTTP process and its workers may take, so that a small machine or control group holds all of it together.

The engine sizes its caches itself, of what is free when its weights are there; this is about the rest, and is known
before anything is started. Flags say the most, never the least.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.weight_files import find_weight_files
from sensorium.config import ENCODER_CACHE_BYTES, EngineConfig, Limits, ServeOptions
from sensorium.errors import CheckpointError
from sensorium.media.costs import most_pixels
from sensorium.startup.copies import copies_of
from sensorium.units import MiB, size_text

BASE_BYTES = 320 * MiB  # of all processes before they do anything
LEAST_PART = 8  # a part of what is free that is there in any case: weights may lie on a GPU, or come out smaller
MEDIA_PART, BODIES_PART = 0.3, 0.08  # of what is left; a body is there about three times while it is taken apart
PROMPTS_PART = 0.08
LEAST_MEDIA_BYTES, LEAST_BODIES_BYTES = 48 * MiB, 8 * MiB
BYTES_PER_WORKER = 256 * MiB  # of memory for media, from which a second decoder is worth its own

ENGINE_BASE_BYTES = 320 * MiB  # of an engine's process before it has weights
CACHE_PART, LEAST_CACHE_BYTES = 4, 64 * MiB  # a part of what is left is the KV cache
ENCODED_PART = 8
_TYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUANTIZED_BYTES = {"int8": 1.1, "fp8": 1.1, "int4": 0.65}

log = logging.getLogger("sensorium")


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """`engine` with caches sized for a share of memory, and what it takes in all; of that the KV cache."""

    engine: EngineConfig
    weight_bytes: int
    engine_bytes: int
    cache_bytes: int


def budget_of(free_bytes: int) -> int:
    """What the engines of several models may take of free memory: it leaves the rest what it needs to do anything."""
    return max(free_bytes - BASE_BYTES - free_bytes // LEAST_PART, free_bytes // 2)


def fitted(
    options: ServeOptions, folders: Iterable[Path], free_bytes: int, engines_bytes: int | None = None
) -> ServeOptions:
    """The same options with limits that `free_bytes` hold beside the models in `folders`, or beside `engines_bytes`
    where that is said."""
    weights = (file for folder in folders for file in find_weight_files(folder))
    taken = _files_bytes(weights) if engines_bytes is None else engines_bytes
    spare = max(free_bytes - BASE_BYTES - taken, free_bytes // LEAST_PART)
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
        prompt_memory=min(limits.prompt_memory, int(PROMPTS_PART * spare_bytes)),
        max_pending_bytes=bodies,
        max_body_bytes=min(limits.max_body_bytes, bodies),
        max_upload_bytes=min(limits.max_upload_bytes, bodies),
        max_image_bytes=min(limits.max_image_bytes, media // 4),
        max_audio_bytes=min(limits.max_audio_bytes, media // 4),
        max_video_bytes=min(limits.max_video_bytes, media // 8),
        max_image_pixels=min(limits.max_image_pixels, most_pixels(media)),
    )


def engine_plan(
    engine: EngineConfig,
    checkpoint: Checkpoint,
    budget_bytes: int | None,
    adapter_bytes: int = 0,
    draft: Checkpoint | None = None,
) -> EnginePlan:
    """What a model's engine will take of the memory that all share. Without a budget the engine decides when its
    weights are there; with one its caches are sized here, so that it is known before it is started. `adapter_bytes`:
    of the adapters that it has from the start. They leave less for caches; what they take is counted with them.
    `draft`: the model that guesses for it, in the same process and cache memory."""
    weights = _weight_bytes(engine, checkpoint) + (0 if draft is None else _weight_bytes(engine, draft))
    ranks = engine.tensor_parallel_size  # each has its part of weights and cache, in a process of its own
    weights += _copied_bytes(engine, checkpoint)
    base = ranks * ENGINE_BASE_BYTES
    if budget_bytes is None:
        return EnginePlan(engine, weights, weights + base, 0)
    spare = max(budget_bytes - weights - base - adapter_bytes, 0)
    stated = 0 if checkpoint.family.encoder is not None else engine.kv_cache_memory
    cache = ranks * stated if stated is not None else max(spare // CACHE_PART, LEAST_CACHE_BYTES)
    has_media = bool(checkpoint.family.modalities)
    wanted = ENCODER_CACHE_BYTES if engine.encoder_cache_memory is None else engine.encoder_cache_memory
    encoded = min(wanted, max(spare // ENCODED_PART, 1)) if has_media else 0
    engine = replace(
        engine,
        kv_cache_memory=cache // ranks or engine.kv_cache_memory,
        encoder_cache_memory=encoded or engine.encoder_cache_memory,
    )
    return EnginePlan(engine, weights, weights + base + cache + encoded, cache)


def _weight_bytes(engine: EngineConfig, checkpoint: Checkpoint) -> int:
    """In memory."""
    files = (*checkpoint.weight_files, *checkpoint.text_weight_files)
    return int(_files_bytes(files) * _weights_part(engine, checkpoint))


def _copied_bytes(engine: EngineConfig, checkpoint: Checkpoint) -> int:
    """What several ranks have of the same weights in memory, but for the first of them. Towers stay as they are."""
    ranks, text = engine.tensor_parallel_size, checkpoint.text
    if ranks == 1 or text is None:
        return 0
    found, part, stored = copies_of(checkpoint), _weights_part(engine, checkpoint), _TYPE_BYTES[checkpoint.dtype]
    towers = found.towers * _TYPE_BYTES.get(engine.dtype, stored) / stored
    keys = max(ranks / text.num_kv_heads - 1, 0) * found.keys * part
    return int((ranks - 1) * (towers + found.decoder * part) + keys)


def _weights_part(engine: EngineConfig, checkpoint: Checkpoint) -> float:
    """Bytes in memory for a byte of the files."""
    stored = _TYPE_BYTES.get(checkpoint.dtype, 2)
    if checkpoint.quantization is not None:
        return checkpoint.quantization.memory_part
    if engine.quantization in _QUANTIZED_BYTES:
        return _QUANTIZED_BYTES[engine.quantization] / stored
    return _TYPE_BYTES.get(engine.dtype, stored) / stored


def _files_bytes(files: Iterable[Path]) -> int:
    try:
        return sum(file.stat().st_size for file in files)
    except (CheckpointError, OSError):  # the engine says what is wrong with them
        return 0
