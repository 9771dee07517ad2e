from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sensorium.checkpoint import open_checkpoint
from sensorium.models.base import Model
from sensorium.models.weights import load_model

sys.path.insert(0, str(Path(__file__).parent))  # harness.py


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-VL in float32, where equal means equal."""
    import checkpoints

    path = tmp_path_factory.mktemp("qwen2_vl")
    checkpoints.make_qwen2_vl(path, text={"max_position_embeddings": 2048})
    return path


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    torch.set_num_threads(1)
    return load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")
