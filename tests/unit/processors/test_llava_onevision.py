"""LLaVA-OneVision: golden counts, pixels as transformers' processor has them, videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import CLIP, noise, pixels_of, record, word_tokenizer
from support.llava_onevision import FILE
from transformers import LlavaOnevisionImageProcessorPil

from sensorium.checkpoint.families import FAMILIES
from sensorium.errors import CheckpointError
from sensorium.processors.llava_onevision import LlavaOnevisionProcessor

TOKENS = {"<s>": 1, "<image>": 151646, "<video>": 151647}
DEFAULTS = FAMILIES["LlavaOnevisionForConditionalGeneration"].defaults


def onevision(side: int = 384, file: dict[str, Any] | None = None, **config: Any) -> LlavaOnevisionProcessor:
    vision = {"model_type": "siglip_vision_model", "image_size": side, "patch_size": 14 if side == 384 else 9}
    file = {**CLIP, "size": {"height": side, "width": side}, "resample": 3, **(file or {})}
    return LlavaOnevisionProcessor(
        record({**DEFAULTS, "vision_config": vision, **config}, file), word_tokenizer(TOKENS)
    )


@pytest.mark.parametrize(
    ("width", "height", "tokens", "total"),
    [
        (16, 16, 1485, 130878.649),
        (448, 448, 3699, None),
        (640, 480, 2929, None),
        (1024, 768, 4725, None),
        (1280, 720, 5967, None),
        (1200, 300, 3672, 412977.421),
        (2000, 50, 1544, None),
        (333, 777, 2493, -220032.423),
        (1540, 1540, 7209, None),
        (3840, 2160, 7317, None),
    ],
)
def test_goldens(width: int, height: int, tokens: int, total: float | None) -> None:
    """transformers 5.24's of one image; the sum of its pixels."""
    assert onevision().num_tokens("image", height, width) == tokens
    if total is not None:
        made = onevision().process(noise(height, width))
        assert made.num_rows == tokens
        assert pixels_of(made).sum(dtype=np.float64) == pytest.approx(total, abs=1)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(2, 120), width=st.integers(2, 120))
def test_pixels_equal_transformers(height: int, width: int) -> None:
    item = noise(height, width)
    theirs = LlavaOnevisionImageProcessorPil(**FILE)(item.data, return_tensors="np", input_data_format="channels_last")
    made = onevision(28, FILE).process(item)
    np.testing.assert_allclose(pixels_of(made), theirs["pixel_values"][0], atol=1e-5)


def test_several_images_are_squares() -> None:
    items = [noise(60, 33), noise(10, 90), noise(28, 28)]
    theirs = LlavaOnevisionImageProcessorPil(**FILE)(
        [[item.data for item in items]], return_tensors="np", input_data_format="channels_last"
    )
    alone = onevision(28, FILE)
    together = alone.with_overrides(alone.implied(["image", "video", "image", "image"]))
    for item, pixels in zip(items, theirs["pixel_values"], strict=True):
        made = together.process(item)
        np.testing.assert_allclose(pixels_of(made), pixels, atol=1e-5)
        assert made.num_rows == together.num_tokens("image", *item.data.shape[:2]) == 9 + 1
        assert made.key != alone.process(item).key
    assert alone.implied(["image", "video"]) == {}
    assert alone.with_overrides({"tiles": True}).implied(["image", "image"]) == {}
    assert onevision().with_overrides({"tiles": False}).num_tokens("image", 480, 640) == 730


def test_videos() -> None:
    processor = onevision()
    media = [processor.process(noise(24, 32, frames=8)), processor.process(noise(16, 16))]
    assert media[0].num_rows == processor.num_tokens("video", 24, 32, 8) == 1569
    assert media[0].arrays["pixels"].shape == (8, 3, 384, 384)
    prompt = processor.build("<image>a<video>", media)
    assert [(span.item, span.length) for span in prompt.spans] == [(1, 1485), (0, 1569)]
    assert {int(prompt.token_ids[span.offset]) for span in prompt.spans} == {151646, 151647}
    assert len(processor.video_sampling().indices(900, 30, 128)) == 32
    faster = processor.with_overrides({"fps": 2.0})
    assert faster.video_sampling().indices(90, 3, 128) == [0, 17, 35, 53, 71, 89]


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="vision_aspect_ratio 'pad'"):
        onevision(vision_aspect_ratio="pad")
