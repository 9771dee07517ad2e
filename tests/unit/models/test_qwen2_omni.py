"""Qwen2.5-Omni's thinker against transformers: features, counts, positions, rows, logits, greedy tokens, every cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.image_families import noise, normalised
from support.media_models import Served, load
from support.model_driver import Driver
from transformers import Qwen2VLImageProcessorPil, WhisperFeatureExtractor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES
from sensorium.errors import CheckpointError, MediaError, RequestError
from sensorium.models.loading import load_model
from sensorium.models.towers.blocks import MAX_ROWS
from sensorium.processors.qwen2_omni import Qwen2OmniProcessor
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.types import MediaItem, Prompt

RATE = 16_000
SMALL_FRAMES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 140}}
each_layout = pytest.mark.parametrize("layout", ["hub", "transformers"])


@cache
def served(layout: checkpoints.Layout = "hub", **audio: Any) -> Served:
    with TemporaryDirectory() as folder:
        path = Path(folder)
        return load(path, checkpoints.make_qwen2_omni(path, layout, video=SMALL_FRAMES, audio=audio))


def sound(seconds: float, seed: int = 0) -> MediaItem:
    """A chirp in noise that grows and falls silent: loud and quiet bins, also at the very end."""
    count = round(seconds * RATE)
    t = np.arange(count) / RATE
    hiss = np.random.default_rng(seed).normal(size=count)
    data = np.sin(2 * np.pi * (200 + 150 * seed + 300 * t) * t) * (0.1 + 0.4 * t / max(seconds, 1e-9)) + 0.01 * hiss
    data[count // 3 : count // 2] = 0
    data = data.astype(np.float32)
    return MediaItem("audio", data, hashlib.sha256(data.tobytes()).digest(), "messages[0]", RATE)


def clip(height: int, width: int, frames: int, duration_s: float, seed: int = 0) -> MediaItem:
    times = tuple(i * duration_s / frames for i in range(frames))
    return replace(noise(height, width, frames=frames, seed=seed), timestamps_s=times, duration_s=duration_s)


def published_features(clips: Sequence[MediaItem], chunk_s: int | None = None) -> dict[str, torch.Tensor]:
    """What transformers' processor gives the model: everything padded to `chunk_s` (published: 300), and a mask."""
    longest = max(len(one.data) for one in clips) / RATE
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=chunk_s or math.ceil(longest) + 1)
    made = extractor(
        [one.data for one in clips],
        sampling_rate=RATE,
        padding="max_length",
        return_tensors="pt",
        return_attention_mask=True,
    )
    return {"input_features": made["input_features"], "feature_attention_mask": made["attention_mask"]}


def oracle_inputs(here: Served, items: Sequence[MediaItem], prompt: Prompt) -> dict[str, Any]:
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pictures = [item.data for item in items if item.kind == "image"]
    if pictures:
        inputs |= Qwen2VLImageProcessorPil(
            **{
                k: here.preprocessor[k]
                for k in (
                    "patch_size",
                    "temporal_patch_size",
                    "merge_size",
                    "min_pixels",
                    "max_pixels",
                    "image_mean",
                    "image_std",
                )
            }
        )(pictures, return_tensors="pt", input_data_format="channels_last")
    sounds = [item for item in items if item.kind == "audio"]
    if sounds:
        inputs |= published_features(sounds)
    videos = [item for item in items if item.kind == "video"]
    if videos:  # transformers has no video processor without torchvision; frames are compared with pictures elsewhere
        arrays = [one.arrays for one in prompt.media if one.kind == "video"]
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate([normalised(one) for one in arrays]))
        inputs["video_grid_thw"] = torch.tensor(np.stack([one["grid"] for one in arrays])).long()
        inputs["video_second_per_grid"] = torch.tensor([2 * one.duration_s / len(one.data) for one in videos])
    return inputs


def theirs_of(here: Served, items: Sequence[MediaItem], prompt: Prompt) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = here.oracle(**oracle_inputs(here, items, prompt)).logits[0]
    return logits


MIXED = [
    noise(60, 90, seed=1),
    sound(2.3),
    clip(70, 100, 5, 2.7, seed=2),
    noise(150, 40, seed=4),
    sound(0.1, seed=1),
    clip(56, 56, 4, 40.0, seed=3),
]
SETS = {
    "all": MIXED,
    "pictures": [noise(130, 170), noise(60, 60, seed=2)],
    "sounds": [sound(0.1), sound(4.5, seed=1)],
    "videos": [clip(70, 100, 5, 2.7), clip(60, 60, 3, 1.0, seed=1)],
    "text": [],
}


@each_layout
@pytest.mark.parametrize("name", list(SETS))
def test_logits_equal_transformers(name: str, layout: str) -> None:
    here, items = served(layout), SETS[name]
    prompt = here.prompt(items)
    ours = Driver(here.model, num_blocks=1024).prefill(here.run(prompt))
    torch.testing.assert_close(ours, theirs_of(here, items, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(SETS))
def test_greedy_tokens_equal_transformers(name: str) -> None:
    here, items = served(), SETS[name]
    prompt = here.prompt(items)
    ours = Driver(here.model, num_blocks=1024).greedy([here.run(prompt)], 32)[0]
    made = here.oracle.generate(
        **oracle_inputs(here, items, prompt), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
    )
    assert ours == made[0, len(prompt.token_ids) :].tolist()
    assert len(set(ours)) > 4, "a model that runs in circles shows nothing"


def test_prefill_cut_everywhere_inside_media() -> None:
    here = served()
    items = [clip(56, 84, 5, 2.0), sound(0.9), noise(60, 90)]
    prompt = here.prompt(items)
    driver = Driver(here.model, num_blocks=4096)
    whole = driver.prefill(here.run(prompt))
    torch.testing.assert_close(whole, theirs_of(here, items, prompt), atol=1e-4, rtol=0)
    for place in sorted({place for s in prompt.spans for place in range(s.offset, s.offset + s.length + 1)}):
        torch.testing.assert_close(driver.prefill(here.run(prompt), place), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(driver.prefill(here.run(prompt), *[1] * len(whole)), whole, atol=1e-4, rtol=0)


def test_unequal_requests_together_equal_one_by_one() -> None:
    here = served()
    prompts = [
        here.prompt(items, text="a{}" + " word" * i)
        for i, items in enumerate(
            [[], [sound(0.3)], [clip(56, 56, 3, 1.5)], [noise(60, 90), sound(1.0, seed=2)], [sound(0.2, seed=3)]]
        )
    ]
    alone = [Driver(here.model).greedy([here.run(prompt)], 12)[0] for prompt in prompts]
    assert Driver(here.model, num_blocks=1024).greedy([here.run(prompt) for prompt in prompts], 12) == alone


# Vision: the windowed tower.


@pytest.mark.parametrize(
    "sizes",
    [
        [(56, 56)],
        [(1, 1)],
        [(57, 85)],
        [(300, 60), (60, 300)],
        [(60, 90), (56, 56), (400, 300)],
        [(28, 2000)],
        [(8, 1600)],
        [(1260, 900)],
    ],
    ids=str,
)
def test_picture_rows_equal_transformers(sizes: list[tuple[int, int]]) -> None:
    here = served()
    items = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = here.prompt(items)
    inputs = oracle_inputs(here, items, prompt)
    with torch.inference_mode():
        theirs = here.oracle.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    for ours, expected, one in zip(here.encode(prompt.media), theirs, prompt.media, strict=True):
        assert len(ours) == one.num_rows
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_video_rows_equal_transformers_beside_pictures() -> None:
    here = served()
    items = [clip(130, 90, 7, 3.0), clip(56, 56, 2, 1.0, seed=1)]
    prompt = here.prompt(items)
    inputs = oracle_inputs(here, items, prompt)
    with torch.inference_mode():
        theirs = here.oracle.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    for ours, expected in zip(here.encode(prompt.media), theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    still = here.processor.process(noise(200, 200, seed=3))
    with torch.inference_mode():
        both = here.model.encode(
            "image", [{k: torch.from_numpy(v) for k, v in one.arrays.items()} for one in (still, prompt.media[0])]
        )
    torch.testing.assert_close(both[1], theirs[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[0], here.encode([still])[0], atol=1e-5, rtol=1e-5)


def test_videos_larger_than_a_group() -> None:
    here = served()
    here = replace(here, processor=here.processor.with_overrides({"max_pixels": 130 * 130}))
    items = [clip(126, 126, 128, 64.0), clip(56, 56, 2, 1.0, seed=1)]
    prompt = here.prompt(items)
    inputs = oracle_inputs(here, items, prompt)
    assert len(inputs["pixel_values_videos"]) > MAX_ROWS / 2
    with torch.inference_mode():
        theirs = here.oracle.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    for ours, expected in zip(here.encode([*prompt.media, *prompt.media[:1]]), [*theirs, theirs[0]], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_a_picture_of_one_window_and_one_of_many_together() -> None:
    here = served()
    media = [here.processor.process(noise(*size, seed=i)) for i, size in enumerate([(56, 56), (200, 140), (56, 56)])]
    for one, rows in zip(media, here.encode(media), strict=True):
        torch.testing.assert_close(here.encode([one])[0], rows, atol=1e-5, rtol=1e-5)


# Sounds.


@pytest.mark.parametrize(
    ("seconds", "chunk_s"), [(0.1, 2), (0.105, 2), (0.31, 2), (1.0, 2), (1.2345, 2), (2.0, 3), (3.999, 5), (0.25, 300)]
)
def test_features_equal_transformers(seconds: float, chunk_s: int) -> None:
    item = sound(seconds)
    mel = served().processor.process(item).arrays["mel"]
    made = published_features([item], chunk_s)  # in float32
    frames = int(made["feature_attention_mask"].sum())
    assert mel.shape == (128, frames)
    np.testing.assert_allclose(mel, made["input_features"][0, :, :frames], atol=1e-4)
    padded = np.pad(item.data, (0, chunk_s * RATE - len(item.data)))
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=chunk_s)
    exact = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    np.testing.assert_allclose(mel, exact[:, :frames], atol=1e-6)


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.99, 2.0, 2.01, 30.0, 95.0])
def test_sound_rows_equal_transformers(seconds: float) -> None:
    here, item = served(), sound(seconds)
    features = here.processor.process(item)
    with torch.inference_mode():
        theirs = here.oracle.get_audio_features(**published_features([item])).last_hidden_state
    ours = here.encode([features])[0]
    assert len(ours) == features.num_rows == here.processor.num_tokens("audio", 1, 1, len(item.data))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_long_sound_logits_equal_transformers() -> None:
    here, items = served(), [sound(95.0)]
    prompt = here.prompt(items)
    assert prompt.media[0].num_rows == 2375
    ours = Driver(here.model, num_blocks=1024).prefill(here.run(prompt), 700, 701, 500)
    torch.testing.assert_close(ours, theirs_of(here, items, prompt), atol=1e-4, rtol=0)


def test_sounds_longer_than_the_published_limit_are_heard_to_their_end() -> None:
    processor = served().processor
    assert processor.num_tokens("audio", 1, 1, 400 * RATE) == 10_000


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 320, 321])
def test_the_shortest_sounds_are_one_row(samples: int) -> None:
    here = served()
    item = MediaItem("audio", np.full(samples, 0.1, np.float32), b"x", sample_rate=RATE)
    features = here.processor.process(item)
    assert features.num_rows == 1 == here.processor.num_tokens("audio", 1, 1, samples)
    assert here.encode([features])[0].isfinite().all()


def test_silence() -> None:
    here = served()
    features = here.processor.process(MediaItem("audio", np.zeros(RATE, np.float32), b"x", sample_rate=RATE))
    assert here.encode([features])[0].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(480, 4_000_000))
def test_counts_of_sounds(samples: int) -> None:
    frames = -(-samples // 160)
    expected = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    assert served().processor.num_tokens("audio", 1, 1, samples) == expected


# Positions.


@pytest.mark.parametrize("name", [name for name in SETS if name != "text"])
def test_positions_equal_transformers(name: str) -> None:
    here, items = served(), SETS[name]
    prompt = here.prompt(items)
    inputs = oracle_inputs(here, items, prompt)
    expected, delta = here.oracle.model.get_rope_index(
        inputs["input_ids"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        inputs["attention_mask"],
        audio_seqlens=inputs["feature_attention_mask"].sum(-1) if "feature_attention_mask" in inputs else None,
        second_per_grids=inputs.get("video_second_per_grid"),
    )
    if name == "sounds":
        assert (prompt.positions, prompt.position_delta, int(delta)) == (None, 0, 0)
        return
    np.testing.assert_array_equal(prompt.positions, expected[:, 0])
    assert prompt.position_delta == int(delta)


@pytest.mark.parametrize(
    ("frames", "duration_s", "times"),
    [
        (20, 10.0, [0, 25, 50, 75, 100, 125, 150, 175, 200, 225]),
        (4, 1.0, [0, 12]),
        (4, 2.7, [0, 33]),
        (6, 0.1, [0, 0, 1]),
        (3, 3.0, [0, 50]),
        (6, 600.0, [0, 5000, 10000]),
    ],
)
def test_video_time_in_positions(frames: int, duration_s: float, times: list[int]) -> None:
    here = served()
    prompt = here.prompt([clip(56, 56, frames, duration_s)], text="{}")
    assert prompt.positions is not None
    span = prompt.spans[0]
    axis = prompt.positions[0, span.offset : span.offset + span.length]
    assert sorted(set((axis - axis[0]).tolist())) == sorted(set(times))
    assert prompt.positions[0, span.offset + span.length] == axis.max() + 1 or max(times) == 0


def test_time_from_timestamps_where_the_duration_is_unknown() -> None:
    here = served()
    video = replace(clip(56, 56, 4, 8.0), duration_s=0.0)  # two seconds apart
    assert here.processor.process(video).arrays["seconds"].tolist() == [4.0]
    assert here.processor.process(replace(video, timestamps_s=())).arrays["seconds"].tolist() == [1.0]


def test_time_is_part_of_the_key() -> None:
    here = served()
    video = clip(56, 56, 4, 8.0)
    assert here.processor.process(video).key != here.processor.process(replace(video, duration_s=4.0)).key


# Prompts.


def test_expansion_and_sampling() -> None:
    here = served()
    processor = here.processor
    assert processor.sample_rate == RATE and processor.video_sampling().fps == 2.0
    ids = {token: processor.tokenizer.token_to_id(token) for token in checkpoints.OMNI_SPECIALS}
    prompt = here.prompt([sound(0.1), noise(56, 56)], text="{}")
    joint = len(processor.tokenizer.encode(" and "))
    assert prompt.token_ids.tolist() == [
        ids["<|audio_bos|>"],
        *[ids["<|AUDIO|>"]] * 2,
        ids["<|audio_eos|>"],
        *processor.tokenizer.encode(" and "),
        ids["<|vision_bos|>"],
        *[ids["<|IMAGE|>"]] * 4,
        ids["<|vision_eos|>"],
    ]
    assert [(s.item, s.offset, s.length) for s in prompt.spans] == [(0, 1, 2), (1, 5 + joint, 4)]


def test_every_kind_needs_its_placeholder() -> None:
    processor = served().processor
    with pytest.raises(RequestError, match=r"0 audio placeholder\(s\), but the request brings 1 audio"):
        processor.build(
            processor.placeholder("image", 0), [processor.process(noise(56, 56)), processor.process(sound(0.1))]
        )
    with pytest.raises(MediaError, match="too narrow"):
        processor.num_tokens("video", 4, 1000, 4)


def test_chat_without_a_template_of_the_checkpoints_own() -> None:
    processor = served().processor
    template = LocalTemplate(
        FAMILIES["Qwen2_5OmniModel"].chat_template or "",
        processor.tokenizer,
        modalities=processor.modalities,
        placeholder=processor.placeholder,
    )
    items = [sound(0.5), noise(60, 90), clip(56, 56, 4, 2.0)]
    parts = [part for item in items for part in (MediaPart(item.kind), TextPart(f"({item.kind}) "))]
    text = template.render([Message("user", tuple(parts))])
    user = (
        "<|audio_bos|><|AUDIO|><|audio_eos|>(audio) <|vision_bos|><|IMAGE|><|vision_eos|>(image) "
        "<|vision_bos|><|VIDEO|><|vision_eos|>(video) "
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = processor.build(text, [processor.process(item) for item in items])
    assert [span.item for span in prompt.spans] == [0, 1, 2]


# Weights.


def in_memory(key: str) -> str:
    """The names that transformers has in memory and that it saves when it is told not to go back."""
    key = key.removeprefix("thinker.")
    if key.startswith(("visual.", "audio_tower.")):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


@pytest.mark.parametrize("rename", [in_memory, lambda key: f"thinker.{in_memory(key)}"])
def test_weight_dialects(rename: Callable[[str], str], tmp_path: Path) -> None:
    oracle = checkpoints.make_qwen2_omni(tmp_path, "transformers", video=SMALL_FRAMES)
    checkpoints.write_weights(tmp_path, {rename(k): v for k, v in checkpoints.read_weights(tmp_path).items()})
    here, reference = load(tmp_path, oracle), served()
    media = [reference.processor.process(item) for item in MIXED]
    for ours, expected in zip(here.encode(media), reference.encode(media), strict=True):
        torch.testing.assert_close(ours, expected, atol=0, rtol=0)
    ids = torch.arange(20)
    torch.testing.assert_close(here.model.embed(ids), reference.model.embed(ids), atol=0, rtol=0)


@pytest.mark.parametrize(
    "key",
    [
        "visual.blocks.1.attn.k.bias",
        "audio_tower.proj.weight",
        "visual.merger.ln_q.weight",
        "visual.blocks.0.mlp.up_proj.bias",
        "model.norm.weight",
    ],
)
def test_missing_and_unexpected_tensors_are_named(key: str, tmp_path: Path) -> None:
    checkpoints.make_qwen2_omni(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    checkpoints.write_weights(tmp_path, {name: value for name, value in tensors.items() if name != f"thinker.{key}"})
    with pytest.raises(CheckpointError, match="missing"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    checkpoints.write_weights(tmp_path, {**tensors, f"thinker.{key}.more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=rf"unexpected .*{key}\.more"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("architecture", ["Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"])
def test_the_thinkers_part_of_the_configuration(architecture: str, tmp_path: Path) -> None:
    import json

    checkpoints.make_qwen2_omni(tmp_path, dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [architecture]
    config["thinker_config"]["text_config"].pop("model_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path)
    assert (found.architecture, found.dtype) == (architecture, "bfloat16")
    assert found.text is not None and not found.text.tie_word_embeddings
    assert set(found.stop_token_ids) == {
        config["thinker_config"]["text_config"]["eos_token_id"],
        config["thinker_config"]["text_config"]["bos_token_id"],
    }
    config["quantization_config"] = {"quant_method": "aqlm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="aqlm"):
        open_checkpoint(tmp_path)


def test_bfloat16_rows_are_close(tmp_path: Path) -> None:
    checkpoints.make_qwen2_omni(tmp_path, video=SMALL_FRAMES)
    here = served()
    rounded = replace(here, model=load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16, device="cpu"))
    media = [here.processor.process(item) for item in MIXED]
    for ours, expected in zip(rounded.encode(media), here.encode(media), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - expected).norm() < 0.03 * expected.norm()


def test_processor_class() -> None:
    assert type(served().processor) is Qwen2OmniProcessor
