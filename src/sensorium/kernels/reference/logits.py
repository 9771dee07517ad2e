"""Edits of logits, in torch: all rows' single tokens at once, masks row by row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sensorium.kernels.backend import Edits
from sensorium.kernels.transfers import to_device


def edit(logits: Tensor, raw: Tensor, edits: Edits) -> None:
    """See `Backend.edit`."""
    size = logits.shape[1]
    rows = [np.arange(len(logits)).repeat(np.diff(starts)) for starts in (edits.bias_starts, edits.seen_starts)]
    columns = [array[rows[1]] for array in (edits.repetition, edits.frequency, edits.presence)]
    arrays = [edits.biased + rows[0] * size, edits.biases, edits.seen + rows[1] * size, edits.said, *columns]
    biased, biases, seen, said, repetition, frequency, presence, masks = to_device(
        [*arrays, edits.masks], logits.device
    )
    flat = logits.view(-1)
    if len(biased):
        flat[biased] += biases
    if len(seen):
        values = flat[seen]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[seen] = values - frequency * said - presence * (said > 0)
    for row in np.flatnonzero(edits.narrowed >= 0):
        logits[row].masked_fill_(_forbidden(masks[edits.narrowed[row]], size), -torch.inf)
    for row in np.flatnonzero(edits.held >= 0):
        logits[row] = _held(
            logits[row], raw[row], *(_forbidden(masks[one[row]], size) for one in (edits.strict, edits.held))
        )


def _held(row: Tensor, raw: Tensor, strict: Tensor, held: Tensor) -> Tensor:
    """A row that is held to a grammar: by the first of two masks that leaves it any token, else as it was before."""
    first, second = row.masked_fill(strict, -torch.inf), row.masked_fill(held, -torch.inf)
    none = [(one == -torch.inf).all() for one in (first, second)]
    return torch.where(none[0], torch.where(none[1], raw.masked_fill(held, -torch.inf), second), first)


def _forbidden(bits: Tensor, size: int) -> Tensor:
    """int32 [words] -> bool [size], what the bits leave out"""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(1) >> places) & 1 == 0).view(-1)[:size]
