"""Gemma 3's own: images computed whole by the engine, crops, the text around images, EmbeddingGemma, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import make_gemma3, make_gemma3_text
from support.engine_harness import bench
from support.image_families import noise, record, word_tokenizer
from support.media_models import Served, load
from support.model_driver import Driver
from transformers import AutoModel, Gemma3ImageProcessorPil

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.loading import build_engine, load_engine
from sensorium.errors import CheckpointError, RequestError, StartupError
from sensorium.models.loading import load_model
from sensorium.processors.gemma3 import Gemma3Processor
from sensorium.types import EngineRequest, PoolingParams, Prompt, SamplingParams

IDS = {"<s>": 2, "<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144}
FOUR_B = {
    "model_type": "gemma3",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
PUBLISHED = {"size": {"height": 896, "width": 896}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 20,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.3,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Sixteen rows of an image, of which the window reaches six."""
    folder = tmp_path_factory.mktemp("gemma3")
    options: dict[str, Any] = {"mm_tokens_per_image": 16, "tie_word_embeddings": False}
    return load(folder, make_gemma3(folder, text={"sliding_window": 6}, **options))


def oracle_inputs(here: Served, prompt: Prompt, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    is_image = (ids == here.oracle.config.image_token_id).int()
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": is_image}


@pytest.mark.parametrize(("chunk", "preempted"), [(3, False), (19, True)])
def test_an_image_is_computed_whole_however_small_steps_are(served: Served, chunk: int, preempted: bool) -> None:
    """Cold, from a prefix that ends inside an image, and computed again after preemption."""
    items = [noise(50, 70), noise(30, 30, seed=1)]
    prompts = [
        served.prompt(items, "look: {}?"),
        served.prompt(items[:1], "look: {} and tell what it is"),
        served.prompt([], "nothing to see"),
    ]
    sampling = SamplingParams(6, temperature=0.0, logprobs=1)
    expected = [bench(served.model).run(EngineRequest(1, prompt, sampling))[0] for prompt in prompts]
    engine = bench(served.model, max_num_batched_tokens=chunk, block_size=4)
    scheduler = engine.engine.scheduler

    def preempt(step: int) -> None:
        if preempted and step % 7 == 6 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for turn in range(2):
        asked = [EngineRequest(10 * turn + i, one, sampling) for i, one in enumerate(prompts)]
        results = engine.run(*asked, before_step=preempt)
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.tokens == theirs.tokens
            assert [one.logprob for one in ours.logprobs] == pytest.approx(
                [one.logprob for one in theirs.logprobs], abs=1e-4
            )
        assert turn == 0 or results[0].cached > prompts[0].spans[0].offset
    assert (scheduler.preemptions > 0) == preempted


def test_the_same_tokens_as_transformers_beyond_the_window(served: Served) -> None:
    prompt = served.prompt([noise(50, 70), noise(30, 30, seed=1)], "look: {}?")
    pixels = torch.cat([torch.from_numpy(one.arrays["pixels"]) for one in prompt.media])
    inputs = oracle_inputs(served, prompt, pixels)
    with torch.inference_mode():
        theirs = served.oracle(**inputs).logits[0]
    torch.testing.assert_close(Driver(served.model).prefill(served.run(prompt)), theirs, atol=1e-4, rtol=0)


def test_crops_follow_the_image(served: Served) -> None:
    processor = served.processor.with_overrides(CROPS)
    items = [noise(50, 70), noise(90, 25, seed=1), noise(30, 30, seed=2)]
    media = [processor.process(item) for item in items]
    made = Gemma3ImageProcessorPil(**{**served.preprocessor, **CROPS})(
        [item.data for item in items], return_tensors="pt", input_data_format="channels_last"
    )
    pixels = torch.cat([torch.from_numpy(one.arrays["pixels"]) for one in media])
    torch.testing.assert_close(pixels, made["pixel_values"], atol=1e-6, rtol=0)
    counts = [len(one.arrays["pixels"]) for one in media]
    assert counts == [1 + int(count) for count in made["num_crops"]] == [3, 4, 1]
    assert [processor.num_tokens("image", *item.data.shape[:2]) for item in items] == [16 * count for count in counts]
    prompt = processor.build("<start_of_image><start_of_image> and <start_of_image>.", media)
    shown = "\n\n<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"
    text = [
        f"Here is the original image {shown} and here are some crops to help you see better {' '.join([shown] * crops)}"
        for crops in (2, 3)
    ]
    expected = processor.tokenizer.encode(f"{text[0]}{text[1]} and {shown}.")
    assert prompt.token_ids.tolist() == expected
    with torch.inference_mode():
        theirs = served.oracle(**oracle_inputs(served, prompt, made["pixel_values"])).logits[0]
    torch.testing.assert_close(Driver(served.model).prefill(served.run(prompt)), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("width", "height", "squares", "total"),
    [(16, 16, 1, -50871.884), (640, 480, 3, -1594.556), (1200, 300, 5, -1337.923), (333, 777, 3, -2656.226)],
)
def test_goldens_of_the_published_size(width: int, height: int, squares: int, total: float) -> None:
    processor = Gemma3Processor(record(FOUR_B, PUBLISHED), word_tokenizer(IDS))
    item = noise(height, width)
    media = processor.process(item)
    assert (media.num_rows, processor.num_tokens("image", height, width)) == (256, 256)
    assert media.arrays["pixels"].astype(np.float64).sum() == pytest.approx(total, abs=0.5)
    assert processor.with_overrides({"do_pan_and_scan": True}).num_tokens("image", height, width) == 256 * squares


def test_what_cannot_be_is_named(served: Served, tmp_path: Path) -> None:
    media = [served.processor.process(noise(30, 30))]
    with pytest.raises(RequestError, match="<image_soft_token>"):
        served.processor.build("<start_of_image> <image_soft_token>", media)
    with pytest.raises(RequestError, match="2 image placeholder"):
        served.processor.build("<start_of_image> <start_of_image>", media)
    for config, file, said in (
        ({**FOUR_B, "mm_tokens_per_image": 400}, PUBLISHED, "mm_tokens_per_image 400"),
        (FOUR_B, {**PUBLISHED, "do_resize": False}, "must resize"),
        (FOUR_B, {**PUBLISHED, "size": {"height": 448, "width": 448}}, "896"),
    ):
        with pytest.raises(CheckpointError, match=said):
            Gemma3Processor(record(config, file), word_tokenizer(IDS))
    make_gemma3_text(tmp_path)
    with pytest.raises(StartupError, match="float16"):
        load_engine(EngineConfig(str(tmp_path), dtype="float16", kv_cache_memory=1 << 20))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters must have"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", ["hub", "transformers"])
@pytest.mark.parametrize("window", [6, 7])
def test_embedding_gemma(tmp_path: Path, window: int, layout: Any) -> None:
    """Both ways, half of the window on either side; two dense layers behind the mean."""
    make_gemma3_text(tmp_path, layout, sliding_window=window)
    config = json.loads((tmp_path / "config.json").read_text())
    published = {"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, **published, "sliding_window": window}))
    dense = [torch.randn(48, 32) / 6, torch.randn(32, 48) / 7]
    modules = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    plain = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    settings = {"1_Pooling": {"pooling_mode_mean_tokens": True}, "2_Dense": plain, "3_Dense": plain}
    for place, stated in settings.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps(stated))
    for place, weight in zip(("2_Dense", "3_Dense"), dense, strict=True):
        save_file({"linear.weight": weight}, tmp_path / place / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    engine = build_engine(model, checkpoint, EngineConfig(str(tmp_path)), torch.device("cpu"), torch.float32)
    oracle = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert engine.ready.tasks == ("embed", "token_embed")
    prompts = [list(range(3, 40)), [7, 9], list(range(50, 61))]
    for number, ids in enumerate(prompts):
        asked = EngineRequest(number, Prompt(np.array(ids, np.int32)), pooling=PoolingParams("embed"))
        assert engine.scheduler.add(asked) is None
    plan, _ = engine.scheduler.schedule()
    with engine.runner.computing():
        vectors = engine.runner.launch(plan).result().vectors
    for number, ids in enumerate(prompts):
        with torch.inference_mode():
            mean = oracle(torch.tensor([ids])).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(mean @ dense[0].T @ dense[1].T, dim=-1)
        torch.testing.assert_close(torch.from_numpy(vectors[number][0]), expected, atol=1e-5, rtol=1e-5)


def test_published_configs_say_little(tmp_path: Path) -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    stated = {**text, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = {**FOUR_B, "architectures": ["Gemma3ForConditionalGeneration"], "text_config": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    read = open_checkpoint(tmp_path).text
    assert read is not None
    assert (read.num_heads, read.num_kv_heads, read.head_dim, read.vocab_size) == (8, 4, 256, 262208)
    assert (read.max_len, read.tie_word_embeddings, read.hidden_act) == (131072, True, "gelu_pytorch_tanh")
    local, full = read.layers[4], read.layers[5]
    assert [layer.window for layer in read.layers] == ([1024] * 5 + [None]) * 5 + [1024] * 4
    assert (local.rope.theta, local.rope.kind) == (1e4, "default")
    assert (full.rope.theta, full.rope.kind, full.rope.factor) == (1e6, "linear", 8.0)
    assert all(layer.scale == 256**-0.5 and layer.media_both_ways for layer in read.layers)
    assert replace(full, rope=local.rope, window=1024) == local
