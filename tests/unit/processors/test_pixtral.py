"""Mistral 3's and Pixtral's images: sizes, pixels as transformers' processor has them, lines and their ends."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import CLIP, WordTokenizer, noise, record
from transformers import PixtralImageProcessorPil

from sensorium.errors import RequestError, StartupError
from sensorium.processors.pixtral import Mistral3Processor, PixtralProcessor
from sensorium.prompt.tokenizer import Tokenizer

TOKENS = {"<s>": 1, "[IMG]": 10, "[IMG_BREAK]": 12, "[IMG_END]": 13}
SMALL = {"image_token_index": 10, "spatial_merge_size": 2, "vision_config": {"patch_size": 14, "image_size": 1540}}
PIXTRAL = {"image_token_index": 10, "vision_config": {"patch_size": 16, "image_size": 1024}}


def mistral3(tokens: dict[str, int] = TOKENS, **overrides: Any) -> Mistral3Processor:
    return Mistral3Processor(record(SMALL, CLIP), cast(Tokenizer, WordTokenizer(tokens)), overrides)


def pixtral() -> PixtralProcessor:
    file = {**CLIP, "size": {"longest_edge": 1024}}
    return PixtralProcessor(record(PIXTRAL, file), cast(Tokenizer, WordTokenizer(TOKENS)))


@pytest.mark.parametrize(
    ("width", "height", "of_mistral", "of_pixtral"),
    [
        (16, 16, 2, 2),
        (100, 100, 20, 56),
        (640, 480, 432, 1230),
        (1024, 768, 1064, 3120),
        (2000, 50, 112, 130),
        (333, 777, 364, 1078),
        (3840, 2160, 1736, 2340),
        (5000, 1, 56, 65),  # a height that rounds to nothing is one pixel
    ],
)
def test_golden_counts(width: int, height: int, of_mistral: int, of_pixtral: int) -> None:
    """transformers 5.24's of an edge of 1540 with cells of 28, and of 1024 with cells of 16."""
    assert mistral3().num_tokens("image", height, width) == of_mistral
    assert pixtral().num_tokens("image", height, width) == of_pixtral


@settings(max_examples=25, deadline=None)
@given(height=st.integers(3, 400), width=st.integers(3, 400), seed=st.integers(0, 99))
def test_pixels_equal_transformers(height: int, width: int, seed: int) -> None:
    processor, item = mistral3(longest_edge=196), noise(height, width, seed=seed)
    if min(height, width) * 196 < max(height, width):
        return
    theirs = PixtralImageProcessorPil(size={"longest_edge": 196}, patch_size={"height": 28, "width": 28}, **CLIP)(
        [item.data], return_tensors="np", input_data_format="channels_last"
    )
    made = processor.process(item)
    _, lines, columns = made.arrays["grid"].tolist()
    pixels = made.arrays["pixels"].reshape(lines // 2, columns // 2, 2, 2, 3, 14, 14)
    image = pixels.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, lines * 14, columns * 14).astype(np.float32)
    scale, shift = (made.arrays[name].astype(np.float32, copy=False) for name in ("scale", "shift"))
    image = image * scale[:, None, None] + shift[:, None, None]
    assert list(image.shape[1:]) == theirs["image_sizes"][0].tolist()
    np.testing.assert_allclose(image, theirs["pixel_values"][0], atol=1e-5)
    assert made.num_rows == lines * columns // 4
    assert processor.prompt_tokens(made) == processor.num_tokens("image", height, width)


def test_every_line_ends() -> None:
    processor = mistral3()
    media = [processor.process(noise(56, 84, seed=1)), processor.process(noise(28, 28))]
    prompt = processor.build("a[IMG]b[IMG]", media, add_special_tokens=True)
    assert prompt.token_ids.tolist() == [1, ord("a"), 10, 10, 10, 12, 10, 10, 10, 13, ord("b"), 10, 13]
    assert [(s.item, s.offset, s.length, s.row) for s in prompt.spans] == [(0, 2, 3, 0), (0, 6, 3, 3), (1, 11, 1, 0)]
    with pytest.raises(RequestError, match="1 image placeholder"):
        processor.build("a[IMG]", media)


def test_a_tokenizer_without_ends_of_lines_is_refused() -> None:
    with pytest.raises(StartupError, match=r"\[IMG_BREAK\]"):
        mistral3({"<s>": 1, "[IMG]": 10})
