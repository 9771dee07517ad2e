"""Qwen3-VL's own rules against the golden tables: counts, pixels, frames, times in words, positions, its tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.image_families import QWEN_TOKENS, noise, normalised, record, word_tokenizer

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.text_config import RopeConfig
from sensorium.errors import CheckpointError, MediaError, RequestError
from sensorium.ipc import messages
from sensorium.models.loading import load_model
from sensorium.models.rope import RotaryEmbedding
from sensorium.models.towers.qwen3_vit import PositionTable
from sensorium.processors.qwen3_vl import Qwen3VLProcessor
from sensorium.types import EngineRequest, MediaItem, SamplingParams

HALF = [0.5, 0.5, 0.5]
FILE = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": HALF,
    "image_std": HALF,
}
VIDEO_FILE = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "image_mean": HALF, "image_std": HALF}
START, END, IMAGE, VIDEO = (
    QWEN_TOKENS[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad")
)


def processor(video: dict[str, Any] = VIDEO_FILE, **overrides: Any) -> Qwen3VLProcessor:
    return Qwen3VLProcessor(replace(record({}, FILE), video_preprocessor=video), word_tokenizer(QWEN_TOKENS), overrides)


def clip(frames: int, rate: float, height: int = 64, width: int = 64, seed: int = 0) -> MediaItem:
    return replace(noise(height, width, frames=frames, seed=seed), timestamps_s=tuple(i / rate for i in range(frames)))


@pytest.mark.parametrize(
    ("width", "height", "lines", "columns"),
    [
        (16, 16, 16, 16),
        (336, 336, 20, 20),
        (640, 480, 30, 40),
        (1200, 300, 18, 76),
        (2000, 50, 4, 124),
        (333, 777, 48, 20),
        (1540, 1540, 96, 96),
        (3840, 2160, 136, 240),
    ],
)
def test_golden_counts(width: int, height: int, lines: int, columns: int) -> None:
    assert processor().num_tokens("image", height, width) == lines * columns // 4
    assert processor()._grid("image", height, width, 1) == (1, lines, columns)


@pytest.mark.parametrize(
    ("width", "height", "total"),
    [(16, 16, -8207.365), (100, 100, -20.212), (640, 480, -1324.082), (333, 777, -1589.084)],
)
def test_golden_pixels(width: int, height: int, total: float) -> None:
    """The tower shows an image to both frames of a patch."""
    arrays = processor().process(noise(height, width)).arrays
    assert 2 * normalised(arrays).astype(np.float64).sum() == pytest.approx(total, abs=0.2)


@pytest.mark.parametrize(
    ("total", "rate", "size", "indices", "resized", "times"),
    [
        (2, 24, (64, 64), [0, 1], (64, 64), ["0.0"]),
        (10, 30, (240, 320), [0, 3, 6, 9], (256, 320), ["0.1", "0.2"]),
        (7, 2, (128, 128), [0, 1, 2, 3, 4, 5, 6], (128, 128), ["0.2", "1.2", "2.2", "3.0"]),
        (300, 30, (720, 1280), [0, 16, 31, 47, 63, 79, 94, 110], (704, 1280), ["0.3", "1.3", "2.4", "3.4", "4.5"]),
        (3, 30, (48, 64), [0, 1, 2], (64, 64), ["0.0", "0.1"]),
    ],
)
def test_golden_videos(
    total: int, rate: float, size: tuple[int, int], indices: list[int], resized: tuple[int, int], times: list[str]
) -> None:
    here = processor()
    taken = here.video_sampling().indices(total, total / rate, 768)
    assert taken[: len(indices)] == indices
    groups = (len(taken) + 1) // 2
    assert here._grid("video", *size, len(taken)) == (groups, resized[0] // 16, resized[1] // 16)
    found = here._group_tenths(np.array([i / rate for i in taken])).tolist()
    assert len(found) == groups and [f"{time // 10}.{time % 10}" for time in found[: len(times)]] == times


def test_pixels_of_a_frame_may_be_capped() -> None:
    """As qwen-vl-utils does it: 300 frames at 30 a second, of 1280 x 720."""
    capped = processor({**VIDEO_FILE, "cap_pixels_per_frame": True})
    assert capped._grid("video", 720, 1280, 20) == (10, 640 // 16, 1152 // 16)
    assert processor(max_pixels=64 * 64)._grid("video", 720, 1280, 20) == (10, 2, 4)
    assert processor({})._grid("video", 720, 1280, 20)[0] == 10


def test_video_pixels_are_those_of_its_frames() -> None:
    video = clip(3, 2, 64, 96)
    arrays = processor().process(video).arrays
    pairs = arrays["pixels"].reshape(2, -1, 3, 2, 256)
    for index, frame in enumerate([0, 1, 2, 2]):
        alone = processor(min_pixels=1).process(MediaItem("image", video.data[frame], b"")).arrays["pixels"]
        np.testing.assert_array_equal(pairs[index // 2, :, :, index % 2], alone.reshape(-1, 3, 256))


def test_the_shortest_clip_and_the_narrowest() -> None:
    features = processor().process(clip(1, 2))
    assert features.arrays["grid"].tolist() == [1, 4, 4] and features.arrays["tenths"].tolist() == [0]
    with pytest.raises(MediaError, match="too narrow"):
        processor().num_tokens("video", 4, 1000, 4)


# Prompts.


def words(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_times_stand_in_words_before_each_pair_of_frames() -> None:
    """The pair of begin and end around a video's marker goes away, as the models were trained."""
    here = processor()
    media = [here.process(clip(7, 2, 64, 64)), here.process(noise(250, 250))]
    text = f"a{here.placeholder('video', 0)}b{here.placeholder('image', 0)}c"
    prompt = here.build(text, media)
    expected = words("a")
    for time in ("0.2", "1.2", "2.2", "3.0"):
        expected += [*words(f"<{time} seconds>"), START, *[VIDEO] * 4, END]
    expected += [*words("b"), START, *[IMAGE] * 64, END, *words("c")]
    assert prompt.token_ids.tolist() == expected
    assert [(span.item, span.length, span.row) for span in prompt.spans] == [
        *((0, 4, 4 * i) for i in range(4)),
        (1, 64, 0),
    ]


@pytest.mark.parametrize(("frames", "missing"), [(7, 0), (44, 12)])
def test_times_are_counted(frames: int, missing: int) -> None:
    """Before a video is decoded, those from ten seconds on may take a token more than is told."""
    here = processor()
    video = here.process(clip(frames, 2))
    text = f"a{here.placeholder('video', 0)}b"
    tokens = len(here.build(text, [video]).token_ids)
    assert here.text_length(text) + here.prompt_tokens(video) == tokens
    assert here.text_length(text) + here.num_tokens("video", 64, 64, frames) == tokens - missing


def test_a_video_goes_to_the_engine_as_it_is() -> None:
    here = processor()
    prompt = here.build(here.placeholder("video", 0), [here.process(clip(4, 2))])
    sent = b"".join(bytes(piece) for piece in messages.encode_request(EngineRequest(1, prompt, SamplingParams(4))))
    [(_, payload)] = messages.FrameReader().feed(sent)
    got = messages.decode_request(payload).prompt
    assert got.spans == prompt.spans and got.media[0].arrays.keys() == prompt.media[0].arrays.keys()


def test_a_marker_without_begin_and_end_and_every_count() -> None:
    here = processor()
    video = here.process(clip(2, 24))
    assert here.build("a<|video_pad|>", [video]).token_ids.tolist() == [
        *words("a<0.0 seconds>"),
        *(START, VIDEO, VIDEO, VIDEO, VIDEO, END),
    ]
    for text, media in (("a", [video]), (here.placeholder("video", 0) * 2, [video]), ("<|image_pad|>", [video])):
        with pytest.raises(RequestError, match=r"placeholder\(s\), but the request brings"):
            here.build(text, media)


def test_golden_positions() -> None:
    here = processor()
    still = replace(here.process(noise(256, 256)), num_rows=6)
    still.arrays["grid"] = np.array([1, 4, 6], np.int32)
    prompt = here.build("ab<|vision_start|><|image_pad|>cd", [still])
    assert prompt.positions is not None
    assert prompt.positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert prompt.position_delta == -3
    video = here.process(clip(4, 2))
    prompt = here.build("<|video_pad|>", [video])
    assert prompt.positions is not None
    time = len(words("<0.2 seconds>")) + 1  # and the token before the frames
    first = prompt.positions[:, time : time + 4].T.tolist()
    assert first == [[time, time + line, time + column] for line in (0, 1) for column in (0, 1)]
    second = 2 * time + 2 + 1  # what the frames take on any axis, and the token behind them
    assert prompt.positions[0, -5:].tolist() == [second] * 4 + [second + 2]
    assert prompt.position_delta == second + 3 - len(prompt.token_ids)


def test_golden_frequencies() -> None:
    """Axes take turns; the last four are the time axis' own."""
    rope = RopeConfig(theta=5e6, mrope_section=(24, 20, 20), mrope_interleaved=True)
    axes = RotaryEmbedding(rope, 128).axes
    assert axes is not None
    assert axes.tolist() == [*[0, 1, 2] * 20, 0, 0, 0, 0]


# The tower.


def test_golden_table() -> None:
    """A grid of 4 x 6 on a table of 4 x 4: which entries, and how much of each."""
    table = PositionTable(18, 16)
    table.weight = torch.nn.Parameter(torch.eye(18)[:, :16])
    places = torch.tensor([(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (3, 5)])
    found = table(places, torch.tensor([[3, 5]] * 6))
    expected = torch.zeros(6, 16)
    for row, shares in enumerate(
        [{0: 1.0}, {0: 0.4, 1: 0.6}, {1: 0.8, 2: 0.2}, {1: 0.2, 2: 0.8}, {5: 0.8, 6: 0.2}, {15: 1.0}]
    ):
        for entry, share in shares.items():
            expected[row, entry] = share
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("vision", "problem"),
    [
        ({"deepstack_visual_indexes": [3]}, "deepstack_visual_indexes"),
        ({"in_channels": 4}, "in_channels"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ({"hidden_act": "mish"}, "unknown activation"),
    ],
)
def test_unsupported_towers_are_named(vision: dict[str, Any], problem: str, tmp_path: Path) -> None:
    checkpoints.make_qwen3_vl(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config = {**checkpoint.config, "vision_config": {**checkpoint.config["vision_config"], **vision}}
    with pytest.raises(CheckpointError, match=problem):
        load_model(replace(checkpoint, config=config), dtype=torch.float32, device="cpu")


def test_bad_sections_and_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json: 'size'"):
        processor({"size": {"shortest_edge": 4096}})
    checkpoints.make_qwen3_vl(tmp_path)
    text = open_checkpoint(tmp_path).config["text_config"]
    rope = {**text["rope_scaling"], "mrope_section": [4, 4]}
    with pytest.raises(CheckpointError, match="mrope_section"):
        open_checkpoint(tmp_path, overrides={"text_config": {**text, "rope_scaling": rope}})
