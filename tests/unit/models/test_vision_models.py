"""LLaVA, LLaVA-NeXT and Qwen2-VL against transformers: rows, logits, greedy tokens, chunks, batches, dialects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from support import checkpoints
from support.glm4v import make_glm4v, make_glm4v_moe, make_glm_ocr
from support.image_families import noise, normalised
from support.internvl import make_internvl
from support.lfm2_vl import make_lfm2_vl, padded_inputs
from support.llava_onevision import make_llava_onevision
from support.media_models import Served, load
from support.model_driver import Driver
from support.paddleocr_vl import make_paddleocr_vl
from support.pixtral import make_mistral3, make_pixtral
from support.smolvlm import make_idefics3, make_smolvlm
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma4ImageProcessorPil,
    Glm4vImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PaddleOCRVLImageProcessorPil,
    PixtralImageProcessorPil,
    PreTrainedModel,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.loading import load_model
from sensorium.models.towers.blocks import groups
from sensorium.types import MediaItem

MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llava": checkpoints.make_llava,
    "llava_next": checkpoints.make_llava_next,
    # A tied head makes random weights repeat their last token for ever, which hides mistakes.
    "qwen2_vl": partial(checkpoints.make_qwen2_vl, tie_word_embeddings=False),
    "qwen2_5_vl": partial(checkpoints.make_qwen2_5_vl, tie_word_embeddings=False),
    "qwen3_vl": partial(checkpoints.make_qwen3_vl, tie_word_embeddings=False),
    "qwen3_vl_moe": partial(checkpoints.make_qwen3_vl_moe, tie_word_embeddings=False),
    "qwen3_5": partial(checkpoints.make_qwen3_5, tie_word_embeddings=False),
    "qwen3_5_moe": partial(checkpoints.make_qwen3_5_moe, tie_word_embeddings=False, seed=1),  # transformers' rounding
    "gemma3": partial(checkpoints.make_gemma3, tie_word_embeddings=False),
    "gemma4": partial(checkpoints.make_gemma4, seed=1),  # whose answers do not run in circles
    "mistral3": make_mistral3,
    "pixtral": make_pixtral,
    "internvl": make_internvl,
    "lfm2_vl": make_lfm2_vl,
    "smolvlm": make_smolvlm,
    "paddleocr_vl": make_paddleocr_vl,
    "glm4v": make_glm4v,
    "glm4v_moe": partial(make_glm4v_moe, seed=2),
    "glm_ocr": make_glm_ocr,
    "llava_onevision": make_llava_onevision,
    "idefics3": make_idefics3,
}
SIZES = {
    "llava": [(50, 70), (28, 28), (90, 31)],
    "llava_next": [(50, 70), (120, 30), (28, 28), (16, 90)],
    "qwen2_vl": [(60, 90), (56, 56), (140, 70)],
    "qwen2_5_vl": [(60, 90), (56, 56), (60, 140)],
    "qwen3_vl": [(60, 90), (64, 64), (40, 160)],
    "qwen3_vl_moe": [(60, 90), (40, 160)],
    "qwen3_5": [(60, 90), (40, 160)],
    "qwen3_5_moe": [(60, 90)],
    "gemma3": [(50, 70), (30, 30)],
    "gemma4": [(50, 70), (30, 9)],
    "mistral3": [(50, 70), (200, 100), (10, 10), (9, 300)],
    "pixtral": [(50, 70), (200, 100), (10, 10)],
    "internvl": [(50, 70), (200, 60), (10, 10)],
    "llava_onevision": [(50, 70), (28, 28), (14, 90)],
    "glm4v": [(50, 70), (28, 28), (9, 90)],
    "glm4v_moe": [(50, 70)],
    "glm_ocr": [(50, 70), (20, 30)],
    "paddleocr_vl": [(50, 70), (9, 60)],
    "smolvlm": [(50, 70), (10, 10), (90, 20)],
    "idefics3": [(50, 70)],
    "lfm2_vl": [(24, 48), (60, 30), (10, 10), (8, 90)],
}
each_family = pytest.mark.parametrize("family", list(MAKERS))
each_decoder = pytest.mark.parametrize(
    "family", [family for family in MAKERS if family not in ("qwen2_5_vl", "pixtral", "idefics3")]
)
"""Without what differs from another family in its tower alone."""
each_layout = pytest.mark.parametrize("layout", ["hub", "transformers"])


@cache
def served(family: str, layout: str = "hub") -> Served:
    with TemporaryDirectory() as folder:
        return load(Path(folder), MAKERS[family](Path(folder), layout))


def pictures(family: str) -> list[MediaItem]:
    return [noise(*size, seed=i) for i, size in enumerate(SIZES[family])]


def oracle_inputs(family: str, here: Served, items: Sequence[MediaItem], token_ids: np.ndarray) -> dict[str, Any]:
    """What transformers' own processor makes of the same pictures."""
    classes: dict[str, Any] = {
        "llava": CLIPImageProcessorPil,
        "llava_next": LlavaNextImageProcessorPil,
        "gemma3": Gemma3ImageProcessorPil,
        "gemma4": Gemma4ImageProcessorPil,
        "llava_onevision": LlavaOnevisionImageProcessorPil,
        **dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr"), Glm4vImageProcessorPil),
        "paddleocr_vl": PaddleOCRVLImageProcessorPil,
        "smolvlm": SmolVLMImageProcessorPil,
        "idefics3": Idefics3ImageProcessorPil,
        "mistral3": PixtralImageProcessorPil,
        "pixtral": PixtralImageProcessorPil,
        "internvl": partial(GotOcr2ImageProcessorPil, crop_to_patches=True, max_patches=4),
    }
    data: Any = [item.data for item in items]
    if family == "llava_onevision":  # of one conversation
        data = [data]
    ids = torch.from_numpy(token_ids).long()[None]
    if family == "lfm2_vl":
        made = padded_inputs([here.processor.process(item) for item in items])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
    made = classes.get(family, Qwen2VLImageProcessorPil)(**here.preprocessor)(
        data, return_tensors="pt", input_data_format="channels_last"
    )
    made.pop("video_sampling", None)
    if family.startswith(("qwen", "glm", "paddle")):
        made["mm_token_type_ids"] = (ids == here.oracle.config.image_token_id).int()
    if family == "internvl":
        del made["num_patches"]
    if family == "gemma4":
        del made["num_soft_tokens_per_image"]
        made["mm_token_type_ids"] = (ids == here.oracle.config.image_token_id).int()
    if family == "gemma3":
        del made["num_crops"]
        made["token_type_ids"] = (ids == here.oracle.config.image_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}


@each_layout
@each_family
def test_logits_equal_transformers(family: str, layout: str) -> None:
    here, items = served(family, layout), pictures(family)
    prompt = here.prompt(items)
    ours = Driver(here.model).prefill(here.run(prompt))
    with torch.inference_mode():
        theirs = here.oracle(**oracle_inputs(family, here, items, prompt.token_ids)).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@each_layout
@each_family
def test_greedy_tokens_equal_transformers(family: str, layout: str) -> None:
    here, items = served(family, layout), pictures(family)
    prompt = here.prompt(items)
    ours = Driver(here.model).greedy([here.run(prompt)], 32)[0]
    inputs = oracle_inputs(family, here, items, prompt.token_ids)
    made = here.oracle.generate(**inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)
    assert ours == made[0, len(prompt.token_ids) :].tolist()
    assert len(set(ours)) > 4, "a model that runs in circles shows nothing"


def test_tied_head(tmp_path: Path) -> None:
    here = load(tmp_path, checkpoints.make_qwen2_vl(tmp_path))
    items = pictures("qwen2_vl")
    prompt = here.prompt(items)
    with torch.inference_mode():
        theirs = here.oracle(**oracle_inputs("qwen2_vl", here, items, prompt.token_ids)).logits[0]
    torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt)), theirs, atol=1e-4, rtol=0)


@each_family
def test_rows_equal_transformers(family: str) -> None:
    here, items = served(family), pictures(family)
    prompt = here.prompt(items)
    inputs = oracle_inputs(family, here, items, prompt.token_ids)
    del inputs["input_ids"], inputs["attention_mask"]
    inputs.pop("mm_token_type_ids", None)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        found = here.oracle.model.get_image_features(**inputs)
    slices = [found.pooler_output, *getattr(found, "deepstack_features", [])]  # of each, per image
    theirs = torch.cat([torch.cat(parts, dim=1) for parts in zip(*slices, strict=True)])
    ours = here.encode(prompt.media)
    assert [len(rows) for rows in ours] == [media.num_rows for media in prompt.media]
    torch.testing.assert_close(torch.cat(ours), theirs, atol=1e-5, rtol=1e-4)


@each_decoder
def test_prefill_cut_everywhere_inside_pictures(family: str) -> None:
    here = served(family)
    prompt = here.prompt(pictures(family))
    driver = Driver(here.model, num_blocks=4096)
    whole = driver.prefill(here.run(prompt))
    places = sorted({place for s in prompt.spans for place in range(s.offset, s.offset + s.length + 1)})
    for place in places[:: 1 + len(places) // 100]:
        torch.testing.assert_close(driver.prefill(here.run(prompt), place), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(driver.prefill(here.run(prompt), *[1] * len(whole)), whole, atol=1e-4, rtol=0)


@each_decoder
def test_unequal_requests_together_equal_one_by_one(family: str) -> None:
    here = served(family)
    every = [noise(*size, seed=7 + i) for i, size in enumerate(SIZES[family] * 2)]
    prompts = [here.prompt(every[i : i + i % 4], text="{}" + "word " * i + "?") for i in range(8)]
    alone = [Driver(here.model).greedy([here.run(prompt)], 12)[0] for prompt in prompts]
    together = Driver(here.model, num_blocks=1024).greedy([here.run(prompt) for prompt in prompts], 12)
    assert together == alone


@each_family
def test_a_batch_of_pictures_equals_one_by_one(family: str) -> None:
    here = served(family)
    media = [here.processor.process(item) for item in pictures(family) * 2]
    for one, row in zip(media, here.encode(media), strict=True):
        torch.testing.assert_close(here.encode([one])[0], row, atol=1e-5, rtol=1e-5)


@each_family
def test_rows_of_one_batch_do_not_share_memory(family: str) -> None:
    here = served(family)
    rows = here.encode([here.processor.process(item) for item in pictures(family)])
    assert len({one.untyped_storage().data_ptr() for one in rows}) == len(rows)


def test_large_batches_are_cut_into_groups() -> None:
    assert list(groups([3, 3, 3, 9, 1], 6)) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert list(groups([])) == []
    here = served("qwen2_vl")
    media = [here.processor.process(noise(448, 448, seed=i)) for i in range(9)]  # 9 x 1024 patches
    for index, rows in enumerate(here.encode(media)):
        if index in (0, 7, 8):
            torch.testing.assert_close(rows, here.encode([media[index]])[0], atol=1e-5, rtol=1e-5)


def test_videos_attend_inside_their_slices() -> None:
    here = served("qwen2_vl")
    video = here.processor.process(noise(56, 84, frames=4))
    grid = torch.from_numpy(video.arrays["grid"])[None].long()
    with torch.inference_mode():
        theirs = here.oracle.model.get_video_features(torch.from_numpy(normalised(video.arrays)), grid).pooler_output[0]
    torch.testing.assert_close(here.encode([video])[0], theirs, atol=1e-5, rtol=1e-4)
    still = here.processor.process(noise(56, 84, seed=3))
    together = here.encode([still, video])
    torch.testing.assert_close(together[1], theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[0], here.encode([still])[0], atol=1e-5, rtol=1e-5)


def test_frames_of_onevision() -> None:
    """Rows of two clips together are those of transformers; each ends with a row of its own."""
    here = served("llava_onevision")
    videos = [here.processor.process(noise(30, 40, frames=count)) for count in (3, 1)]
    for ours, video in zip(here.encode(videos), videos, strict=True):
        with torch.inference_mode():
            theirs = here.oracle.model.get_video_features(torch.from_numpy(video.arrays["pixels"])[None]).pooler_output
        torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"vision_feature_layer": -1},
        {"vision_feature_layer": 1},
        {"vision_feature_layer": [-3, -1]},
        {"vision_feature_select_strategy": "full"},
        {"vision_feature_layer": [0, 3], "vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False},
    ],
    ids=str,
)
def test_llava_feature_choices(options: dict[str, Any], tmp_path: Path) -> None:
    here = load(tmp_path, checkpoints.make_llava(tmp_path, **options))
    items = pictures("llava")
    prompt = here.prompt(items)
    inputs = oracle_inputs("llava", here, items, prompt.token_ids)
    with torch.inference_mode():
        theirs = here.oracle.model.get_image_features(inputs["pixel_values"]).pooler_output
    for ours, expected, media in zip(here.encode(prompt.media), theirs, prompt.media, strict=True):
        assert len(ours) == media.num_rows
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


SIGLIP_FILE = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 30, "width": 30},
    "crop_size": None,
    "do_center_crop": None,
    "image_mean": None,
    "image_std": None,
    "resample": None,
}


@each_layout
@pytest.mark.parametrize(
    "options",
    [
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},  # llava-interleave
        {},
        {"vision_feature_layer": [0, 2], "vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
def test_llava_with_siglip(layout: checkpoints.Layout, options: dict[str, Any], tmp_path: Path) -> None:
    """Squares of 30 pixels and patches of 14: the last two lines and columns are of no patch."""
    vision = {"model_type": "siglip_vision_model", "image_size": 30}
    here = load(tmp_path, checkpoints.make_llava(tmp_path, layout, vision=vision, preprocessor=SIGLIP_FILE, **options))
    items = [noise(50, 70), noise(30, 30, seed=1), noise(9, 80, seed=2)]
    prompt = here.prompt(items)
    assert [media.num_rows for media in prompt.media] == [4 if "vision_feature_select_strategy" in options else 3] * 3
    pixels = SiglipImageProcessorPil(size={"height": 30, "width": 30})(
        [item.data for item in items], return_tensors="pt", input_data_format="channels_last"
    )["pixel_values"]
    for media, expected in zip(prompt.media, pixels, strict=True):
        np.testing.assert_allclose(media.arrays["pixels"], expected, atol=1e-6)
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    with torch.inference_mode():
        theirs = here.oracle(input_ids=ids, pixel_values=pixels).logits[0]
    torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt), 7), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"vision": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"},
        {
            "vision": {"model_type": "siglip_vision_model"},
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": [-1, 0],
        },
        {"vision_feature_layer": [-2, 1]},
    ],
    ids=str,
)
def test_llava_next_feature_choices(options: dict[str, Any], tmp_path: Path) -> None:
    here = load(tmp_path, checkpoints.make_llava_next(tmp_path, **options))
    items = pictures("llava_next")
    prompt = here.prompt(items)
    with torch.inference_mode():
        theirs = here.oracle(**oracle_inputs("llava_next", here, items, prompt.token_ids)).logits[0]
    torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt), 7), theirs, atol=1e-4, rtol=0)


# Weight dialects.


def in_memory(key: str) -> str:
    """The names that transformers 4.52 to 4.57 saved, and that it has in memory."""
    if key.startswith("language_model.model."):
        return key.replace("language_model.model.", "model.language_model.")
    return key.removeprefix("language_model.") if "lm_head" in key else f"model.{key}"


def qwen_in_memory(key: str) -> str:
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


def without_inner_name(key: str) -> str:
    return key.replace("vision_tower.vision_model.", "vision_tower.")


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("llava", lambda key: key),
        ("llava", in_memory),
        ("llava", without_inner_name),
        ("llava", lambda key: in_memory(without_inner_name(key))),
        ("llava_next", in_memory),
        ("llava_next", lambda key: in_memory(without_inner_name(key))),
        ("qwen2_vl", qwen_in_memory),
        ("qwen2_5_vl", qwen_in_memory),
        ("qwen3_vl", lambda key: key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")),
        ("mistral3", in_memory),
    ],
)
def test_weight_dialects(family: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    oracle = MAKERS[family](tmp_path, "hub")
    tensors = {rename(key): value for key, value in checkpoints.read_weights(tmp_path).items()}
    prefix = next((key.removesuffix("embeddings.class_embedding") for key in tensors if "class_embedding" in key), None)
    if prefix is not None:  # as older checkpoints have it
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(5)
    checkpoints.write_weights(tmp_path, tensors)
    here = load(tmp_path, oracle)
    reference = served(family)
    media = [reference.processor.process(item) for item in pictures(family)]
    for ours, expected in zip(here.encode(media), reference.encode(media), strict=True):
        torch.testing.assert_close(ours, expected, atol=0, rtol=0)
    ids = torch.arange(20)
    torch.testing.assert_close(here.model.embed(ids), reference.model.embed(ids), atol=0, rtol=0)


OF_6B = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral3", {"vision_feature_layer": -2, "projector_hidden_act": "silu"}),
        ("mistral3", {"ministral3": True}),
        ("internvl", {"vision": OF_6B, "qwen3": True}),
        ("internvl", {"vision": {"use_mean_pooling": False}}),
        ("lfm2_vl", {"projector_use_layernorm": False, "projector_bias": False, "vision": {"num_patches": 25}}),
        ("lfm2_vl", {"tie_word_embeddings": True}),
        ("internvl", {"vision_feature_layer": -2}),
    ],
    ids=str,
)
@each_layout
def test_tower_choices(family: str, options: dict[str, Any], layout: str, tmp_path: Path) -> None:
    if layout == "hub" and "vision" not in options and family == "internvl":
        return  # which has another name there
    here, items = load(tmp_path, MAKERS[family](tmp_path, layout, **options)), pictures(family)
    prompt = here.prompt(items)
    ours = Driver(here.model).prefill(here.run(prompt))
    with torch.inference_mode():
        theirs = here.oracle(**oracle_inputs(family, here, items, prompt.token_ids)).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_layers_after_the_last_feature_need_not_be_there(tmp_path: Path) -> None:
    checkpoints.make_llava(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    needed = {key: value for key, value in tensors.items() if ".layers.2." not in key and "post_layernorm" not in key}
    assert len(needed) < len(tensors)
    checkpoints.write_weights(tmp_path, needed)
    load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llava", "multi_modal_projector.linear_2.bias"),
        ("llava", "vision_tower.vision_model.pre_layrnorm.weight"),
        ("llava", "vision_tower.vision_model.encoder.layers.1.self_attn.k_proj.weight"),
        ("llava_next", "image_newline"),
        ("qwen2_vl", "visual.merger.mlp.2.bias"),
        ("qwen2_vl", "visual.patch_embed.proj.weight"),
        ("qwen2_5_vl", "visual.blocks.0.mlp.up_proj.bias"),
        ("qwen3_vl", "model.visual.deepstack_merger_list.1.norm.bias"),
        ("mistral3", "multi_modal_projector.patch_merger.merging_layer.weight"),
    ],
)
def test_missing_and_unexpected_tensors_are_named(family: str, key: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    checkpoints.write_weights(tmp_path, {name: value for name, value in tensors.items() if name != key})
    with pytest.raises(CheckpointError, match="missing"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    checkpoints.write_weights(tmp_path, {**tensors, f"{key}.more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=rf"unexpected .*{key}\.more"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")
    checkpoints.write_weights(tmp_path, {**tensors, key: tensors[key][..., :-1]})
    with pytest.raises(CheckpointError, match=r"has shape"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("llava", {"vision_config": {"model_type": "siglip2_vision_model"}}, "siglip2_vision_model' is not supported"),
        ("llava", {"vision_feature_layer": -9}, "vision_feature_layer"),
        ("llava", {"projector_hidden_act": "mish"}, "unknown activation 'mish'"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "must be 'default' with CLIP"),
        ("llava_next", {"vision_config": {"model_type": "siglip_vision_model"}}, "'full' with SigLIP"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, "must be one number"),
        ("pixtral", {"vision_feature_select_strategy": "default"}, "must be 'full'"),
        ("lfm2_vl", {"vision_config": {"model_type": "siglip_vision_model"}}, "supported: siglip2_vision_model"),
        ("lfm2_vl", {"vision_config": {"num_patches": 250}}, "num_patches 250"),
        ("internvl", {"ps_version": "v1"}, "ps_version 'v1'"),
        ("internvl", {"downsample_ratio": 0.3}, "must be 1 divided by a whole number"),
        ("internvl", {"select_layer": -9}, "vision_feature_layer -9 of 2"),
    ],
)
def test_unsupported_configurations(family: str, change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint = replace(checkpoint, config={**checkpoint.config, **change})
    with pytest.raises(CheckpointError, match=problem):
        load_model(checkpoint, dtype=torch.float32, device="cpu")


@each_family
def test_bfloat16_rows_are_close(family: str, tmp_path: Path) -> None:
    MAKERS[family](tmp_path)
    model = load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16, device="cpu")
    here = served(family)
    media = [here.processor.process(item) for item in pictures(family)]
    rounded = Served(here.oracle, model, here.processor, {})
    for ours, expected in zip(rounded.encode(media), here.encode(media), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - expected).norm() < 0.03 * expected.norm()
