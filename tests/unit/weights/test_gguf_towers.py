"""Projector files (mmproj), as llama.cpp's converter writes them, beside the text model's file."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import checkpoints, speech
from support.gguf_families import FAMILIES, write_family, write_tower
from support.gguf_writer import container, tokenizer_metadata
from support.glm4v import make_glm4v, make_glm4v_moe, make_glm_ocr
from support.image_families import noise
from support.internvl import make_internvl
from support.lfm2_vl import make_lfm2_vl
from support.media_models import Served
from support.model_driver import Driver
from support.paddleocr_vl import make_paddleocr_vl
from support.pixtral import make_mistral3, make_pixtral
from support.smolvlm import make_smolvlm

from sensorium.checkpoint import gguf_tower_configs as configs
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.gguf import gguf_folder
from sensorium.checkpoint.gguf_file import Strings, read_gguf
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.checkpoint.gguf_towers import TOWERS as PROJECTORS
from sensorium.checkpoint.gguf_towers import part_of_name, rows_of, template_with_media, tower_name
from sensorium.checkpoint.hub import resolve
from sensorium.cli.info import file_rows
from sensorium.errors import CheckpointError, StartupError
from sensorium.models.loading import load_model
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Modality

TOWERS = [name for name, stated in FAMILIES.items() if "tower" in stated]
OTHERS: dict[str, Any] = {
    "internvl": make_internvl,
    "mistral3": make_mistral3,
    "pixtral": make_pixtral,
    "lfm2_vl": make_lfm2_vl,
    "smolvlm": make_smolvlm,
    "glm4v": make_glm4v,
    "glm_ocr": make_glm_ocr,
    "glm4v_moe": make_glm4v_moe,
    "paddleocr_vl": make_paddleocr_vl,
    **{name: getattr(speech, f"make_{name}") for name in ("qwen2_audio", "qwen3_asr", "qwen3_omni", "voxtral")},
}
BESIDE = (
    "gemma4",
    "lfm2_vl",
    "qwen3_omni",
    "glm4v",
    "glm_ocr",
    "glm4v_moe",
)  # whose preprocessor_config.json says what projectors do not
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision": {"depth": 3}},
    "qwen2_5_vl": {"vision": {"window_size": 112}},
    "qwen2_omni": {"vision": {"window_size": 112}},
    "qwen3_omni": {"audio": {"n_window_infer": 800}},
    "qwen3_asr": {"audio": {"n_window_infer": 800}},
    "gemma4": {
        "vision": {"pooling_kernel_size": 3},
        "preprocessor": {"pooling_kernel_size": 3},
        "audio": {**{"subsampling_conv_channels": [128, 6], "attention_chunk_size": 12, "attention_context_left": 13}},
    },
    "internvl": {"vision": {"num_hidden_layers": 4}},
    "gemma3": {
        "vision": {"vision_use_head": False},
        "text": {
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    },
}


def written(family: str, folder: Path, **more: Any) -> tuple[Path, Path]:
    make = OTHERS.get(family) or getattr(checkpoints, f"make_{family}")
    make(folder / "hub", **OPTIONS.get(family, {}))
    file, tower = folder / "m.gguf", folder / "mmproj-F32.gguf"
    words = folder / "hub" / "language" if (folder / "hub" / "language").is_dir() else folder / "hub"
    write_family(folder / "hub", file, family, tokenizer_metadata(words, "gpt-2"))
    write_tower(folder / "hub", tower, family, **more)
    return file, tower


def perceived(folder: Path) -> Iterator[tuple[list[np.ndarray[Any, Any]], list[int], torch.Tensor]]:
    """Of images, and of recordings: (what two become, the prompt with both, its logits)"""
    language = folder / "language"
    checkpoint = open_checkpoint(folder, language if language.is_dir() else None)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    processor = load_class(checkpoint.family.processor)(
        checkpoint, Tokenizer.from_folder(language if language.is_dir() else folder)
    )
    served = Served(cast(Any, None), model, processor, {})
    items = {"image": [noise(60, 90), noise(40, 160)], "audio": [speech.recording(16000), speech.recording(9000, 1)]}
    for kind, media in items.items():
        if kind in processor.modalities:
            prompt = served.prompt(media, "a {} b")
            arrays = [one for item in prompt.media for one in item.arrays.values()]
            yield arrays, prompt.token_ids.tolist(), Driver(model).prefill(served.run(prompt))


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower(tmp_path: Path, family: str) -> None:
    """Found beside the model; media, prompts and logits are those of the folder that both files were made of."""
    file, _ = written(family, tmp_path)
    if family in BESIDE:
        copyfile(tmp_path / "hub" / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
        (tmp_path / "hub" / "processor_config.json").unlink(missing_ok=True)
    folder = gguf_folder(file, tmp_path / "cache")
    assert open_checkpoint(folder).architecture == FAMILIES[family]["tower"]["architecture"]
    expected, found = perceived(tmp_path / "hub"), perceived(folder)
    for (arrays, tokens, logits), (own_arrays, own_tokens, own_logits) in zip(expected, found, strict=True):
        for array, own in zip(arrays, own_arrays, strict=True):
            np.testing.assert_allclose(own, array, rtol=1e-5, atol=1e-5)
        assert own_tokens == tokens
        torch.testing.assert_close(own_logits, logits[:, : own_logits.shape[1]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("own", "said"), [("{{ '[INST] ' }}", "[INST] <image>\nhow? [/INST]"), ("", "USER: <image>\nhow? ASSISTANT:")]
)
def test_the_template_of_llava_next_is_its_text_models(tmp_path: Path, own: str, said: str) -> None:
    file, _ = written("llava_next", tmp_path)
    vocabulary = read_gguf(file)
    tokens = [one.replace("<|im_start|>", "<other>") for one in vocabulary.metadata["tokenizer.ggml.tokens"]]
    stored = b"".join(struct.pack("<Q", len(one.encode())) + one.encode() for one in tokens)
    metadata = {"tokenizer.ggml.tokens": Strings(stored, len(tokens)), "tokenizer.chat_template": own}
    text = replace(vocabulary, metadata=metadata)
    tiles = {"image_grid_pinpoints": [[336, 672]]}
    template = template_with_media(Metadata((text,)), tiles)
    message = Message("user", (MediaPart("image"), TextPart("how?")))
    tokenizer = Tokenizer.from_folder(tmp_path / "hub")

    def shown(kind: Modality, index: int) -> str:
        return "<image>"

    assert said in LocalTemplate(template or "", tokenizer, modalities=("image",), placeholder=shown).render([message])
    assert template_with_media(Metadata((vocabulary,)), tiles) is None


def test_smolvlm_and_idefics3_are_told_by_their_tokens(tmp_path: Path) -> None:
    file, tower = (Metadata((read_gguf(one),)) for one in written("smolvlm", tmp_path))
    tokens = [one.replace("<|im_start|>", "<|begin_of_text|>") for one in file.all["tokenizer.ggml.tokens"]]
    container_of = container({**FAMILIES["smolvlm"]["metadata"], "tokenizer.ggml.tokens": tokens}, {})
    (tmp_path / "other.gguf").write_bytes(container_of)
    found = [configs.idefics3(text, tower) for text in (file, Metadata((read_gguf(tmp_path / "other.gguf"),)))]
    assert [one["architecture"][:8] for one in found] == ["SmolVLMF", "Idefics3"]


@pytest.mark.parametrize(
    ("family", "said"), [("glm4v", "GLM-OCR is not served alone"), ("paddleocr_vl", "PaddleOCR-VL is not served alone")]
)
def test_texts_that_are_served_with_their_tower_alone(tmp_path: Path, family: str, said: str) -> None:
    file, tower = written(family, tmp_path)
    tower.unlink()
    with pytest.raises(CheckpointError, match=said):
        gguf_folder(file, tmp_path / "cache")


def test_which_tower_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The only one of the folder, the one that is named, none of several, and none that goes with another model."""
    file, tower = written("gemma3", tmp_path)
    cache = tmp_path / "cache"
    with_tower = "Gemma3ForConditionalGeneration"
    assert open_checkpoint(gguf_folder(file, cache)).architecture == with_tower
    assert dict(file_rows(file))["tower"].startswith("mmproj-F32.gguf beside it")
    other = tower.rename(tmp_path / "mmproj-BF16.gguf")
    (tmp_path / "mmproj-F16.gguf").write_bytes(other.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(gguf_folder(file, cache)).architecture == "Gemma3ForCausalLM"
    assert "has 2 projectors beside it" in caplog.text
    assert "tower" not in dict(file_rows(file))
    assert open_checkpoint(gguf_folder(file, cache, other)).architecture == with_tower
    (tmp_path / "mmproj-F16.gguf").unlink()
    write_tower(tmp_path / "hub", other, "gemma3", **cast(Any, {"clip.vision.projection_dim": 64}))
    assert open_checkpoint(gguf_folder(file, cache)).architecture == "Gemma3ForCausalLM"
    with pytest.raises(CheckpointError, match="makes rows of 64 numbers"):
        gguf_folder(file, cache, other)


def test_mmproj_needs_a_gguf_model(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--mmproj goes with a GGUF file"):
        resolve(str(tmp_path), mmproj="x.gguf")
    file, _ = written("llava", tmp_path)
    with pytest.raises(StartupError, match="no such file"):
        resolve(str(file), mmproj=str(tmp_path / "nothing.gguf"))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma3", {"clip.projector_type": "resampler9"}, "type 'resampler9' are not supported"),
        ("gemma3", {"clip.projector_type": "qwen2vl_merger"}, "does not go with a text model"),
        ("qwen2_5_vl", {"clip.projector_type": "qwen2vl_merger"}, "is Qwen2.5-VL's"),
        ("gemma3", {"general.type": "adapter"}, "is no projector"),
        ("gemma3", {"clip.vision.patch_size": "x"}, "must be a number"),
        ("gemma3", {"clip.vision.patch_size": 0}, "patch_size must be positive"),
        ("gemma3", {"clip.vision.projector.scale_factor": 0}, "scale_factor must be positive"),
        ("internvl", {"clip.vision.projector.scale_factor": 0}, "scale_factor must be positive"),
        ("qwen3_vl", {"clip.vision.is_deepstack_layers": [True]}, "has 1 values for 3 layers"),
    ],
)
def test_mislabelled_towers(tmp_path: Path, family: str, changes: dict[str, Any], said: str) -> None:
    file, tower = written(family, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=said) as error:
        gguf_folder(file, tmp_path / "cache", tower)
    assert "\n" not in error.value.message


def test_a_tower_without_a_layer(tmp_path: Path) -> None:
    tensors = {f"v.blk.{layer}.ln1.weight": ("F32", (2,), bytes(8)) for layer in (0, 2)}
    metadata = {**FAMILIES["gemma3"]["tower"]["metadata"]}
    (tmp_path / "t.gguf").write_bytes(container(metadata, tensors))
    tower = Metadata((read_gguf(tmp_path / "t.gguf"),))
    with pytest.raises(CheckpointError, match="lacks layers"):
        rows_of(tower)[0].config(tower, tower)


def test_a_strange_name_is_no_part_of_a_tensor() -> None:
    name, strange = "resampler.attn.k.bias", "v@lk.1.attn_q.weight"
    assert part_of_name(tower_name(name, PROJECTORS["resampler"]), name) == ("resampler.attn.in_proj_bias", "1")
    assert part_of_name(tower_name(strange, PROJECTORS["resampler"]), strange) == (strange, "")
