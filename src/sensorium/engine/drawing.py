"""Drawing tokens by inverting the cumulative distribution at a number of [0, 1).

Tokens keep the vocabulary's order, so that rank plays no part: a row is filtered by value and takes one number of a
counter-based stream. With a grammar it draws as if there were none, and where what came is forbidden, again by the next
stream's number: `TRIES` times, and the last time among what is allowed. That is the grammar's distribution. Filtered
rows have their mask first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium import kernels
from sensorium.kernels.reference.drawing import CHUNK, place_of
from sensorium.kernels.transfers import to_device
from sensorium.types import SamplingParams

LIKELY = -8.0  # scaled logits above this usually hold any nucleus (weights above 1/3000 of the highest)
GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow

TRIES = 3
"""Draws of a row with a grammar among all tokens, before one among those that are allowed, which needs a mask."""

_STREAM = 0xA0761D6478BD642F  # any bits
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


def draws_of(seeds: list[int], indices: list[int], params: Seq[SamplingParams]) -> kernels.Draws:
    """What a kernel has to know."""
    return kernels.Draws(
        np.array(seeds, np.uint64),
        np.array(indices, np.uint64),
        np.array([one.top_p for one in params], np.float64),
        np.array([one.temperature for one in params], np.float32),
        np.array([math.log(one.min_p) if one.min_p else -math.inf for one in params], np.float32),
        np.array([one.top_k for one in params], np.int32),
    )


def is_open(params: SamplingParams) -> bool:
    """Whether nothing is filtered, so that a token that a grammar allows is no likelier for what it forbids."""
    return not (params.top_k or params.top_p < 1 or params.min_p) or is_greedy(params)


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW or params.top_k == 1


def draw_filtered(row: NDArray[np.float32], params: SamplingParams, uniform: float) -> int:
    """A token of one row [vocab] on a CPU, of those that top_k, top_p and min_p leave."""
    highest = row.max()
    if not np.isfinite(highest):
        return 0  # this row fails, see `sampler._checked`
    scaled = row - highest
    scaled /= np.float32(params.temperature)
    stay = np.flatnonzero(scaled >= np.float32(row_threshold(scaled, params)))
    weights = np.exp(scaled[stay])
    return int(stay[place_of(weights, uniform * float(weights.sum(dtype=np.float64)))])


def draw_together(logits: Tensor, params: Seq[SamplingParams], uniforms: NDArray[np.float64]) -> Tensor:
    """The same for all rows [rows, vocab] at once, on any device -> int64 [rows]. Nothing is read from it."""
    count, vocab_size = logits.shape
    of = draws_of([0] * count, [0] * count, params)
    temperatures, top_k, least, top_p, numbers = to_device(
        [of.temperature, of.top_k, of.least, of.top_p, uniforms], logits.device
    )
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures.unsqueeze(1))
    padded = torch.zeros((count, -(-vocab_size // CHUNK) * CHUNK), device=logits.device)
    weights = torch.exp(scaled, out=padded[:, :vocab_size])  # [rows, vocab], highest is 1
    if any(one.top_k or one.top_p < 1 or one.min_p for one in params):
        weights.mul_(scaled >= _thresholds(scaled, least, top_k, top_p).unsqueeze(1))
    chunks = padded.view(count, -1, CHUNK)
    sums = chunks.sum(dim=-1).double().cumsum(dim=-1)  # [rows, chunks]
    target = numbers * sums[:, -1]
    chosen = (sums <= target.unsqueeze(1)).sum(dim=-1).clamp_(max=sums.shape[1] - 1)  # first chunk whose sum is above
    every = torch.arange(count, device=logits.device)
    before = torch.where(chosen > 0, sums[every, (chosen - 1).clamp(min=0)], 0)
    inside = chunks[every, chosen]  # [rows, CHUNK]
    place = (inside.double().cumsum(dim=-1) <= (target - before).unsqueeze(1)).sum(dim=-1)
    last = CHUNK - 1 - (inside > 0).flip(-1).to(torch.uint8).argmax(dim=-1)  # as in `place_of`
    return chosen * CHUNK + torch.minimum(place, last)


def _thresholds(scaled: Tensor, least: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest scaled logit of each row [rows, vocab] that min_p, top_k and top_p, as in `Draws`, leave; equal logits
    stay together.

    The highest logit of a row is 0. Sorts everything, which a GPU does fast.
    """
    vocab_size = scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values
    count = torch.where(top_k > 0, top_k, vocab_size).unsqueeze(1)
    share = top_p.unsqueeze(1)
    rank = torch.arange(vocab_size, device=scaled.device)
    stays = (ordered >= least.unsqueeze(1)) & (rank < count)
    weights = torch.where(stays, ordered.exp(), 0).double()
    sums = weights.cumsum(dim=-1)
    # A token stays while those before it hold less than top_p.
    stays &= (sums - weights < share * sums[:, -1:]) | (share >= 1)
    kept = stays.sum(dim=-1).clamp(min=1)
    return ordered.gather(1, (kept - 1).unsqueeze(1)).squeeze(1)


def row_threshold(row: NDArray[np.float32], params: SamplingParams) -> float:
    """The same for one row [vocab] on a CPU, looking at no more tokens than needed."""
    least = math.log(params.min_p) if params.min_p else -math.inf
    top_k = params.top_k if 0 < params.top_k < len(row) else 0
    if not top_k and params.top_p >= 1:
        return least
    likely = row[row >= LIKELY]
    if top_k:
        if len(likely) < top_k:
            likely = row
        likely = np.partition(likely, len(likely) - top_k)[len(likely) - top_k :]
        if params.top_p >= 1:
            return max(least, float(likely[0]))
        return _nucleus(likely, params.top_p, least)
    total = float(np.exp(row if least == -math.inf else row[row >= least]).sum())
    held = float(np.exp(likely[likely >= least]).sum())
    return _nucleus(likely if held > params.top_p * total else row, params.top_p, least, total)


def _nucleus(scaled: NDArray[np.float32], top_p: float, least: float, total: float | None = None) -> float:
    """The lowest of the fewest scaled logits that hold `top_p` of `total` (None: of all of them)."""
    ordered = np.sort(scaled)[::-1]  # as fast as anything cleverer: numpy sorts with vector instructions
    weights = np.exp(ordered).astype(np.float64)
    weights[ordered < least] = 0
    sums = weights.cumsum()
    bound = top_p * (sums[-1] if total is None else total)
    kept = int((sums - weights < bound).sum())
    return float(ordered[max(kept, 1) - 1])


# Random numbers


def seed_of(requested: int | None, engine_seed: int, request_id: int) -> int:
    """Requests without a seed get one of their own, the same in every run of an engine with the same seed."""
    if requested is not None:
        return requested & 0xFFFFFFFFFFFFFFFF
    mixed = _mix(np.array([engine_seed & 0xFFFFFFFFFFFFFFFF], np.uint64) * _GOLDEN + np.uint64(request_id))
    return int(mixed[0])


def stream_seed(seed: int, stream: int) -> int:
    """Of the stream that a row takes its number from when it draws again; 0 is the first."""
    return seed ^ (stream * _STREAM & 0xFFFFFFFFFFFFFFFF)


def uniforms_of(seeds: list[int], indices: list[int]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, token index): 32 bits of two rounds of splitmix64."""
    state = _mix(np.array(seeds, np.uint64) + _GOLDEN)
    bits = _mix(state + np.array(indices, np.uint64) * _GOLDEN)
    return (bits >> np.uint64(32)).astype(np.float64) / 2**32


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_A
    state = (state ^ (state >> np.uint64(27))) * _MIX_B
    return state ^ (state >> np.uint64(31))
