"""Edits of logits in Triton."""

from __future__ import annotations

from torch import Tensor

from sensorium.kernels.backend import Edits
from sensorium.kernels.cuda.device import logits as device
from sensorium.kernels.cuda.launch import launch
from sensorium.kernels.transfers import to_device

BLOCK = 1024


def edit(logits: Tensor, raw: Tensor, edits: Edits) -> None:
    """See `Backend.edit`: one copy and one launch for all rows."""
    rows, size = logits.shape
    launch(
        device.edit, (rows,), logits, raw, *to_device(edits.arrays(), logits.device), logits.stride(0), raw.stride(0),
        size, edits.masks.shape[1], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
