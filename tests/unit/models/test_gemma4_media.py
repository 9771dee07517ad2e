"""Gemma 4's recordings and videos against transformers: features, counts, times, rows, logits, greedy tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints, engine_harness
from support.image_families import noise, record, word_tokenizer
from support.media_models import Served, again, load
from support.model_driver import Driver
from support.speech import recording
from transformers import Gemma4AudioFeatureExtractor, Gemma4ImageProcessorPil, Gemma4Processor
from transformers.video_utils import VideoMetadata

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError, MediaError, UnsupportedModalityError
from sensorium.models.loading import load_model
from sensorium.processors import gemma4
from sensorium.types import EngineRequest, MediaItem, Prompt, SamplingParams

TOKENS = {
    **{"<|image>": 255999, "<|audio>": 256000, "<|image|>": 258880, "<|audio|>": 258881, "<image|>": 258882},
    **{"<audio|>": 258883, "<|video|>": 258884},
}
RATE = 16_000
each_layout = pytest.mark.parametrize("layout", ["hub", "transformers"])


def processor(audio: dict[str, Any] | None = None, **overrides: Any) -> gemma4.Gemma4Processor:
    """With the sizes that are published."""
    config = {"audio_config": {"hidden_size": 1024} if audio is None else audio}
    return gemma4.Gemma4Processor(record(config, {}), word_tokenizer(TOKENS), overrides)


def clip(frames: int, rate: float, height: int, width: int, seed: int = 0) -> MediaItem:
    return replace(noise(height, width, frames=frames, seed=seed), timestamps_s=tuple(i / rate for i in range(frames)))


@cache
def folder_of(layout: str) -> TemporaryDirectory[str]:
    """An engine looks at the files again."""
    return TemporaryDirectory()


@cache
def served(layout: checkpoints.Layout = "hub") -> Served:
    folder = Path(folder_of(layout).name)
    return load(folder, checkpoints.make_gemma4(folder, layout, seed=1))


# Features, counts and text.


@pytest.mark.parametrize("samples", [161, 320, 321, 7999, 16_000, 16_001, 16_159, 480_000, 500_000])
def test_recordings_equal_transformers(samples: int) -> None:
    made = Gemma4AudioFeatureExtractor()([recording(samples).data], sampling_rate=RATE)
    mask = made["input_features_mask"][0]
    features = processor().process(recording(samples))
    np.testing.assert_allclose(features.arrays["mel"], made["input_features"][0][mask], atol=2e-5, rtol=0)
    stub = SimpleNamespace(boa_token="<|audio>", audio_token="<|audio|>", eoa_token="<audio|>")
    text = Gemma4Processor.replace_audio_token(stub, {"input_features_mask": [mask]}, 0)
    assert features.num_rows == text.count("<|audio|>")
    assert processor().num_tokens("audio", 0, 0, samples) == features.num_rows + 2
    found = processor().build("a<|audio|>b", [features]).token_ids.tolist()
    assert found == [97, 256000, *[258881] * features.num_rows, 258883, 98]


def test_golden_sums_of_recordings() -> None:
    for samples, rows, total in ((321, 1, None), (16_000, 25, 2966.11), (80_000, 125, 15077.59)):
        features = processor().process(recording(samples))
        assert features.num_rows == rows
        if total is not None:
            assert features.arrays["mel"].astype(np.float64).sum() == pytest.approx(total, abs=0.05)


def test_what_cannot_be_heard_is_refused() -> None:
    with pytest.raises(MediaError, match="too short for this model, which takes 161"):
        processor().process(recording(160))
    silent = processor({})
    assert silent.modalities == {"image", "video"} and processor().modalities == {"image", "video", "audio"}
    with pytest.raises(UnsupportedModalityError):
        silent.process(recording(16_000))
    files = replace(record({"audio_config": {}}, {}), audio_preprocessor={"preemphasis": 0.97})
    with pytest.raises(CheckpointError, match=r"preemphasis 0\.97 is not supported"):
        gemma4.Gemma4Processor(files, word_tokenizer(TOKENS))
    with pytest.raises(CheckpointError, match="128 bins do not fit"):
        processor({"subsampling_conv_channels": [64, 32]})


@pytest.mark.parametrize(
    ("total", "rate", "size", "indices"),
    [
        (300, 30.0, (240, 320), [0, 9, 18, 28, 37, 46, 56, 65, 75, 84, 93, 103]),
        (33, 24.0, (96, 64), [0, 1, 2, 3, 4, 5]),
        (4000, 25.0, (70, 300), [0, 125, 250]),
    ],
)
def test_videos_equal_transformers(total: int, rate: float, size: tuple[int, int], indices: list[int]) -> None:
    """Its video processor, which asks for torchvision, gives a frame what the image processor gives an image."""
    taken = processor().video_sampling().indices(total, total / rate, 512)
    assert len(taken) == 32 and taken[: len(indices)] == indices
    frames = noise(*size, frames=32, seed=total).data
    features = processor().process(MediaItem("video", frames, b"", timestamps_s=tuple(i / rate for i in taken)))
    made = Gemma4ImageProcessorPil(max_soft_tokens=70)([frames[0], frames[31]], return_tensors="np")
    patches = (made["image_position_ids"][0] >= 0).all(-1).sum()
    pixels = features.arrays["pixels"].reshape(32, patches, -1)
    np.testing.assert_allclose(pixels[[0, 31]], made["pixel_values"][:, :patches], atol=1e-7, rtol=0)
    metadata = VideoMetadata(total_num_frames=total, fps=rate, frames_indices=taken)
    stub = SimpleNamespace(boi_token="<|image>", video_token="<|video|>", eoi_token="<image|>")
    inputs = {"num_soft_tokens_per_video": made["num_soft_tokens_per_image"][:1], "video_metadata": [metadata]}
    text = f"look: {Gemma4Processor.replace_video_token(stub, inputs, 0)}, well?"
    prompt = processor().build("look: <|video|>, well?", [features])
    assert prompt.token_ids.tolist() == word_tokenizer(TOKENS).encode(text)
    assert processor().prompt_tokens(features) + len("look: , well?") == len(prompt.token_ids)


def test_short_clips_and_settings() -> None:
    here = processor(max_soft_tokens=140, num_frames=4)
    assert here.video_sampling().indices(3, 0.1, 512) == [0, 1, 2]
    assert here.video_sampling().indices(100, 4.0, 512) == [0, 25, 50, 75]
    assert processor(fps=2.0).video_sampling().indices(100, 4.0, 512) == [0, 12, 25, 37, 50, 62, 75, 87]
    one = here.process(clip(1, 1.0, 480, 640))
    assert here.prompt_tokens(one) == here.num_tokens("video", 480, 640, 1) == one.num_rows + len("00:00 ") + 2
    assert 120 < one.num_rows <= 140 and processor().process(clip(1, 1.0, 480, 640)).num_rows == 63


# The model.


def everything() -> list[MediaItem]:
    return [
        noise(50, 70),
        recording(9_000, 1),
        clip(3, 0.5, 60, 40),
        recording(4_321, 2),
        clip(2, 30.0, 30, 90, seed=3),
    ]


def inputs_of(here: Served, items: Sequence[MediaItem], prompt: Prompt) -> dict[str, Any]:
    """What transformers' processors make of the same media."""
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    config = here.oracle.config
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    of: dict[str, list[Any]] = {kind: [one.data for one in items if one.kind == kind] for kind in gemma4.IDS}
    images = Gemma4ImageProcessorPil(patch_size=2, pooling_kernel_size=2, max_soft_tokens=70)
    how = {"return_tensors": "pt", "input_data_format": "channels_last"}
    if of["image"]:
        found = images(of["image"], **how)
        made |= {name: found[name] for name in ("pixel_values", "image_position_ids")}
    if of["video"]:
        found = images([frame for frames in of["video"] for frame in frames], **how)
        made |= {"pixel_values_videos": found["pixel_values"], "video_position_ids": found["image_position_ids"]}
        made["num_frames_per_video"] = torch.tensor([len(one) for one in of["video"]])
    if of["audio"]:
        made |= Gemma4AudioFeatureExtractor(feature_size=8)(of["audio"], sampling_rate=RATE, return_tensors="pt")
    return made


def test_rows_equal_transformers() -> None:
    here, clips = served(), [recording(n, n) for n in (161, 700, 5_000, 20_001)]
    made = Gemma4AudioFeatureExtractor(feature_size=8)([one.data for one in clips], sampling_rate=RATE)
    ours = here.encode([here.processor.process(one) for one in clips])
    for index, rows in enumerate(ours):
        one = {name: torch.from_numpy(np.stack(made[name]))[index : index + 1] for name in made}
        with torch.inference_mode():
            theirs = here.oracle.model.get_audio_features(**one)
        torch.testing.assert_close(rows, theirs.pooler_output[theirs.attention_mask], atol=1e-4, rtol=0)


@each_layout
def test_logits_and_greedy_tokens_equal_transformers(layout: checkpoints.Layout) -> None:
    here, items = served(layout), everything()
    prompt = here.prompt(items)
    inputs = inputs_of(here, items, prompt)
    with torch.inference_mode():
        theirs = here.oracle(**inputs).logits[0]
    driver, run = Driver(here.model, num_blocks=4096), here.run(prompt)
    torch.testing.assert_close(driver.prefill(again(run)), theirs, atol=1e-4, rtol=0)
    generate: Any = here.oracle.generate
    made = generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)
    expected = made[0, len(prompt.token_ids) :].tolist()
    assert len(set(expected)) > 4
    assert driver.greedy([again(run)], 32)[0] == expected
    bench = engine_harness.bench(here.model, max_num_batched_tokens=40, block_size=4)
    request = EngineRequest(1, prompt, SamplingParams(32, temperature=0.0))
    cold, warm = (bench.run(request)[0] for _ in range(2))
    assert cold.tokens == warm.tokens == expected and warm.cached > 0


def test_prefill_cut_everywhere_inside_a_recording() -> None:
    here = served()
    prompt = here.prompt([recording(3_000, 3)], "{}?")
    driver, run = Driver(here.model, num_blocks=4096), here.run(prompt)
    whole = driver.prefill(again(run))
    for place in range(1, len(prompt.token_ids)):
        torch.testing.assert_close(driver.prefill(again(run), place), whole, atol=1e-4, rtol=0)


def test_larger_models_have_no_audio_tower(tmp_path: Path) -> None:
    checkpoints.make_gemma4(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    kept = {key: value for key, value in tensors.items() if "audio" not in key}
    checkpoints.write_weights(tmp_path, kept)
    with pytest.raises(CheckpointError, match=r"missing.*audio_tower"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "audio_config": None}))
    load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
