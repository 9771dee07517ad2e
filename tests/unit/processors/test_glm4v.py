"""GLM-4.1V's images: golden counts, sums and positions, pixels as transformers' processor has them, no videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import CLIP, noise, normalised, record, word_tokenizer
from transformers import Glm4vImageProcessorPil

from sensorium.errors import MediaError, UnsupportedModalityError
from sensorium.processors.glm4v import Glm4VProcessor

TOKENS = {"<s>": 1, "<|begin_of_image|>": 151339, "<|end_of_image|>": 151340, "<|image|>": 151343}
SMALL = {"size": {"shortest_edge": 12544, "longest_edge": 60000}}


def glm(file: dict[str, Any] | None = None, **overrides: Any) -> Glm4VProcessor:
    return Glm4VProcessor(record({}, {**CLIP, **(file or {})}), word_tokenizer(TOKENS), overrides)


@pytest.mark.parametrize(
    ("width", "height", "grid", "total"),
    [
        (16, 16, (6, 6), 6264.505),
        (100, 100, (8, 8), 14139.852),
        (640, 480, (34, 46), 342857.888),
        (1280, 720, (52, 92), None),
        (1200, 300, (22, 86), 415461.133),
        (2000, 50, (4, 142), 122418.24),
        (333, 777, (56, 24), 293562.74),
        (3840, 2160, (128, 230), None),
    ],
)
def test_goldens(width: int, height: int, grid: tuple[int, int], total: float | None) -> None:
    """transformers 5.24's, which shows the tower every image twice."""
    processor = glm()
    assert processor.num_tokens("image", height, width) == grid[0] * grid[1] // 4
    if total is not None:
        made = processor.process(noise(height, width))
        assert made.arrays["grid"].tolist() == [1, *grid]
        assert 2 * normalised(made.arrays).sum(dtype=np.float64) == pytest.approx(total, abs=0.5)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(10, 300), width=st.integers(10, 300))
def test_pixels_equal_transformers(height: int, width: int) -> None:
    item = noise(height, width)
    theirs = Glm4vImageProcessorPil(**CLIP, **SMALL)(item.data, return_tensors="np", input_data_format="channels_last")
    made = glm(SMALL).process(item)
    assert made.arrays["grid"].tolist() == theirs["image_grid_thw"][0].tolist()
    ours = normalised(made.arrays).reshape(-1, 3, 1, 196).repeat(2, axis=2)
    np.testing.assert_allclose(ours.reshape(len(ours), -1), theirs["pixel_values"], atol=1e-5)


def test_positions() -> None:
    """Golden: two images of 3 x 2 and 2 x 5 rows."""
    processor = glm({"size": {"shortest_edge": 1000, "longest_edge": 60000}})
    media = [processor.process(noise(lines * 28, columns * 28)) for lines, columns in ((3, 2), (2, 5))]
    shown = "<|begin_of_image|><|image|><|end_of_image|>"
    prompt = processor.build(f"ab{shown}cd{shown}ef", media)
    assert prompt.positions is not None
    t, h, w = prompt.positions.tolist()
    assert t == [0, 1, 2, *[3] * 6, 6, 7, 8, 9, *[10] * 10, 15, 16, 17]
    assert (h[3:9], w[3:9]) == ([3, 3, 4, 4, 5, 5], [3, 4, 3, 4, 3, 4])


def test_refusals() -> None:
    with pytest.raises(UnsupportedModalityError, match="takes no video"):
        glm().process(noise(56, 56, frames=2))
    with pytest.raises(MediaError, match="too narrow"):
        glm().num_tokens("image", 5, 2000)
