"""LFM2-VL's tiles: golden counts and sums of transformers' processor, bytes as torch resizes them, what stands in
prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.Image import Resampling
from support.image_families import noise, normalised, record, word_tokenizer
from support.lfm2_vl import FILE, IMAGE, TILES

from sensorium.errors import CheckpointError, RequestError, StartupError
from sensorium.processors import image
from sensorium.processors.lfm2_vl import Lfm2VLProcessor

TOKENS = {"<s>": 1, **{token: 5000 + i for i, token in enumerate((*IMAGE, *TILES))}}
MORE = {
    f"<|img_row_{line}_col_{column}|>": 6000 + 10 * line + column for line in range(1, 4) for column in range(1, 11)
}


def lfm2_vl(file: dict[str, Any] | None = None, tokens: dict[str, int] = TOKENS, **overrides: Any) -> Lfm2VLProcessor:
    return Lfm2VLProcessor(record({}, file or {}), word_tokenizer({**MORE, **tokens}), overrides)


@pytest.mark.parametrize(
    ("width", "height", "rows", "tokens", "total"),
    [
        (16, 16, 64, 66, -4124.988),
        (336, 336, 100, 102, -479.663),
        (640, 480, 234, 236, -395.31),
        (1024, 768, 1770, 1779, 2811.294),
        (1280, 720, 764, 769, None),
        (1200, 300, 256, 258, -423.553),
        (2000, 50, 124, 126, -886.204),
        (333, 777, 240, 242, -783.467),
        (1540, 1540, 2560, 2572, None),
        (3840, 2160, 2300, 2311, None),
        (4992, 10, 156, 158, None),  # a side that rounds to nothing
    ],
)
def test_goldens(width: int, height: int, rows: int, tokens: int, total: float | None) -> None:
    """transformers 5.24's, and the sum of its pixels."""
    processor = lfm2_vl()
    assert processor.num_tokens("image", height, width) == tokens
    if total is not None:
        made = processor.process(noise(height, width))
        assert (made.num_rows, processor.prompt_tokens(made)) == (rows, tokens)
        assert normalised(made.arrays).sum(dtype=np.float64) == pytest.approx(total, abs=0.5)


@settings(max_examples=25, deadline=None)
@given(*[st.integers(2, 300)] * 2, *[st.integers(2, 200)] * 2, st.booleans())  # torch fails on lines of one pixel
def test_bytes_are_those_of_torch(height: int, width: int, new_height: int, new_width: int, extreme: bool) -> None:
    pixels = noise(height, width).data.astype(np.uint8)
    pixels = np.where(pixels > 128, 255, 0).astype(np.uint8) if extreme else pixels
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(),
        (new_height, new_width),
        mode="bilinear",
        antialias=True,
    )
    ours = image.resize_bytes(pixels, new_height, new_width, Resampling.BILINEAR)
    np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0))


def test_what_stands_in_prompts() -> None:
    processor = lfm2_vl(FILE)
    media = [processor.process(noise(24, 48)), processor.process(noise(8, 16))]
    prompt = processor.build("a<image><image>b", media)
    names = {token_id: name for name, token_id in TOKENS.items()}
    runs = [(span.item, span.row, span.length) for span in prompt.spans]
    assert runs == [(0, 0, 4), (0, 4, 4), (0, 8, 3), (1, 0, 2)]
    text = [names.get(i, i) for i in prompt.token_ids.tolist() if names.get(i) != "<image>"]
    tiles = ["<|img_row_1_col_1|>", "<|img_row_1_col_2|>", "<|img_thumbnail|>"]
    assert text == [97, "<|image_start|>", *tiles, "<|image_end|>", "<|image_start|>", "<|image_end|>", 98]
    assert [processor.prompt_tokens(one) for one in media] == [16, 4]
    assert [processor.num_tokens("image", *size) for size in ((24, 48), (8, 16))] == [16, 4]
    with pytest.raises(RequestError, match="2 image placeholder"):
        processor.build("<image><image>", media[:1])


def test_settings() -> None:
    plain = lfm2_vl(FILE, do_image_splitting=False)
    assert plain.process(noise(24, 48)).arrays["grids"].tolist() == [[2, 6]]
    tiles = lfm2_vl(FILE, use_thumbnail=False)
    assert tiles.num_tokens("image", 24, 48) == tiles.prompt_tokens(tiles.process(noise(24, 48))) == 8 + 4
    assert lfm2_vl(FILE, max_image_tokens=20).num_tokens("image", 24, 48) == 2 + 18
    with pytest.raises(StartupError, match="'max_tiles' is 1: less than min_tiles, which is 2"):
        lfm2_vl(FILE, max_tiles=1)
    with pytest.raises(CheckpointError, match="tile_size 500 is no multiple of 32"):
        lfm2_vl({"tile_size": 500})
    with pytest.raises(StartupError, match="no token <image>"):
        lfm2_vl(tokens={"<s>": 1})
