from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from transformers import PreTrainedModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.models.base import Model
from sensorium.models.loading import load_model

Made = tuple[PreTrainedModel, Model]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """(family, layout, options) -> transformers' model and ours, loaded in float32 from the same files."""

    def make(family: str, layout: str = "hub", **options: Any) -> Made:
        folder: Path = tmp_path_factory.mktemp(family)
        oracle = getattr(checkpoints, f"make_{family}")(folder, layout, **options)
        return oracle, load_model(open_checkpoint(folder), dtype=torch.float32, device="cpu")

    return make
