"""Edits of single logits in Triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sensorium.kernels.cuda.device import logits as device
from sensorium.kernels.cuda.launch import launch

BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Edits:
    """What is asked of each row, all on the logits' device. Row i's part of a list is [starts[i], starts[i + 1]); there
    a token stands once."""

    bias_starts: Tensor  # int32 [rows + 1]
    biased: Tensor  # int32 [n], tokens
    biases: Tensor  # float32 [n], added; minus infinity forbids
    seen_starts: Tensor  # int32 [rows + 1]
    seen: Tensor  # int32 [m], tokens of prompt and output
    said: Tensor  # float32 [m], how often each stands in the output
    repetition: Tensor  # float32 [rows]; 1: none
    frequency: Tensor  # float32 [rows]
    presence: Tensor  # float32 [rows]
    masks: Tensor  # int32 [masks, words], a bit for each token that is allowed
    mask_of: Tensor  # int32 [rows], the row's mask; -1: none


def edit(logits: Tensor, edits: Edits) -> None:
    """float32 logits [rows, vocab], in place, with the order and the meaning of `engine.sampler`."""
    rows, size = logits.shape
    launch(
        device.edit, (rows,), logits, edits.bias_starts, edits.biased, edits.biases, edits.seen_starts, edits.seen,
        edits.said, edits.repetition, edits.frequency, edits.presence, edits.masks, edits.mask_of, logits.stride(0),
        size, edits.masks.shape[1], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
