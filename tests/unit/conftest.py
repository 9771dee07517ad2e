"""A tiny model that the tests of the engine and of its client share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.models.base import Model
from sensorium.models.loading import load_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-VL in float32, where equal means equal."""
    from support import checkpoints

    path = tmp_path_factory.mktemp("qwen2_vl")
    checkpoints.make_qwen2_vl(path, text={"max_position_embeddings": 2048})
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    torch.set_num_threads(1)
    return load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")
