"""Drawing tokens on a CPU, in numpy, row by row: a row stays in a processor's cache."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sensorium.kernels.backend import RowDraws
from sensorium.kernels.token_bits import bits_of

CHUNK = 128  # vocabulary entries that are summed together before one of the sums is chosen


def draw_rows(logits: NDArray[np.float32], draws: RowDraws) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """See `Backend.draw_rows`."""
    size, (rows, temperatures, uniforms, masks) = logits.shape[1], draws
    tokens, highest = np.zeros(len(rows), np.int64), np.empty(len(rows), np.float32)
    weights = np.zeros(-(-size // CHUNK) * CHUNK, np.float32)
    for at, (number, temperature, uniform) in enumerate(zip(rows, temperatures, uniforms, strict=True)):
        row = logits[number]
        if masks is not None:
            row = np.where(bits_of(masks[at], size), row, np.float32(-np.inf))
        highest[at] = row.max()
        if not math.isfinite(highest[at]):
            continue
        if temperature == 0:
            tokens[at] = row.argmax()
            continue
        np.subtract(row, highest[at], out=weights[:size])
        weights[:size] /= temperature
        np.exp(weights[:size], out=weights[:size])
        tokens[at] = _place_of(weights.reshape(-1, CHUNK), float(uniform))
    return tokens, highest


def _place_of(chunks: NDArray[np.float32], uniform: float) -> int:
    sums = chunks.sum(axis=1).cumsum(dtype=np.float64)
    target = uniform * float(sums[-1])
    chosen = min(int(sums.searchsorted(target, side="right")), len(sums) - 1)
    before = float(sums[chosen - 1]) if chosen else 0.0
    return chosen * CHUNK + place_of(chunks[chosen], target - before)


def place_of(weights: NDArray[np.float32], target: float) -> int:
    """The first place where the sum of weights passes `target`; never one that weighs nothing."""
    sums = weights.cumsum(dtype=np.float64)
    place = int(sums.searchsorted(target, side="right"))
    if place < len(sums):
        return place
    return int(np.flatnonzero(weights)[-1])  # the whole sum was rounded in another order than these
