"""Tests that need a GPU: `python -m pytest tests/gpu -m device`. Without one they are skipped."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def card() -> torch.device:
    """The GPU that is tested."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs need Triton")
    return torch.device("cuda", 0)
