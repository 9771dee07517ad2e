"""Qwen3-Omni's thinker against transformers: positions, a video's sound, rows, logits, greedy tokens, every cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints, engine_harness, speech
from support.image_families import noise, normalised
from support.media_models import Served, again, load
from support.model_driver import Driver
from support.speech import recording
from transformers import Qwen2VLImageProcessorPil, WhisperFeatureExtractor

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES
from sensorium.errors import CheckpointError, RequestError
from sensorium.ipc import messages
from sensorium.models.loading import load_model
from sensorium.processors.base import Processor
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.types import EngineRequest, MediaFeatures, MediaItem, MediaSpan, Prompt, SamplingParams

SMALL_FRAMES = {"size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 128}}
AV = {"use_audio_in_video": True}
each_layout = pytest.mark.parametrize("layout", ["hub", "transformers"])


@cache
def folder_of(layout: str) -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def served(layout: checkpoints.Layout = "hub", *, hears_videos: bool = False) -> Served:
    if hears_videos:
        plain = served(layout)
        return replace(plain, processor=plain.processor.with_overrides(AV))
    folder = Path(folder_of(layout).name)
    return load(folder, speech.make_qwen3_omni(folder, layout, video=SMALL_FRAMES))


def clip(height: int, width: int, frames: int, duration_s: float, seed: int = 0) -> MediaItem:
    times = tuple(i * duration_s / frames for i in range(frames))
    return replace(noise(height, width, frames=frames, seed=seed), timestamps_s=times, duration_s=duration_s)


def oracle_inputs(items: Sequence[MediaItem], prompt: Prompt, *, hears_videos: bool = False) -> dict[str, Any]:
    """A video's pixels are ours: transformers has no processor of videos without torchvision."""
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = [item for item in items if item.kind == "image"]
    if images:
        inputs |= pixels_of_transformers(images)
    videos = [item for item in items if item.kind == "video"]
    if videos:
        arrays = [one.arrays for one in prompt.media if one.kind == "video"]
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate([normalised(one) for one in arrays]))
        inputs["video_grid_thw"] = torch.tensor(np.stack([one["grid"] for one in arrays])).long()
        inputs["video_second_per_grid"] = torch.tensor([2 * one.duration_s / len(one.data) for one in videos])
        inputs["use_audio_in_video"] = hears_videos
    audios = [item for item in items if item.kind == "audio"]
    if audios:
        inputs |= features_of_transformers(audios)
    return inputs


def pixels_of_transformers(images: Sequence[MediaItem]) -> dict[str, torch.Tensor]:
    names = ("patch_size", "temporal_patch_size", "merge_size", "size", "image_mean", "image_std")
    processor = Qwen2VLImageProcessorPil(**{name: served().preprocessor[name] for name in names})
    made: dict[str, torch.Tensor] = processor(
        [item.data for item in images], return_tensors="pt", input_data_format="channels_last"
    )
    return made


def features_of_transformers(clips: Sequence[MediaItem]) -> dict[str, torch.Tensor]:
    """Clip by clip, of which each is its own longest."""
    extractor, how = WhisperFeatureExtractor(feature_size=128), {"padding": "longest", "truncation": False}
    mels = [
        extractor(one.data, sampling_rate=speech.RATE, return_tensors="pt", **how)["input_features"] for one in clips
    ]
    longest = max(mel.shape[-1] for mel in mels)
    mask = torch.tensor([[i < mel.shape[-1] for i in range(longest)] for mel in mels]).long()
    padded = [torch.nn.functional.pad(mel, (0, longest - mel.shape[-1])) for mel in mels]
    return {"input_features": torch.cat(padded), "feature_attention_mask": mask}


def theirs_of(here: Served, items: Sequence[MediaItem], prompt: Prompt, **how: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = here.oracle(**oracle_inputs(items, prompt, **how)).logits[0]
    return logits


# transformers fills a clip of less than a second up to the longest beside it, which the last row of some lengths sees.
MIXED = (
    noise(60, 90, seed=1),
    recording(37_000, 2),
    clip(70, 100, 5, 2.7, seed=2),
    noise(150, 40, seed=4),
    recording(9_000, 1),
    clip(64, 64, 4, 4.0, seed=3),
)
HEARD = (noise(60, 90, seed=1), clip(70, 100, 5, 2.7, seed=2), recording(37_000, 2))
SETS: dict[str, tuple[MediaItem, ...]] = {
    "all": MIXED,
    "images": (noise(130, 170), noise(60, 60, seed=2)),
    "audio": (recording(9_000), recording(72_000, 1)),
    "videos": (clip(70, 100, 5, 2.7), clip(64, 64, 3, 1.0, seed=1)),
    "heard": HEARD,
    "text": (),
}


# Positions.


def placed(seed: str, grids: dict[str, tuple[Any, ...]]) -> tuple[np.ndarray, int | float, str]:
    """`seed` as in the table of facts: . text, ( ) < > ends, a i v items. -> (time axis, delta, rows in order)"""
    processor = served(hears_videos="(va" in seed or "(av" in seed).processor
    ids, media = dict.fromkeys("aiv", 0), list[MediaFeatures]()
    text = "".join(
        {
            "(": "<|audio_start|>",
            ")": "<|audio_end|>",
            "<": "<|vision_start|>",
            ">": "<|vision_end|>",
            "i": "<|image_pad|>",
            "v": "<|video_pad|>",
            "a": "<|audio_pad|>",
            ".": "a",
        }[letter]
        for letter in seed.replace("(va)", "v")
    )
    for letter in seed:
        if letter in ids:
            media.append(media_of(letter, grids[f"{letter}{ids[letter]}"]))
            ids[letter] += 1
    prompt = processor.build(text, media)
    kinds = {"image": "i", "video": "v", "audio": "a"}
    rows = "".join(kinds[prompt.media[span.item].kind] * span.length for span in prompt.spans)
    positions = np.arange(len(prompt.token_ids)) if prompt.positions is None else prompt.positions[0]
    return positions, prompt.position_delta, rows


def media_of(letter: str, size: tuple[Any, ...]) -> MediaFeatures:
    if letter == "a":
        rows = served().processor.num_tokens("audio", 1, 1, size[0] * 160)
        return MediaFeatures("audio", b"a", rows, {"mel": np.zeros((128, size[0]), np.float32)})
    arrays: dict[str, Any] = {"grid": np.array(size[:3], np.int32)}
    if letter == "v":
        arrays["seconds"] = np.array([size[3]], np.float32)
    rows = size[0] * size[1] * size[2] // 4
    return MediaFeatures("image" if letter == "i" else "video", b"v", rows, arrays)


@pytest.mark.parametrize(
    ("seed", "grids", "length", "delta", "axis"),
    [
        ("...(a)..", {"a0": (150,)}, 27, 0, [*range(27)]),
        ("..<i>.(a)..", {"i0": (1, 4, 6), "a0": (50,)}, 22, -3, [0, 1, 2, *[3] * 6, 6, 7, *range(8, 19)]),
        ("..<v>..", {"v0": (3, 4, 4, 2.0)}, 18, 41, [0, 1, 2, *[3] * 4, *[29] * 4, *[55] * 4, 56, 57, 58]),
        (
            "..<(va)>..",
            {"v0": (2, 4, 4, 1.0), "a0": (200,)},
            42,
            -8,
            [*range(4), *[4] * 4, *range(4, 17), *[17] * 4, *range(17, 30), *range(30, 34)],
        ),
        ("..<(va)>.", {"v0": (1, 8, 4, 0.5), "a0": (300,)}, 54, -8, [*range(4), *[4] * 8, *range(4, 43), 43, 44, 45]),
        (".(a).<v>.", {"a0": (99,), "v0": (2, 4, 4, 1.0)}, 28, 6, [*range(18), *[18] * 4, *[31] * 4, 32, 33]),
        (
            ".<v>.",
            {"v0": (3, 4, 4, 0.6667)},
            16,
            6.3342,
            [0, 1, *[2] * 4, *[10.667] * 4, *[19.334] * 4, 20.334, 21.334],
        ),
    ],
)
def test_positions_are_the_known_ones(
    seed: str, grids: dict[str, tuple[Any, ...]], length: int, delta: float, axis: list[float]
) -> None:
    found, moved, rows = placed(seed, grids)
    assert len(found) == length and moved == pytest.approx(delta, abs=1e-3)
    np.testing.assert_allclose(found, axis, atol=1e-3)
    assert isinstance(moved, float) == (delta != int(delta))
    if "(va)" in seed and grids["v0"][0] == 2:
        assert rows == "v" * 4 + "a" * 13 + "v" * 4 + "a" * 13


def test_positions_of_random_prompts_equal_transformers() -> None:
    """Every order of everything, with and without sound in videos, and times between whole numbers."""
    draw = random.Random(5)
    model: Any = served().oracle.model
    for number in range(120):
        heard = number % 2 == 1
        parts, media = ["."], list[MediaFeatures]()
        for _ in range(draw.randrange(1, 5)):
            letter = draw.choice("iv" if heard else "iva")
            size = draw.choice([2, 4, 6, 10]), draw.choice([2, 4, 8])
            media.append(
                media_of(
                    letter,
                    {
                        "i": (1, *size),
                        "v": (draw.randrange(1, 5), *size, draw.choice([0.5, 1.0, 2.0, 0.6667, 0.37])),
                        "a": (draw.randrange(2, 400),),
                    }[letter],
                )
            )
            marker = {"i": "<|image_pad|>", "v": "<|video_pad|>", "a": "<|audio_pad|>"}[letter]
            around = ("<|audio_start|>", "<|audio_end|>") if letter == "a" else ("<|vision_start|>", "<|vision_end|>")
            parts += [f"{around[0]}{marker}{around[1]}", "a" * draw.randrange(3)]
            if letter == "v" and heard:
                media.append(media_of("a", (draw.randrange(2, 400),)))
        processor = served(hears_videos=heard).processor
        prompt = processor.build("".join(parts), media)
        grids = {
            kind: torch.from_numpy(np.stack(found)).long()
            for kind in ("image", "video")
            if (found := [one.arrays["grid"] for one in media if one.kind == kind])
        }
        seconds = [float(one.arrays["seconds"][0]) for one in media if one.kind == "video"]
        lengths = [one.arrays["mel"].shape[1] for one in media if one.kind == "audio"]
        ids = torch.from_numpy(prompt.token_ids).long()[None]
        expected, delta = model.get_rope_index(
            ids,
            grids.get("image"),
            grids.get("video"),
            torch.ones_like(ids),
            heard,
            torch.tensor(lengths) if lengths else None,
            torch.tensor(seconds) if seconds else None,
        )
        ours = np.broadcast_to(np.arange(ids.shape[1]), (3, ids.shape[1]))
        np.testing.assert_array_equal(ours if prompt.positions is None else prompt.positions, expected[:, 0].numpy())
        assert prompt.position_delta == pytest.approx(float(delta), abs=1e-4)


# Rows.


def test_audio_features_and_rows_equal_transformers() -> None:
    here = served()
    for samples in (320, 400, 1_700, 8_000, 16_000, 16_001, 40_000, 72_000):
        item = recording(samples, samples)
        features, made = here.processor.process(item), features_of_transformers([item])
        np.testing.assert_allclose(features.arrays["mel"], made["input_features"][0], atol=1e-4)
        with torch.inference_mode():
            theirs = here.oracle.model.get_audio_features(**made).last_hidden_state
        ours = here.encode([features])[0]
        assert len(ours) == features.num_rows == here.processor.num_tokens("audio", 1, 1, samples)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("samples", "rows"),
    [(1, 1), (320, 1), (7999, 7), (24_000, 20), (240_000, 195), (960_000, 780), (19_200_000, 15_600)],
)
def test_rows_of_audio(samples: int, rows: int) -> None:
    assert served().processor.num_tokens("audio", 1, 1, samples) == rows


@pytest.mark.parametrize("sizes", [[(64, 64)], [(57, 85), (300, 60)], [(130, 170), (64, 64), (400, 300)]])
def test_image_pixels_and_rows_equal_transformers(sizes: list[tuple[int, int]]) -> None:
    here = served()
    items = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    media = [here.processor.process(item) for item in items]
    made = pixels_of_transformers(items)
    model: Any = here.oracle.model
    with torch.inference_mode():
        theirs = model.get_image_features(made["pixel_values"], made["image_grid_thw"])
    rows = zip(theirs.pooler_output, *theirs.deepstack_features, strict=True)
    for ours, expected, one in zip(here.encode(media), rows, media, strict=True):
        assert len(ours) == one.num_rows
        torch.testing.assert_close(ours, torch.cat(expected, 1), atol=1e-4, rtol=0)


# The whole.


@each_layout
@pytest.mark.parametrize("name", list(SETS))
def test_logits_equal_transformers(name: str, layout: checkpoints.Layout) -> None:
    heard = name == "heard"
    here, items = served(layout, hears_videos=heard), SETS[name]
    prompt = here.prompt(items)
    ours = Driver(here.model, num_blocks=1024).prefill(here.run(prompt))
    theirs = theirs_of(here, items, prompt, hears_videos=heard)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_prefill_cut_everywhere_inside_media() -> None:
    here = served(hears_videos=True)
    items = (clip(64, 96, 4, 2.7), recording(17_000), noise(60, 60))
    prompt = here.prompt(items)
    assert prompt.positions is not None and prompt.positions.dtype == np.float32
    driver, run = Driver(here.model, num_blocks=4096), here.run(prompt)
    whole = driver.prefill(again(run))
    torch.testing.assert_close(whole, theirs_of(here, items, prompt, hears_videos=True), atol=1e-4, rtol=0)
    for place in sorted({place for s in prompt.spans for place in range(s.offset, s.offset + s.length + 1)}):
        torch.testing.assert_close(driver.prefill(again(run), place), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(driver.prefill(again(run), *[1] * len(whole)), whole, atol=1e-4, rtol=0)


@cache
def greedy_of(name: str) -> list[int]:
    """transformers' 32 tokens."""
    heard = name == "heard"
    here, items = served(hears_videos=heard), SETS[name]
    prompt = here.prompt(items)
    made = here.oracle.generate(
        **oracle_inputs(items, prompt, hears_videos=heard),
        **{"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "eos_token_id": None},
    )
    tokens: list[int] = made[0, len(prompt.token_ids) :].tolist()
    return tokens


def requests_of(names: Sequence[str]) -> list[EngineRequest]:
    made = []
    for index, name in enumerate(names, 1):
        prompt = served(hears_videos=name == "heard").prompt(SETS[name])
        made.append(EngineRequest(index, prompt, SamplingParams(max_tokens=32, temperature=0.0)))
    return made


def test_greedy_tokens_cold_warm_and_together() -> None:
    expected = [greedy_of(name) for name in SETS]
    assert all(len(set(tokens)) > 4 for tokens in expected), "a model that runs in circles shows nothing"
    bench = engine_harness.bench(served().model, block_size=4)
    for request, tokens in zip(requests_of(list(SETS)), expected, strict=True):
        cold, warm = (bench.run(request)[0] for _ in range(2))
        assert cold.tokens == warm.tokens == tokens
        assert warm.cached > 0
    together = engine_harness.bench(served().model).run(*requests_of(list(SETS)))
    assert engine_harness.tokens_of(together) == expected


def test_greedy_tokens_in_chunks_and_after_preemption() -> None:
    """A step has fewer tokens than an item has rows, and the cache room for the longest request and little more."""
    expected = [greedy_of(name) for name in SETS]
    longest = max(len(request.prompt.token_ids) for request in requests_of(list(SETS))) + 32
    bench = engine_harness.bench(
        served().model, block_size=4, kv_tokens=(longest + 40) // 4 * 4, max_num_batched_tokens=11
    )
    results = bench.run(*requests_of(list(SETS)))
    assert engine_harness.tokens_of(results) == expected
    assert sum(result.preemptions for result in results) > 0


def test_positions_between_whole_numbers_cross_to_the_engine() -> None:
    request = requests_of(["videos"])[0]
    payload = b"".join(bytes(piece) for piece in messages.encode_request(request))
    ((_, frame),) = messages.FrameReader().feed(payload)
    found = messages.decode_request(memoryview(frame)).prompt
    assert request.prompt.positions is not None and found.positions is not None
    np.testing.assert_array_equal(found.positions, request.prompt.positions)
    assert found.position_delta == request.prompt.position_delta != int(request.prompt.position_delta)


# Prompts.


def test_a_videos_sound_stands_between_its_frames() -> None:
    here = served(hears_videos=True)
    name = here.processor.tokenizer.id_to_token
    video, sound = here.processor.placeholder("video", 0), here.processor.placeholder("audio", 0)
    media = [here.processor.process(item) for item in (clip(64, 64, 4, 2.0), recording(40_000))]
    for text in (f"a{video}{sound}b", f"a{video}b"):  # clients may leave the sound's own place out
        prompt = here.processor.build(text, media)
        ids = prompt.token_ids.tolist()
        first, last = prompt.spans[0], prompt.spans[-1]
        assert [name(ids[first.offset - 2 + i]) for i in range(2)] == ["<|vision_start|>", "<|audio_start|>"]
        end = last.offset + last.length
        assert [name(ids[end + i]) for i in range(2)] == ["<|audio_end|>", "<|vision_end|>"]
        assert sum(span.length for span in prompt.spans) == end - first.offset
        assert [(s.item, s.row, s.length) for s in prompt.spans] == [(0, 0, 4), (1, 0, 13), (0, 4, 4), (1, 13, 20)]


def test_every_video_needs_its_sound() -> None:
    processor = served(hears_videos=True).processor
    video, media = processor.placeholder("video", 0), [processor.process(clip(64, 64, 4, 2.0))]
    with pytest.raises(RequestError, match=r"1 video\(s\) and 0 audio"):
        processor.build(video, media)
    audio = processor.process(recording(9_000))
    with pytest.raises(RequestError, match="placeholder"):
        processor.build("no place", [*media, audio])
    with pytest.raises(RequestError, match=r"use_audio_in_video.*true or false"):
        processor.with_overrides({"use_audio_in_video": "yes"})
    assert len(served().processor.build(f"{video}{processor.placeholder('audio', 0)}", [*media, audio]).spans) == 2


def test_chat_without_a_template_of_the_checkpoints_own() -> None:
    processor: Processor = served().processor
    template = LocalTemplate(
        FAMILIES["Qwen3OmniMoeForConditionalGeneration"].chat_template or "",
        processor.tokenizer,
        modalities=processor.modalities,
        placeholder=processor.placeholder,
    )
    parts = (MediaPart("video"), MediaPart("audio"), MediaPart("image"), TextPart("So?"))
    assert template.render([Message("user", parts)]) == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|audio_start|><|audio_pad|><|audio_end|>"
        "<|vision_start|><|image_pad|><|vision_end|>So?<|im_end|>\n<|im_start|>assistant\n"
    )


# Weights.


@pytest.mark.parametrize(
    "key", ["visual.merger_list.1.mlp.0.weight", "audio_tower.conv_out.weight", "model.layers.1.mlp.gate.weight"]
)
def test_missing_and_unexpected_tensors_are_named(key: str, tmp_path: Path) -> None:
    speech.make_qwen3_omni(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    checkpoints.write_weights(tmp_path, {name: value for name, value in tensors.items() if name != f"thinker.{key}"})
    with pytest.raises(CheckpointError, match="missing"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    checkpoints.write_weights(tmp_path, {**tensors, f"thinker.{key}.more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="unexpected"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


def test_span_of_a_part_of_a_video_has_its_own_places() -> None:
    """What `positions` is asked for need not begin with a group of frames."""
    processor = served().processor
    media = [media_of("v", (2, 4, 4, 1.0))]
    ids = np.zeros(8, np.int32)
    whole, _ = processor.positions(ids, [MediaSpan(0, 0, 8)], media)
    assert whole is not None and whole[0].tolist() == [0] * 4 + [13] * 4
