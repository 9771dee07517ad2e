"""Qwen-VL with videos: which frames, how large, and the model's answers against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.image_families import noise, normalised, qwen
from support.media_models import Served, load
from support.model_driver import Driver
from transformers import Qwen2VLImageProcessorPil

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError, RequestError, StartupError
from sensorium.types import MediaItem, Prompt

SMALL = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 140}}  # of a frame


MAKERS = {
    "qwen2_vl": checkpoints.make_qwen2_vl,
    "qwen2_5_vl": checkpoints.make_qwen2_5_vl,
    "qwen3_vl": checkpoints.make_qwen3_vl,
}
each_family = pytest.mark.parametrize("family", list(MAKERS))


@cache
def served(family: str = "qwen2_vl") -> Served:
    with TemporaryDirectory() as folder:
        path = Path(folder)
        oracle = MAKERS[family](path, tie_word_embeddings=False)
        size = SMALL if family != "qwen3_vl" else {"size": {"shortest_edge": 4096, "longest_edge": 12288}}  # of a clip
        (path / "video_preprocessor_config.json").write_text(json.dumps(size))
        return load(path, oracle)


def oracle_inputs(here: Served, items: list[MediaItem], prompt: Prompt) -> dict[str, Any]:
    """Pictures as transformers' processor makes them. It has no video processor without torchvision: frames are
    compared with its pictures elsewhere."""
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    config = here.oracle.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    pictures = [item.data for item in items if item.kind == "image"]
    if pictures:
        inputs |= Qwen2VLImageProcessorPil(**here.preprocessor)(
            pictures, return_tensors="pt", input_data_format="channels_last"
        )
    videos = [one.arrays for one in prompt.media if one.kind == "video"]
    inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate([normalised(one) for one in videos]))
    inputs["video_grid_thw"] = torch.tensor(np.stack([one["grid"] for one in videos])).long()
    return inputs


# Which frames.


def linspace(total: int, count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


@pytest.mark.parametrize(
    ("total", "rate", "count"),
    [(300, 30, 20), (309, 30, 20), (30, 30, 4), (5, 10, 4), (3, 30, 2), (2, 30, 2), (240, 24, 20), (100_000, 25, 128)],
)
def test_frames_as_qwen_vl_utils_takes_them(total: int, rate: float, count: int) -> None:
    assert qwen().video_sampling().indices(total, total / rate, 128) == linspace(total, count)


def test_one_frame_is_a_video() -> None:
    assert qwen().video_sampling().indices(1, 1 / 30, 128) == [0]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"fps": 1}, 10),
        ({"fps": 0.5}, 4),
        ({"num_frames": 7}, 8),
        ({"num_frames": 1}, 2),
        ({"max_frames": 9}, 8),
        ({"min_frames": 33}, 34),
        ({"max_frames": 2}, 2),
        ({"fps": 30, "num_frames": 6}, 6),
        ({"fps": 1000}, 128),
    ],
)
def test_sampling_settings(settings: dict[str, Any], count: int) -> None:
    assert qwen(**settings).video_sampling().indices(300, 10.0, 128) == linspace(300, count)
    assert qwen().with_overrides(settings).video_sampling().indices(300, 10.0, 128) == linspace(300, count)


def test_sampling_and_size_from_the_video_file(tmp_path: Path) -> None:
    checkpoints.make_qwen2_vl(tmp_path)

    def processor(file: dict[str, Any], name: str = "video_preprocessor_config.json") -> Any:
        (tmp_path / name).write_text(json.dumps(file))
        return load_processor(tmp_path)

    made = processor({"fps": 1, "max_frames": 6, "size": {"shortest_edge": 3136, "longest_edge": 6272}})
    assert len(made.video_sampling().indices(300, 10.0, 128)) == 6
    assert made.num_tokens("video", 500, 1000, 6) <= 3 * 8
    assert made.num_tokens("image", 500, 1000) > 500
    assert len(made.with_overrides({"max_frames": 4}).video_sampling().indices(300, 10.0, 128)) == 4
    assert len(processor({"num_frames": 12}).with_overrides({"fps": 2}).video_sampling().indices(300, 10.0, 128)) == 20
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json: 'fps'"):
        processor({"fps": "fast"})
    (tmp_path / "video_preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "image.json")
    image = json.loads((tmp_path / "image.json").read_text())
    made = processor({"image_processor": image, "video_processor": {"num_frames": 8}}, "processor_config.json")
    assert len(made.video_sampling().indices(300, 10.0, 128)) == 8


def load_processor(folder: Path) -> Any:
    from sensorium.processors.qwen2_vl import Qwen2VLProcessor
    from sensorium.prompt.tokenizer import Tokenizer

    return Qwen2VLProcessor(open_checkpoint(folder), Tokenizer.from_folder(folder))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": True}, "fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"max_frames": "all"}, "max_frames"),
        ({"min_frames": 20, "max_frames": 10}, "max_frames"),
    ],
)
def test_bad_sampling_settings(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(StartupError, match=f"'{name}'"):
        qwen(**settings)
    with pytest.raises(RequestError, match=f"'{name}'") as refused:
        qwen().with_overrides(settings)
    assert refused.value.param == f"mm_processor_kwargs.{name}"


# How large.


@pytest.mark.parametrize(
    ("height", "width", "frames", "tokens"),
    [
        (64, 64, 4, 2 * 144),  # up to 128 tokens' pixels at least
        (480, 640, 4, 2 * 391),
        (1080, 1920, 4, 2 * 720),
        (1080, 1920, 768, 384 * 12 * 23),
        (100, 140, 5, 3 * 10 * 14),
    ],
)
def test_size_of_frames(height: int, width: int, frames: int, tokens: int) -> None:
    assert qwen().num_tokens("video", height, width, frames) == tokens


def test_pixel_settings_hold_for_frames_too() -> None:
    assert qwen(max_pixels=56 * 56).num_tokens("video", 500, 500, 4) == 2 * 4
    assert qwen(min_pixels=1 << 20).num_tokens("video", 100, 100, 2) >= (1 << 20) // 784


def test_a_video_and_its_frames_as_pictures_have_other_keys() -> None:
    video = noise(56, 56, frames=2)
    keys = {qwen().process(video).key, qwen(fps=1).process(video).key, qwen().process(noise(56, 56)).key}
    assert len(keys) == 3


# The model.

ITEMS = [noise(60, 90, seed=1), noise(70, 100, frames=5, seed=2), noise(80, 60, frames=2, seed=3)]


@each_family
def test_logits_and_greedy_tokens_equal_transformers(family: str) -> None:
    """With our positions: transformers' text goes on before the last of Qwen2.5-VL's frames."""
    here = served(family)
    prompt = here.prompt(ITEMS)
    inputs = oracle_inputs(here, ITEMS, prompt)
    if family == "qwen2_5_vl":
        here.oracle.model.get_rope_index = lambda *_, **__: (
            torch.from_numpy(prompt.positions).long()[:, None],
            torch.tensor([[prompt.position_delta]]),
        )
    with torch.inference_mode():
        theirs = here.oracle(**inputs).logits[0]
    torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt)), theirs, atol=1e-4, rtol=0)
    made = here.oracle.generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)
    ours = Driver(here.model).greedy([here.run(prompt)], 32)[0]
    assert ours == made[0, len(prompt.token_ids) :].tolist()
    assert len(set(ours)) > 4


@pytest.mark.parametrize(
    ("seconds_per_pair", "times", "next_position"), [(1.0, [2, 4, 6], 7), (0.4, [2, 2, 3], 4), (2.5, [2, 7, 12], 13)]
)
def test_qwen2_5_vl_time_in_positions(seconds_per_pair: float, times: list[int], next_position: int) -> None:
    """Two positions a second after two of text, and what follows goes on after the largest on any axis."""
    here = served("qwen2_5_vl")
    video = replace(noise(56, 56, frames=6), duration_s=3 * seconds_per_pair)
    prompt = here.processor.build("!" + here.processor.placeholder("video", 0), [here.processor.process(video)])
    assert prompt.positions is not None
    assert prompt.positions[0, 2:-1].tolist() == [time for time in times for _ in range(4)]
    assert prompt.positions[:, -1].tolist() == [next_position] * 3


def test_long_video_counts_on_after_its_last_frame() -> None:
    """transformers 5.23 forgets the time axis there; given our positions it agrees."""
    here = served()
    items = [noise(40, 40, frames=21)]
    prompt = here.prompt(items)
    assert prompt.positions is not None and prompt.positions[0].max() - prompt.positions[1].max() == 0
    assert prompt.position_delta == 11 - prompt.media[0].num_rows
    inputs = oracle_inputs(here, items, prompt)
    with torch.inference_mode():
        positions = torch.from_numpy(prompt.positions).long()[:, None]
        theirs = here.oracle(**inputs, position_ids=positions).logits[0]
    torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt)), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_prefill_cut_everywhere_inside_videos(family: str) -> None:
    here = served(family)
    prompt = here.prompt(ITEMS)
    driver = Driver(here.model, num_blocks=4096)
    whole = driver.prefill(here.run(prompt))
    places = {place for s in prompt.spans for place in range(s.offset, s.offset + s.length + 1)}
    for place in sorted(places):
        torch.testing.assert_close(driver.prefill(here.run(prompt), place), whole, atol=1e-4, rtol=0)


def test_unequal_requests_together_equal_one_by_one() -> None:
    here = served()
    prompts = [here.prompt(ITEMS[i % 3 : 3], text="{}" + " word" * i) for i in range(5)]
    alone = [Driver(here.model).greedy([here.run(prompt)], 12)[0] for prompt in prompts]
    assert Driver(here.model, num_blocks=1024).greedy([here.run(prompt) for prompt in prompts], 12) == alone
