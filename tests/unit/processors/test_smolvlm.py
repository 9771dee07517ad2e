"""SmolVLM's tiles and frames: golden counts and sums, pixels as transformers' processor has them, what stands in
prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import noise, pixels_of, record, word_tokenizer
from support.smolvlm import FILE, SPECIALS, TILES
from transformers import SmolVLMImageProcessorPil

from sensorium.errors import CheckpointError, RequestError, StartupError
from sensorium.processors.smolvlm import Idefics3Processor, SmolVLMProcessor, in_words
from sensorium.types import MediaItem

TOKENS = {"<s>": 1, **{token: 5000 + i for i, token in enumerate((*SPECIALS, *TILES))}}
MORE = {f"<row_{line}_col_{column}>": 6000 + 10 * line + column for line in range(1, 7) for column in range(1, 7)}
SMOL_2B, SMOL_500M, IDEFICS3 = (384, 14, 3, 1536), (512, 16, 4, 2048), (364, 14, 2, 1456)


def smolvlm(side: int, patch: int, scale: int, edge: int, make: Any = SmolVLMProcessor, **overrides: Any) -> Any:
    config = {"vision_config": {"image_size": side, "patch_size": patch}, "scale_factor": scale}
    file = {**FILE, "size": {"longest_edge": edge}, "max_image_size": {"longest_edge": side}}
    return make(record(config, file), word_tokenizer({**MORE, **TOKENS}), overrides)


TINY = (24, 5, 2, 48)


@pytest.mark.parametrize(
    ("shape", "width", "height", "rows", "total", "summed"),
    [
        (SMOL_2B, 16, 16, 1377, 1416, None),
        (SMOL_2B, 640, 480, 1053, 1083, None),
        (SMOL_2B, 1200, 300, 405, 417, -1222.198),
        (SMOL_2B, 2000, 50, 405, 417, -5145.184),
        (SMOL_2B, 333, 777, 729, 752, None),
        (SMOL_500M, 1540, 1540, 1088, 1127, None),
        (SMOL_500M, 1200, 300, 320, 332, -2117.89),
        (IDEFICS3, 3840, 2160, 2197, 2227, None),
        (IDEFICS3, 333, 777, 1521, 1544, -3789.539),
    ],
)
def test_goldens(shape: Any, width: int, height: int, rows: int, total: int, summed: float | None) -> None:
    """transformers 5.24's; two line breaks are a token more here."""
    processor = smolvlm(*shape)
    assert processor.num_tokens("image", height, width) == total + 1
    if summed is not None:
        made = processor.process(noise(height, width))
        assert (made.num_rows, processor.prompt_tokens(made)) == (rows, total + 1)
        assert pixels_of(made).sum(dtype=np.float64) == pytest.approx(summed, abs=0.5)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), edge=st.sampled_from((24, 48, 75)), cuts=st.booleans())
def test_pixels_equal_transformers(height: int, width: int, edge: int, cuts: bool) -> None:
    item = noise(height, width)
    theirs = SmolVLMImageProcessorPil(
        size={"longest_edge": edge}, max_image_size={"longest_edge": 24}, do_image_splitting=cuts
    )([[item.data]], return_tensors="np", input_data_format="channels_last", return_row_col_info=True)
    processor = smolvlm(24, 5, 2, edge, do_image_splitting=cuts)
    made = processor.process(item)
    np.testing.assert_allclose(pixels_of(made), theirs["pixel_values"][0], atol=1e-5)
    assert made.arrays["layout"].tolist() == [theirs["rows"][0][0], theirs["cols"][0][0]]
    assert processor.prompt_tokens(made) == processor.num_tokens("image", height, width)


def test_what_stands_in_prompts() -> None:
    processor = smolvlm(*TINY)
    video: MediaItem = replace(noise(20, 40, frames=2), timestamps_s=(0.0, 61.5), duration_s=3725.9)
    media = [processor.process(item) for item in (video, noise(10, 20))]
    prompt = processor.build("a<image><video>b", media)
    names = {token_id: name for name, token_id in TOKENS.items()}
    text = "".join(names.get(i) or chr(i) for i in prompt.token_ids.tolist()).replace("<image>" * 4, "<image>")
    begin = "<fake_token_around_image>"
    whole = f"{begin}<global-img><image>{begin}"
    assert text == (
        f"a{begin}<row_1_col_1><image>{begin}<row_1_col_2><image>\n\n{whole}"
        "You are provided the following series of two frames from a 1:02:05 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{whole}\nFrame from 01:01:{whole}\n\nb"
    )
    assert [(span.item, span.row) for span in prompt.spans] == [(1, 0), (1, 4), (1, 8), (0, 0), (0, 4)]
    assert processor.prompt_tokens(media[0]) == processor.num_tokens("video", 20, 40, 2)
    with pytest.raises(RequestError, match="0 image placeholder"):
        processor.build("<video>", media[1:])


@pytest.mark.parametrize(
    ("frames", "rate", "chosen"),
    [
        (100, 25, [0, 33, 66, 99]),
        (1800, 30, [0, 30, 60, 91, 121, 152, 182, 213]),
        (9000, 30, [30, 171, 313, 455, 597, 739, 881, 1023]),
        (30, 30, [0]),
    ],
)
def test_frames(frames: int, rate: int, chosen: list[int]) -> None:
    sampling = smolvlm(*TINY, max_frames=64).video_sampling()
    found = sampling.indices(frames, frames / rate, 128)
    assert found[:8] == chosen
    assert (len(found), found[-1]) in {(4, 99), (60, 1799), (64, 8970), (1, 0)}


def test_words() -> None:
    wanted = {1: "one", 19: "nineteen", 20: "twenty", 42: "forty-two", 100: "one hundred"}
    assert {count: in_words(count) for count in wanted} == wanted
    assert in_words(512) == "five hundred and twelve"


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="max_image_size 24 is not the tower's 30"):
        SmolVLMProcessor(record({"vision_config": {"image_size": 30}}, FILE), word_tokenizer(TOKENS))
    with pytest.raises(StartupError, match="no token <image>"):
        SmolVLMProcessor(record({"vision_config": {"image_size": 24}}, FILE), word_tokenizer({"<s>": 1}))
    with pytest.raises(RequestError, match="takes no video"):
        smolvlm(*TINY, make=Idefics3Processor).process(noise(8, 8, frames=2))
