"""CLIP and SigLIP against transformers' classes: vectors of texts and of images, together and through the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import read_weights, write_weights
from support.encoder_support import load, save
from support.engine_harness import bench
from support.image_families import noise, normalised, record, word_tokenizer
from transformers import CLIPConfig, CLIPModel, Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.base import Model
from sensorium.processors.dual import NaflexProcessor
from sensorium.types import EngineRequest, MediaFeatures, MediaSpan, PoolingParams, Prompt

VOCAB, END = 90, 89
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 20,
}
VISION = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LENGTHS = [1, 20, 7, 12]


def clip(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **options: Any) -> Any:
    stated = {
        "text_config": {**TEXT, "eos_token_id": END, **(text or {})},
        "vision_config": {**VISION, **(vision or {})},
    }
    return CLIPModel(CLIPConfig(**stated, **{"projection_dim": 24, **options}))


def siglip(**text: Any) -> Any:
    return SiglipModel(SiglipConfig(text_config={**TEXT, "projection_size": 40, **text}, vision_config=VISION))


NAFLEX = {**{key: value for key, value in VISION.items() if key != "image_size"}, "num_patches": 16}


def naflex() -> Any:
    return Siglip2Model(Siglip2Config(text_config={**TEXT, "projection_size": 40}, vision_config=NAFLEX))


ORACLES: dict[str, Callable[[], Any]] = {
    "clip": clip,
    "clip, an old end token": lambda: clip({"eos_token_id": 2}),
    "clip, gelu and wide vectors": lambda: clip({"hidden_act": "gelu"}, {"hidden_act": "gelu"}, projection_dim=64),
    "siglip": siglip,
}


def texts_of(seed: int = 0) -> list[torch.Tensor]:
    """Each ends as the tokenizer ends it."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.randint(3, END, (n - 1,), generator=generator), torch.tensor([END])]) for n in LENGTHS]


def pixels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 28, 28)).astype(np.float32)


@torch.inference_mode()
def vector_of(oracle: Any, ids: torch.Tensor | None, pixels: np.ndarray | None) -> torch.Tensor:
    if pixels is not None:
        found = oracle.get_image_features(torch.from_numpy(pixels).unsqueeze(0))
    elif ids is None:
        raise ValueError("neither a text nor an image")
    elif isinstance(oracle, SiglipModel | Siglip2Model):
        padded = torch.full((1, TEXT["max_position_embeddings"]), 1)
        padded[0, : len(ids)] = ids
        found = oracle.get_text_features(padded)
    else:
        found = oracle.get_text_features(ids.unsqueeze(0))
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found)[0], dim=-1)


_ids = iter(range(1, 10_000))


def text_request(ids: torch.Tensor) -> EngineRequest:
    return EngineRequest(next(_ids), Prompt(ids.numpy().astype(np.int32)), None, PoolingParams("embed"))


def image_request(seed: int, media: MediaFeatures | None = None) -> EngineRequest:
    media = media or MediaFeatures("image", b"image %d" % seed, 1, {"pixels": pixels_of(seed)})
    prompt = Prompt(np.array([VOCAB], np.int32), (media,), (MediaSpan(0, 0, 1),))
    return EngineRequest(next(_ids), prompt, None, PoolingParams("embed"))


def check(oracle: Any, model: Model, tolerance: float = 1e-5) -> None:
    """Texts and images in one step; the images twice, so that the second time their vectors are cached."""
    requests = [text_request(ids) for ids in texts_of()]
    requests[1:1] = [image_request(0), image_request(1)]
    requests += [image_request(1), image_request(0)]
    expected = [vector_of(oracle, ids, None) for ids in texts_of()]
    images = [vector_of(oracle, None, pixels_of(seed)) for seed in (0, 1)]
    expected[1:1] = images
    expected += images[::-1]
    results = bench(model, max_model_len=20).run(*requests)
    assert [(result.reason, result.error) for result in results] == [("stop", "")] * len(results)
    for result, vector in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.vector, vector, atol=tolerance)


@pytest.mark.parametrize("name", ORACLES)
def test_vectors(tmp_path: Path, name: str) -> None:
    check(save(ORACLES[name](), tmp_path), load(tmp_path))


def test_naflex(tmp_path: Path) -> None:
    """Images of different sizes in one step, beside texts."""
    oracle, model = save(naflex(), tmp_path), load(tmp_path)
    processor = NaflexProcessor(
        record(model.checkpoint.config, {}), word_tokenizer({"<s>": 1}), {"max_num_patches": 20}
    )
    images = [processor.process(noise(*size, seed=i)) for i, size in enumerate(((30, 60), (7, 7), (90, 20)))]
    requests = [image_request(0, image) for image in images]
    requests[1:1] = [text_request(ids) for ids in texts_of()]
    results = bench(model, max_model_len=20).run(*requests)
    expected = [naflex_vector(oracle, image) for image in images]
    expected[1:1] = [vector_of(oracle, ids, None) for ids in texts_of()]
    for result, vector in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.vector, vector, atol=1e-5)


@torch.inference_mode()
def naflex_vector(oracle: Any, image: MediaFeatures) -> torch.Tensor:
    patches = normalised(image.arrays).reshape(len(image.arrays["pixels"]), 3, -1).transpose(0, 2, 1)
    found = oracle.get_image_features(
        torch.from_numpy(patches.reshape(1, len(patches), -1)),
        pixel_attention_mask=torch.ones(1, len(patches), dtype=torch.int32),
        spatial_shapes=torch.from_numpy(image.arrays["grids"]).long(),
    )
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found)[0], dim=-1)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_padding_is_the_tokenizers(tmp_path: Path, file: str) -> None:
    """config.json of later SigLIPs still has the first one's number. Today's folders have the ids in tokenizer.json."""
    oracle = save(siglip(pad_token_id=7), tmp_path)
    added = {"0": {"content": "<pad>"}, "1": {"content": "</s>"}}
    config: dict[str, Any] = {"pad_token": "</s>"}
    if file == "tokenizer.json":
        tokens = [{"id": int(i), **token} for i, token in added.items()]
        (tmp_path / file).write_text(json.dumps({"added_tokens": tokens}))
    else:
        config["added_tokens_decoder"] = added
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    check(oracle, load(tmp_path))


def test_the_older_dialect_of_clips_config(tmp_path: Path) -> None:
    oracle = save(clip(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    older = {f"{name}_dict": config[name] for name in ("text_config", "vision_config")}
    path.write_text(json.dumps({**config, **older, "text_config": {"hidden_size": 8}, "vision_config": None}))
    weights = read_weights(tmp_path)
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9).unsqueeze(0) for tower in ("text", "vision")}
    write_weights(tmp_path, {**weights, **ids})
    check(oracle, load(tmp_path))


def test_what_is_meant_by_little(tmp_path: Path) -> None:
    """The first SigLIP's config names its towers and nothing more; CLIP's is complete."""
    (tmp_path / "model.safetensors").touch()
    for architecture, vocab, length in (("SiglipModel", 32000, 64), ("CLIPModel", 49408, 77)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "text_config": {}}))
        checkpoint = open_checkpoint(tmp_path)
        assert (checkpoint.vocab_size, checkpoint.max_model_len) == (vocab, length)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    for index, oracle in enumerate((clip(), siglip())):
        folder = tmp_path / str(index)
        check(save(oracle, folder), load(folder, torch.bfloat16), tolerance=0.05)


def test_a_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    save(SiglipModel(SiglipConfig(text_config=TEXT, vision_config={**VISION, "vision_use_head": False})), tmp_path)
    with pytest.raises(CheckpointError, match="vision_use_head"):
        load(tmp_path)
    save(siglip(projection_size=32), tmp_path / "b")
    with pytest.raises(CheckpointError, match="projection_size"):
        load(tmp_path / "b")
