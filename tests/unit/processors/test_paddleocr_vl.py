"""PaddleOCR-VL's images: golden counts and sums, pixels as transformers' processor has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import CLIP, noise, normalised, record, word_tokenizer
from transformers import PaddleOCRVLImageProcessorPil

from sensorium.errors import MediaError, UnsupportedModalityError
from sensorium.processors.paddleocr_vl import PaddleOCRVLProcessor

TOKENS = {"<s>": 1, "<|IMAGE_START|>": 101305, "<|IMAGE_END|>": 101306, "<|IMAGE_PLACEHOLDER|>": 100295}
SMALL = {"size": {"shortest_edge": 3136, "longest_edge": 30000}}


def paddle(file: dict[str, Any] | None = None) -> PaddleOCRVLProcessor:
    return PaddleOCRVLProcessor(record({}, {**CLIP, **(file or {})}), word_tokenizer(TOKENS))


@pytest.mark.parametrize(
    ("width", "height", "grid", "total"),
    [
        (16, 16, (28, 28), 68180.808),
        (448, 448, (32, 32), None),
        (640, 480, (34, 46), 171428.944),
        (1280, 720, (52, 92), None),
        (2000, 50, (6, 174), 112503.422),
        (333, 777, (56, 24), 146781.37),
        (1540, 1540, (108, 108), None),
        (3840, 2160, (82, 146), None),
    ],
)
def test_goldens(width: int, height: int, grid: tuple[int, int], total: float | None) -> None:
    processor = paddle()
    assert processor.num_tokens("image", height, width) == grid[0] * grid[1] // 4
    if total is not None:
        made = processor.process(noise(height, width))
        assert made.arrays["grid"].tolist() == [1, *grid]
        assert normalised(made.arrays).sum(dtype=np.float64) == pytest.approx(total, abs=0.5)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(2, 200), width=st.integers(2, 200))
def test_pixels_equal_transformers(height: int, width: int) -> None:
    """Theirs are line by line, ours block by block."""
    item = noise(height, width)
    theirs = PaddleOCRVLImageProcessorPil(**CLIP, **SMALL)(
        item.data, return_tensors="np", input_data_format="channels_last"
    )
    made = paddle(SMALL).process(item)
    _, lines, columns = made.arrays["grid"].tolist()
    assert [[1, lines, columns]] == theirs["image_grid_thw"].tolist()
    blocks = normalised(made.arrays).reshape(lines // 2, columns // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4)
    np.testing.assert_allclose(blocks.reshape(theirs["pixel_values"].shape), theirs["pixel_values"], atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(UnsupportedModalityError, match="takes no video"):
        paddle().process(noise(56, 56, frames=2))
    with pytest.raises(MediaError, match="too narrow"):
        paddle().num_tokens("image", 5, 2000)
