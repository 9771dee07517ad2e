"""Projector files (mmproj), as llama.cpp's converter writes them, beside the text model's file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import checkpoints
from support.gguf_families import FAMILIES, write_family, write_tower
from support.gguf_writer import container, tokenizer_metadata
from support.image_families import noise
from support.internvl import make_internvl
from support.media_models import Served
from support.model_driver import Driver
from support.pixtral import make_mistral3, make_pixtral

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.gguf import gguf_folder
from sensorium.checkpoint.gguf_file import read_gguf
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.checkpoint.gguf_towers import tower_of
from sensorium.checkpoint.hub import resolve
from sensorium.cli.info import file_rows
from sensorium.errors import CheckpointError, StartupError
from sensorium.models.loading import load_model
from sensorium.prompt.tokenizer import Tokenizer

TOWERS = [name for name, stated in FAMILIES.items() if "tower" in stated]
OTHERS = {"internvl": make_internvl, "mistral3": make_mistral3, "pixtral": make_pixtral}
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision": {"depth": 3}},
    "qwen2_5_vl": {"vision": {"window_size": 112}},
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
    write_family(folder / "hub", file, family, tokenizer_metadata(folder / "hub", "gpt-2"))
    write_tower(folder / "hub", tower, family, **more)
    return file, tower


def looked_at(folder: Path) -> tuple[list[np.ndarray[Any, Any]], list[int], torch.Tensor]:
    """(what two images become, the prompt with both, its logits)"""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    processor = load_class(checkpoint.family.processor)(checkpoint, Tokenizer.from_folder(folder))
    served = Served(None, model, processor, {})
    prompt = served.prompt([noise(60, 90), noise(40, 160)], "a {} b")
    images = [one for image in prompt.media for one in image.arrays.values()]
    return images, prompt.token_ids.tolist(), Driver(model).prefill(served.run(prompt))


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower(tmp_path: Path, family: str) -> None:
    """Found beside the model; images, prompts and logits are those of the folder that both files were made of."""
    file, _ = written(family, tmp_path)
    folder = gguf_folder(file, tmp_path / "cache")
    assert open_checkpoint(folder).architecture == FAMILIES[family]["tower"]["architecture"]
    (images, tokens, logits), (own_images, own_tokens, own_logits) = looked_at(tmp_path / "hub"), looked_at(folder)
    for expected, found in zip(images, own_images, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert own_tokens == tokens
    torch.testing.assert_close(own_logits, logits[:, : own_logits.shape[1]], rtol=1e-3, atol=1e-3)


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
        tower_of(tower).config(tower, tower)
