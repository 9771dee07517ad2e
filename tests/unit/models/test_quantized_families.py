"""int8 and int4 in every family of the registry: what is computed of a text is near what the plain weights say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.encoder_support import VOCAB, prompts_of, run, save
from support.families import MAKERS, maker_of
from support.model_driver import Driver, Sequence
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
    NomicBertConfig,
    NomicBertModel,
    SiglipConfig,
    SiglipModel,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.kernels import Quantization
from sensorium.models.base import Model
from sensorium.models.loading import load_model

BOUNDS = {8: 0.045, 4: 0.37}  # relative errors of logits or states, of layers of 32 to 64 inputs
LOOSER = {
    **{"gemma4": 2, "gemma4_text": 1.2, "lfm2": 1.2},  # parts are multiplied by others
    **{"gpt_oss": 2},  # other experts are chosen
    **{
        "qwen3_5_text": 2,
        "qwen3_5": 5,
        "qwen3_5_moe": 7,
    },  # small vectors are normed: transformers, rounded, errs alike
}
SHAPE = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
    **{"vocab_size": VOCAB, "max_position_embeddings": 64},
}
TOWER = {**SHAPE, "image_size": 28, "patch_size": 7}
ENCODERS: dict[str, Callable[[], Any]] = {
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=VOCAB, max_position_embeddings=64)
    ),
    "nomic": lambda: NomicBertModel(NomicBertConfig(**SHAPE)),
    "jina": lambda: JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**SHAPE)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=SHAPE, vision_config=TOWER, projection_dim=64)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config={**SHAPE, "projection_size": 64}, vision_config=TOWER)),
}


def load(folder: Path, quantization: Quantization | None) -> Model:
    text = folder / "language"
    return load_model(
        open_checkpoint(folder, text if text.is_dir() else None),
        dtype=torch.float32,
        device="cpu",
        quantization=quantization,
    )


def logits_of(model: Model) -> Tensor:
    """Of all tokens of a text."""
    ids = torch.randint(20, 400, (24,), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(len(ids)).expand(3, -1) if model.checkpoint.decoder.rope.mrope_section else None
    driver = Driver(model)
    return driver.logits(driver.step([(Sequence(ids.tolist(), positions=positions), len(ids))]))


def states_of(model: Model) -> Tensor:
    return torch.cat(run(model, prompts_of([12, 5])))


def check(folder: Path, computed: Callable[[Model], Tensor], looser: float = 1.0) -> None:
    plain = computed(load(folder, None))
    for bits, bound in BOUNDS.items():
        error = (computed(load(folder, Quantization(bits, 32))) - plain).norm() / plain.norm()  # type: ignore[arg-type]
        assert 0 < error < looser * bound, bits


@pytest.mark.parametrize("family", MAKERS.values())
def test_decoders(tmp_path: Path, family: str) -> None:
    maker_of(family)(tmp_path)
    check(tmp_path, logits_of, LOOSER.get(family, 1.0))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(tmp_path: Path, family: str) -> None:
    save(ENCODERS[family](), tmp_path)
    check(tmp_path, states_of)
