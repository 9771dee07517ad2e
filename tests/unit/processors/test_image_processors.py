"""Processors against transformers' PIL processors and the golden tables; counts, expansion, settings, M-RoPE."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.image_families import CLIP, QWEN_FILE, noise, normalised, pixels_of, qwen, record, word_tokenizer

from sensorium.errors import CheckpointError, MediaError, RequestError, StartupError
from sensorium.processors import image
from sensorium.processors.base import Processor
from sensorium.processors.llava import LlavaProcessor
from sensorium.processors.llava_next import LlavaNextProcessor, best_resolution
from sensorium.types import MediaItem

LLAVA_CONFIG = {
    "image_token_index": 32000,
    "vision_config": {"image_size": 336, "patch_size": 14},
    "vision_feature_select_strategy": "default",
}
LLAVA_FILE = {**CLIP, "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "resample": 3}
NEXT_CONFIG = {**LLAVA_CONFIG, "image_token_index": 64000}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NEXT_FILE = {**LLAVA_FILE, "image_grid_pinpoints": PINPOINTS}
SIDES = st.integers(4, 700)


def llava(file: dict[str, Any] = LLAVA_FILE, config: dict[str, Any] = LLAVA_CONFIG, **overrides: Any) -> LlavaProcessor:
    return LlavaProcessor(record(config, file), word_tokenizer({"<s>": 1, "<image>": 32000}), overrides)


def llava_next(file: dict[str, Any] = NEXT_FILE, image_id: int = 64000, **overrides: Any) -> LlavaNextProcessor:
    return LlavaNextProcessor(record(NEXT_CONFIG, file), word_tokenizer({"<s>": 1, "<image>": image_id}), overrides)


# Golden tables of models.md.


@pytest.mark.parametrize(
    ("height", "width", "tiles", "tokens"),
    [
        (336, 336, 3, 1176),
        (100, 100, 3, 1176),
        (480, 640, 5, 2340),
        (640, 480, 5, 2352),
        (1200, 300, 4, 1944),
        (672, 672, 5, 2928),
        (1, 500, 3, 576),
        (88, 55, 3, 984),
        (55, 176, 3, 1360),
    ],
)  # 15 patches, or 14.99999
def test_llava_next_golden(height: int, width: int, tiles: int, tokens: int) -> None:
    processor = llava_next()
    assert processor.num_tokens("image", height, width) == tokens
    features = processor.process(noise(height, width))
    assert (features.num_rows, len(features.arrays["pixels"])) == (tokens, tiles)


@pytest.mark.parametrize(
    ("height", "width", "resized", "tokens"),
    [
        (1, 1, (56, 56), 4),
        (28, 28, (56, 56), 4),
        (42, 42, (56, 56), 4),
        (56, 56, (56, 56), 4),
        (29, 43, (56, 84), 6),
        (70, 98, (56, 112), 8),
        (480, 640, (476, 644), 391),
        (1000, 1000, (1008, 1008), 1296),
    ],
)
def test_qwen2_vl_golden(height: int, width: int, resized: tuple[int, int], tokens: int) -> None:
    processor = qwen()
    assert processor.num_tokens("image", height, width) == tokens
    grid = processor.process(noise(height, width)).arrays["grid"]
    assert (int(grid[1]) * 14, int(grid[2]) * 14) == resized


def test_qwen2_vl_golden_with_smaller_maximum() -> None:
    assert qwen({**QWEN_FILE, "max_pixels": 1003520}).num_tokens("image", 1000, 1000) == 1225


@pytest.mark.parametrize(("strategy", "tokens"), [("default", 576), ("full", 577)])
def test_llava_golden(strategy: str, tokens: int) -> None:
    config = {**LLAVA_CONFIG, "vision_feature_select_strategy": strategy}
    assert llava(config=config).num_tokens("image", 123, 456) == tokens


# Pixels.


@settings(max_examples=15, deadline=None)
@given(SIDES, SIDES, st.booleans())
def test_llava_pixels(height: int, width: int, pads: bool) -> None:
    from transformers import LlavaImageProcessorPil

    file = {**LLAVA_FILE, "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_pad": pads}
    config = {**LLAVA_CONFIG, "vision_config": {"image_size": 56, "patch_size": 14}}
    item = noise(height, width)
    expected = LlavaImageProcessorPil(**file)(item.data, input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_allclose(pixels_of(llava(file, config).process(item)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "file",
    [
        LLAVA_FILE,
        {**LLAVA_FILE, "size": 336, "crop_size": 336},
        {**LLAVA_FILE, "size": {"height": 336, "width": 336}, "do_center_crop": False},
        {**LLAVA_FILE, "resample": 2, "do_normalize": False},
        {**LLAVA_FILE, "do_resize": False},
        {**LLAVA_FILE, "size": 200, "do_rescale": False},
        {**LLAVA_FILE, "rescale_factor": 0.5, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1.0]},
    ],
)
@pytest.mark.parametrize("size", [(333, 501), (400, 90)])
def test_clip_dialects(file: dict[str, Any], size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    item = noise(*size)
    expected = CLIPImageProcessorPil(**file)(item.data, input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_allclose(pixels_of(llava(file).process(item)), expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=12, deadline=None)
@given(SIDES, SIDES)
def test_llava_next_pixels(height: int, width: int) -> None:
    from transformers import LlavaNextImageProcessorPil

    points = [[28 * h // 336, 28 * w // 336] for h, w in PINPOINTS]
    file = {**CLIP, "size": {"shortest_edge": 28}, "crop_size": 28, "image_grid_pinpoints": points}
    config = {**NEXT_CONFIG, "vision_config": {"image_size": 28, "patch_size": 14}}
    processor = LlavaNextProcessor(record(config, file), word_tokenizer({"<s>": 1, "<image>": 64000}))
    item = noise(height, width)
    if best_resolution(height, width, processor._pinpoints) is None:
        with pytest.raises(MediaError):
            processor.process(item)
        return
    expected = LlavaNextImageProcessorPil(**file)(item.data, input_data_format="channels_last")
    np.testing.assert_allclose(pixels_of(processor.process(item)), expected["pixel_values"][0], atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(SIDES, SIDES, st.sampled_from([50_000, 12845056]))
def test_qwen2_vl_pixels(height: int, width: int, max_pixels: int) -> None:
    from transformers import Qwen2VLImageProcessorPil

    file = {**QWEN_FILE, "max_pixels": max_pixels}
    item = noise(height, width)
    features = qwen(file).process(item)
    expected = Qwen2VLImageProcessorPil(**file)(item.data, input_data_format="channels_last")
    np.testing.assert_array_equal(features.arrays["grid"], expected["image_grid_thw"][0])
    ours = normalised(features.arrays).reshape(-1, 3, 1, 196)
    theirs = np.asarray(expected["pixel_values"]).reshape(-1, 3, 2, 196)
    np.testing.assert_allclose(np.repeat(ours, 2, axis=2), theirs, atol=1e-6)


def test_qwen2_vl_video_is_pairs_of_frames() -> None:
    processor = qwen()
    video = noise(100, 140, frames=3)
    features = processor.process(video)
    grid = [int(n) for n in features.arrays["grid"]]
    assert grid[0] == 2 and features.num_rows == processor.num_tokens("video", 100, 140, 3) == grid[1] * grid[2] // 2
    pairs = features.arrays["pixels"].reshape(2, -1, 3, 2, 196)
    scaled = qwen(min_pixels=128 * 784, max_pixels=768 * 784)
    for index, frame in enumerate([0, 1, 2, 2]):
        alone = scaled.process(MediaItem("image", video.data[frame], b"")).arrays["pixels"].reshape(-1, 3, 196)
        np.testing.assert_array_equal(pairs[index // 2, :, :, index % 2], alone)


def test_video_budget_shrinks_frames() -> None:
    processor = qwen()
    assert processor.num_tokens("video", 1000, 1000, 700) < 700 * processor.num_tokens("video", 1000, 1000, 2) // 4


# Counts from the size alone.


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([llava, llava_next, qwen]))
def test_counts_need_no_pixels(height: int, width: int, family: Any) -> None:
    processor = family()
    try:
        count = processor.num_tokens("image", height, width)
    except MediaError:
        with pytest.raises(MediaError) as refused:
            processor.process(noise(height, width))
        assert refused.value.param == "messages[0]"
        return
    assert processor.process(noise(height, width)).num_rows == count


@pytest.mark.parametrize(("processor", "size"), [(qwen(), (2, 401)), (llava_next(), (1, 5000))])
def test_extreme_shapes_are_refused(processor: Processor, size: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match="too narrow") as refused:
        processor.num_tokens("image", *size)
    assert refused.value.code == "image_too_small"


@pytest.mark.parametrize("size", [(4000, 4000), (4000, 20), (3000, 4000), (4, 800), (1, 1)])
def test_qwen2_vl_counts_of_extreme_sizes(size: tuple[int, int]) -> None:
    from transformers import Qwen2VLImageProcessorPil

    patches = Qwen2VLImageProcessorPil(**QWEN_FILE).get_number_of_image_patches(*size, {})
    assert qwen().num_tokens("image", *size) == patches // 4


# Expansion.


def test_expansion_in_order_of_appearance() -> None:
    processor = qwen()
    small, large = processor.process(noise(56, 56)), processor.process(noise(56, 84))
    text = f"a{processor.placeholder('image', 0)}bc{processor.placeholder('image', 1)}"
    prompt = processor.build(text, [large, small])
    expected = [97, 151652, *[151655] * 6, 151653, 98, 99, 151652, *[151655] * 4, 151653]
    assert prompt.token_ids.tolist() == expected and prompt.token_ids.dtype == np.int32
    assert [(s.item, s.offset, s.length, s.row) for s in prompt.spans] == [(0, 2, 6, 0), (1, 12, 4, 0)]
    assert prompt.media == (large, small)


def test_begin_token_only_when_asked() -> None:
    processor = llava()
    assert processor.build("x", [], add_special_tokens=True).token_ids.tolist() == [1, 120]
    assert processor.build("x", []).token_ids.tolist() == [120]


@pytest.mark.parametrize("count", [0, 2])
def test_every_placeholder_needs_its_picture(count: int) -> None:
    processor = llava()
    media = [processor.process(noise(20, 20))] * count
    with pytest.raises(RequestError, match=rf"1 image placeholder\(s\), but the request brings {count}"):
        processor.build("<image>", media)


def test_expansion_is_linear_in_pictures() -> None:  # S35
    processor = qwen()
    picture = processor.process(noise(56, 56))

    def seconds(count: int) -> float:
        text, media = processor.placeholder("image", 0) * count, [picture] * count
        best = 1.0
        for _ in range(5):
            start = time.process_time()
            processor.build(text, media)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(2000) / seconds(200) <= 40  # a hundred, if each looked at all


def test_text_model_takes_no_pictures() -> None:
    processor = Processor(record({}, {}), word_tokenizer({"<s>": 1}))
    assert processor.build("hi", []).positions is None
    with pytest.raises(MediaError, match="takes no image input"):
        processor.process(noise(8, 8))
    with pytest.raises(MediaError, match="takes no image input"):
        processor.build("hi", [llava().process(noise(8, 8))])


def test_config_wins_over_the_tokenizers_image_token(caplog: pytest.LogCaptureFixture) -> None:
    processor = llava_next(image_id=64003)
    assert "64003" in caplog.text
    picture = processor.process(noise(100, 100))
    prompt = processor.build("<image>", [picture])
    assert prompt.token_ids.tolist() == [64000] * 1176


def test_no_image_token_at_all() -> None:
    with pytest.raises(StartupError, match="neither the token '<image>'"):
        LlavaProcessor(record(LLAVA_CONFIG, LLAVA_FILE), word_tokenizer({"<s>": 1}))


# Settings.


def test_settings_of_operator_and_request() -> None:
    processor = qwen(max_pixels=401408)
    assert processor.num_tokens("image", 2000, 2000) <= 512
    request = processor.with_overrides({"max_pixels": 200704})
    assert request.num_tokens("image", 2000, 2000) <= 256
    assert processor.with_overrides({}) is processor
    assert processor.num_tokens("image", 2000, 2000) > 256, "a request must not change the server's processor"


@pytest.mark.parametrize(
    ("overrides", "name", "problem"),
    [
        (
            {"num_crops": 4},
            "num_crops",
            "is not a setting of this model's processor .known: fps, max_frames, max_pixels",
        ),
        ({"max_pixels": "big"}, "max_pixels", "must be an integer"),
        ({"max_pixels": True}, "max_pixels", "must be an integer"),
        ({"min_pixels": 1 << 40}, "min_pixels", "must be an integer"),
        ({"min_pixels": 10_000, "max_pixels": 5_000}, "max_pixels", "less than min_pixels"),
    ],
)
def test_bad_settings_are_named(overrides: dict[str, Any], name: str, problem: str) -> None:
    with pytest.raises(StartupError, match=f"'{name}' .*{problem}"):
        qwen(**overrides)
    with pytest.raises(RequestError, match=f"'{name}' .*{problem}") as refused:
        qwen().with_overrides(overrides)
    assert refused.value.param == f"mm_processor_kwargs.{name}"


def test_pixel_bounds_in_both_dialects() -> None:
    edges = {name: value for name, value in QWEN_FILE.items() if not name.endswith("_pixels")}
    edges["size"] = {"shortest_edge": 3136, "longest_edge": 1003520}
    assert qwen(edges).num_tokens("image", 1000, 1000) == 1225


def test_feature_key_depends_on_content_and_settings() -> None:
    one, other = noise(60, 60, seed=1), noise(60, 60, seed=2)
    keys = {
        qwen().process(one).key,
        qwen().process(other).key,
        qwen(max_pixels=50_000).process(one).key,
        qwen({**QWEN_FILE, "resample": 2}).process(one).key,
        llava().process(one).key,
        llava_next().process(one).key,
        llava(do_pad=True).process(one).key,
    }
    assert len(keys) == 7
    assert qwen().process(one).key in keys


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (llava, {**LLAVA_FILE, "crop_size": 224}),
        (llava, {**LLAVA_FILE, "resample": 99}),
        (llava, {**LLAVA_FILE, "size": {"width": 3}}),
        (llava, {**LLAVA_FILE, "image_mean": [0.5]}),
        (llava, {**LLAVA_FILE, "image_std": [1, 1, 0]}),
        (llava, {**LLAVA_FILE, "rescale_factor": "x"}),
        (llava_next, {**NEXT_FILE, "image_grid_pinpoints": [[336, 500]]}),
        (llava_next, {**NEXT_FILE, "crop_size": 224}),
        (qwen, {**QWEN_FILE, "max_pixels": "big"}),
        (qwen, {**CLIP, "size": 7, "patch_size": 14, "max_pixels": 1.5}),
    ],
)
def test_bad_preprocessor_files_are_named(make: Any, file: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config|pinpoints"):
        make(file)


# M-RoPE.


def test_mrope_equals_transformers_for_pictures() -> None:
    import torch
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    processor = qwen()
    sizes = [(56, 56), (200, 90), (84, 300)]
    media = [processor.process(noise(*size)) for size in sizes]
    text = "hello" + "".join(f"{processor.placeholder('image', i)} and " for i in range(3)) + "bye"
    prompt = processor.build(text, media)
    ids = torch.from_numpy(prompt.token_ids)[None].long()
    grids = torch.tensor(np.stack([one.arrays["grid"] for one in media]))
    methods = {"config": Qwen2VLConfig(), "get_vision_position_ids": Qwen2VLModel.get_vision_position_ids}
    model = type("Model", (), methods)()
    expected, delta = Qwen2VLModel.get_rope_index(model, ids, (ids == 151655).int(), image_grid_thw=grids)
    np.testing.assert_array_equal(prompt.positions, expected[:, 0])
    assert prompt.position_delta == int(delta)


def test_mrope_of_long_videos_counts_the_time_axis() -> None:
    processor = qwen()
    processor.modalities = frozenset({"image", "video"})
    video = processor.process(noise(28, 28, frames=50))
    prompt = processor.build(f"ab{processor.placeholder('video', 0)}c", [video])
    grid = [int(n) for n in video.arrays["grid"]]
    assert grid[0] == 25 > max(grid[1:]) // 2
    assert prompt.positions is not None
    start = 3  # a, b, vision_start
    np.testing.assert_array_equal(
        prompt.positions[:, start + video.num_rows - 1],
        [start + 24, start + grid[1] // 2 - 1, start + grid[2] // 2 - 1],
    )
    assert prompt.positions[:, -2].tolist() == [start + 25] * 3
    assert prompt.position_delta == start + 25 + 2 - len(prompt.token_ids)


def test_text_has_plain_positions() -> None:
    prompt = qwen().build("only text", [])
    assert (prompt.positions, prompt.position_delta) == (None, 0)


# Speed.


def test_picture_takes_milliseconds() -> None:
    processor, item = qwen(), noise(448, 448)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        processor.process(item)
        best = min(best, time.perf_counter() - start)
    assert best < 0.008


def test_equal_size_is_not_resampled() -> None:
    pixels = noise(20, 30).data.astype(np.uint8, copy=False)
    assert image.resize(pixels, 20, 30, Image.Resampling.BICUBIC) is pixels
