"""GLM-4.1V's images and videos: golden counts, sums and positions, pixels as transformers' processor has them."""

from __future__ import annotations
import __future__

import ast
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_families import CLIP, noise, normalised, record, word_tokenizer
from transformers import Glm4vImageProcessorPil, Glm4vProcessor, Glm46VProcessor

from sensorium.errors import MediaError, RequestError
from sensorium.processors.glm4v import Glm4VProcessor

TOKENS = {
    **{"<s>": 1, "<|begin_of_image|>": 151339, "<|end_of_image|>": 151340, "<|image|>": 151343},
    **{"<|begin_of_video|>": 151341, "<|end_of_video|>": 151342, "<|video|>": 151344},
}
PACED = {"processor_class": "Glm46VProcessor"}
VIDEO = {"size": {"shortest_edge": 1000, "longest_edge": 60000}}
SMALL = {"size": {"shortest_edge": 12544, "longest_edge": 60000}}


def glm(file: dict[str, Any] | None = None, **overrides: Any) -> Glm4VProcessor:
    return Glm4VProcessor(record({}, {**CLIP, **(file or {})}), word_tokenizer(TOKENS), overrides)


def sampler(name: str) -> Callable[..., Any]:
    """transformers' own rule for frames, out of a module that cannot be imported without torchvision."""
    file = Path(transformers.__file__).parent / "models" / name / f"video_processing_{name}.py"
    tree = ast.parse(file.read_text())
    rule = next(node for node in ast.walk(tree) if getattr(node, "name", "") == "sample_frames")
    module = ast.Module([rule], [])  # type: ignore[list-item]
    names: dict[str, Any] = {"np": np, "math": math}
    exec(compile(module, str(file), "exec", flags=__future__.annotations.compiler_flag), names)
    found: Callable[..., Any] = names["sample_frames"]
    return found


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


@pytest.mark.parametrize(
    ("total", "rate", "taken", "paced"),
    [
        (100, 25.0, (8, [0, 13, 25, 38, 50, 63, 75, 88], 88), (24, [0, 5, 9, 13, 17, 21, 25, 30], 96)),
        (1800, 30.0, *[(120, [0, 15, 30, 45, 60, 75, 90, 105], 1785)] * 2),
        (
            *(12000, 30.0, (600, [0, 21, 41, 61, 81, 101, 121, 141], 11999)),
            (400, [0, 30, 60, 90, 120, 150, 180, 210], 11970),
        ),
        (10, 30.0, *[(1, [0], 0)] * 2),
        (
            *(60000, 30.0, (600, [0, 101, 201, 301, 401, 501, 602, 702], 59999)),
            (640, [0, 93, 187, 281, 375, 469, 563, 657], 59999),
        ),
    ],
)
def test_golden_frames(total: int, rate: float, taken: tuple[Any, ...], paced: tuple[Any, ...]) -> None:
    """Where transformers shows the last frame twice, a group is filled with it here."""
    for processor, (count, first, last) in ((glm(), taken), (glm(PACED), paced)):
        found = processor.video_sampling().indices(total, total / rate, 1000)
        assert (len(found), found[:8], found[-1]) == (count, first, last)
        few = processor.video_sampling().indices(total, total / rate, 6)
        assert few[0] == 0 and len(few) <= 6 and few[-1] < total


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 5000), rate=st.sampled_from([1.0, 12.5, 24.0, 30.0, 60.0]))
def test_frames_equal_transformers(total: int, rate: float) -> None:
    metadata = SimpleNamespace(total_num_frames=total, fps=rate, duration=total / rate)
    for processor, sample in ((glm(), sampler("glm4v")), (glm(PACED), sampler("glm46v"))):
        stub = SimpleNamespace(fps=2, max_duration=300, temporal_patch_size=2)
        expected = sorted({*sample(stub, metadata).tolist()}) or [0]
        assert processor.video_sampling().indices(total, total / rate, 1000) == expected


@pytest.mark.parametrize(
    ("frames", "size", "resized"),
    [(8, (360, 640), (364, 644)), (16, (720, 1280), (728, 1288)), (120, (1080, 1920), (448, 812))],
)
def test_golden_frame_sizes(frames: int, size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert glm()._grid("video", *size, frames) == (frames // 2, resized[0] // 14, resized[1] // 14)
    assert glm()._grid("video", *size, frames - 1) == glm()._grid("video", *size, frames)


def test_times_stand_behind_pairs_of_frames() -> None:
    """As transformers writes them, with the rows of images; an image beside them keeps its own."""
    item = replace(noise(56, 84, frames=5), timestamps_s=(0.0, 1.5, 3.0, 4.5, 61.0))
    stub = SimpleNamespace(image_token="<|image|>", video_processor=SimpleNamespace(merge_size=2))
    for processor, theirs in ((glm(VIDEO), Glm4vProcessor), (glm({**VIDEO, **PACED}), Glm46VProcessor)):
        video, picture = processor.process(item), processor.process(noise(56, 56))
        stub.replace_frame_token_id = theirs.replace_frame_token_id.__get__(stub)
        metadata = SimpleNamespace(fps=1.0, timestamps=item.timestamps_s)
        inputs = {"video_grid_thw": video.arrays["grid"][None].astype(np.int64), "video_metadata": [metadata]}
        text = theirs.replace_video_token(stub, inputs, 0)
        image = f"<|begin_of_image|>{'<|image|>' * picture.num_rows}<|end_of_image|>"
        expected = word_tokenizer(TOKENS).encode(f"a{image}b<|begin_of_video|>{text}<|end_of_video|>c{image}")
        shown = [processor.placeholder(kind, 0) for kind in ("image", "video", "image")]
        prompt = processor.build("a{}b{}c{}".format(*shown), [video, picture, picture])
        assert prompt.token_ids.tolist() == expected
        assert [(span.item, span.length) for span in prompt.spans] == [
            (1, picture.num_rows),
            *[(0, video.num_rows // 3)] * 3,
            (2, picture.num_rows),
        ]
        assert processor.prompt_tokens(video) == len(word_tokenizer(TOKENS).encode(text))


def test_video_pixels_are_those_of_its_frames() -> None:
    item = noise(56, 84, frames=3)
    pairs = normalised(glm(VIDEO).process(item).arrays).reshape(2, -1, 3, 2, 196)
    for index, frame in enumerate((0, 1, 2, 2)):
        image = Glm4vImageProcessorPil(**CLIP, **VIDEO)
        theirs = image(item.data[frame], return_tensors="np", input_data_format="channels_last")["pixel_values"]
        ours = pairs[index // 2, :, :, index % 2]
        np.testing.assert_allclose(ours, theirs.reshape(-1, 3, 2, 196)[:, :, 0], atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(RequestError, match=r"1 video placeholder\(s\), but the request brings 0 video"):
        glm().build("<|video|>", [])
    with pytest.raises(MediaError, match="too narrow"):
        glm().num_tokens("image", 5, 2000)
