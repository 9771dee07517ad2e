"""InternVL's squares and frames: golden counts, pixels as transformers' processor has them, what stands in prompts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import WordTokenizer, noise, pixels_of, record
from transformers import GotOcr2ImageProcessorPil

from sensorium.errors import RequestError, StartupError
from sensorium.processors.internvl import InternVLProcessor
from sensorium.prompt.tokenizer import Tokenizer

TOKENS = {"<s>": 1, "<img>": 5001, "</img>": 5002, "<IMG_CONTEXT>": 5003}
MEANS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def internvl(side: int = 448, tokens: dict[str, int] = TOKENS, **overrides: Any) -> InternVLProcessor:
    config = {"vision_config": {"image_size": [side, side], "patch_size": [14, 14]}}
    return InternVLProcessor(record(config, MEANS), cast(Tokenizer, WordTokenizer(tokens)), overrides)


@pytest.mark.parametrize(
    ("width", "height", "rows"),
    [
        (448, 448, 256),
        (640, 480, 3328),
        (1024, 768, 3328),
        (1280, 720, 2304),
        (1200, 300, 1280),
        (2000, 50, 3328),
        (333, 777, 2816),
        (1540, 1540, 2560),
        (3840, 2160, 2304),
    ],
)
def test_golden_counts(width: int, height: int, rows: int) -> None:
    """transformers 5.24's with 1 to 12 squares of 448; and two tokens around them."""
    assert internvl().num_tokens("image", height, width) == rows + 2
    assert internvl(max_dynamic_patch=1).num_tokens("image", height, width) == 256 + 2


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    fewest=st.integers(1, 4),
    most=st.integers(4, 9),
    seed=st.integers(0, 9),
)
def test_pixels_equal_transformers(height: int, width: int, fewest: int, most: int, seed: int) -> None:
    item = noise(height, width, seed=seed)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=fewest, max_patches=most, **MEANS
    )([item.data], return_tensors="np", input_data_format="channels_last")["pixel_values"]
    processor = internvl(28, min_patches=fewest, max_patches=most)
    made = processor.process(item)
    np.testing.assert_allclose(pixels_of(made), theirs, atol=1e-5)
    assert processor.prompt_tokens(made) == processor.num_tokens("image", height, width) == len(theirs) + 2


def test_what_stands_in_prompts() -> None:
    """Frames of a video are numbered; items come in the order of their kind's markers."""
    processor = internvl(28)
    media = [processor.process(item) for item in (noise(28, 28, frames=2), noise(28, 56), noise(10, 10))]
    prompt = processor.build("<IMG_CONTEXT>\n<video>a<IMG_CONTEXT>", media)
    text = "".join(chr(i) if i < 5000 else {5001: "[", 5002: "]", 5003: "*"}[i] for i in prompt.token_ids.tolist())
    assert text == "[***]\nFrame1: [*]\nFrame2: [*]a[*]"
    assert [(span.item, span.row) for span in prompt.spans] == [(1, 0), (0, 0), (0, 1), (2, 0)]
    assert processor.prompt_tokens(media[0]) == processor.num_tokens("video", 28, 28, 2) == 2 + 21
    with pytest.raises(RequestError, match="2 image placeholder"):
        processor.build("<IMG_CONTEXT><IMG_CONTEXT>", media[1:2])
    assert processor.video_sampling().indices(80, 4.0, 100) == [5, 15, 25, 35, 45, 55, 65, 75]


def test_a_tokenizer_without_the_token_is_refused() -> None:
    with pytest.raises(StartupError, match="<IMG_CONTEXT>"):
        internvl(tokens={"<s>": 1})
