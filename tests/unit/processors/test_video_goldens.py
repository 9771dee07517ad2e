"""Pixels of videos against transformers' video processors: grids, counts, sums, and sums in which every place counts.

The numbers are those of transformers 5.24's classes, run once over torch's own resizing, since the classes do not start
without torchvision; LLaVA-OneVision's sum of `test_llava_onevision.py`, made with torchvision, came out the same to its
last digit. Frames here are resized by PIL as pictures are, which differs from torch by two of 255 levels at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.image_families import CLIP, QWEN_FILE, QWEN_TOKENS, normalised, record, word_tokenizer
from support.smolvlm import FILE, SPECIALS, TILES

from sensorium.checkpoint.families import FAMILIES
from sensorium.processors.base import Processor
from sensorium.processors.internvl import InternVLProcessor
from sensorium.processors.llava_onevision import LlavaOnevisionProcessor
from sensorium.processors.qwen2_5_vl import Qwen25VLProcessor
from sensorium.processors.qwen3_vl import Qwen3VLProcessor
from sensorium.processors.smolvlm import SmolVLMProcessor
from sensorium.types import MediaItem

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
INTERNVL = {"<s>": 1, "<img>": 5001, "</img>": 5002, "<IMG_CONTEXT>": 5003}


def qwen2_5_vl() -> Processor:
    return Qwen25VLProcessor(record({}, QWEN_FILE), word_tokenizer(QWEN_TOKENS))


def qwen3_vl() -> Processor:
    images = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, **HALF}
    videos = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, **HALF}
    return Qwen3VLProcessor(replace(record({}, images), video_preprocessor=videos), word_tokenizer(QWEN_TOKENS))


def llava_onevision() -> Processor:
    vision = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
    config = {**FAMILIES["LlavaOnevisionForConditionalGeneration"].defaults, "vision_config": vision}
    file = {**CLIP, "size": {"height": 384, "width": 384}, "resample": 3}
    return LlavaOnevisionProcessor(
        record(config, file), word_tokenizer({"<s>": 1, "<image>": 151646, "<video>": 151647})
    )


def internvl() -> Processor:
    config = {"vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}}
    return InternVLProcessor(record(config, IMAGENET), word_tokenizer(INTERNVL))


def smolvlm() -> Processor:
    config = {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4}
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}
    file = {**FILE, "max_image_size": {"longest_edge": 512}, "video_sampling": sampling}
    return SmolVLMProcessor(
        record(config, file), word_tokenizer({token: i for i, token in enumerate(("<s>", *SPECIALS, *TILES))})
    )


MAKERS: dict[str, Callable[[], Processor]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "smolvlm": smolvlm,
}


def clip(frames: int, height: int, width: int) -> MediaItem:
    """Noise of middle brightness: none of it is cut off between two passes of resizing."""
    data = np.random.default_rng(frames).integers(64, 192, (frames, height, width, 3), dtype=np.uint8)
    times = tuple(i / 2 for i in range(frames))
    return MediaItem("video", data, b"", param="messages[0]", timestamps_s=times, duration_s=frames / 2)


def sums(pixels: np.ndarray) -> tuple[float, float]:
    """Of all values, and of all by the cosines of their places."""
    flat = pixels.astype(np.float64).ravel()
    return float(flat.sum()), float(flat @ np.cos(np.arange(len(flat))))


GOLDENS: dict[str, dict[tuple[int, int, int], tuple[int, float, float]]] = {
    "qwen2_5_vl": {(5, 240, 320): (420, 369572.946, -539.391), (3, 48, 200): (288, 254254.738, 21.040)},
    "qwen3_vl": {(5, 240, 320): (240, -564.345, -316.075), (3, 48, 200): (24, -6.133, 2.732)},
    "llava_onevision": {(5, 240, 320): (981, 413853.535, -552.107), (3, 48, 200): (589, 249707.349, 52.358)},
    "internvl": {(5, 240, 320): (1280, 679797.054, -22.663), (3, 48, 200): (768, 410037.059, 4.304)},
    "smolvlm": {(5, 240, 320): (320, -1383.890, 1.679), (3, 48, 200): (192, 470.753, 8.790)},
}


@pytest.mark.parametrize(("family", "size"), [(family, size) for family, some in GOLDENS.items() for size in some])
def test_pixels_of_videos(family: str, size: tuple[int, int, int]) -> None:
    processor = MAKERS[family]()
    made = processor.process(clip(*size))
    pixels = normalised(made.arrays) if family.startswith("qwen") else made.arrays["pixels"]
    rows, total, placed = GOLDENS[family][size]
    assert made.num_rows == rows
    level = 1 / 255 / 0.224  # of the brightest channel
    got_total, got_placed = sums(pixels)
    assert got_total == pytest.approx(total, abs=0.005 * level * pixels.size)
    assert got_placed == pytest.approx(placed, abs=0.2 * level * pixels.size**0.5)
