"""The experts of a routed layer in plain torch, one product after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sensorium.kernels.backend import Activation, PackedWeight
from sensorium.kernels.reference.norms import gated


class PlainExperts:
    """Works with weights of every layout."""

    __slots__ = ("_activation", "_down", "_gate_up")

    def __init__(self, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: Activation) -> None:
        self._gate_up, self._down, self._activation = list(gate_up), list(down), activation

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        starts, tokens, weights = by_expert(chosen, weights, len(self._down))
        ends = starts.tolist()
        for expert, (first, last) in enumerate(itertools.pairwise(ends)):
            if first < last:
                own = tokens[first:last]
                states = self._down[expert](gated(self._gate_up[expert](x[own]), self._activation))
                out.index_add_(0, own, states * weights[first:last, None])
        return out.to(x.dtype)


def experts(gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: Activation) -> PlainExperts:
    return PlainExperts(gate_up, down, activation)


def choose(logits: Tensor, per_token: int, *, renormalizes: bool, scale: float) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    chosen = wide.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]
    weights = wide.softmax(-1).gather(1, chosen)
    if renormalizes:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights if scale == 1.0 else weights * scale


def by_expert(chosen: Tensor, weights: Tensor, count: int, first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts and their weights [tokens, k] -> (where each expert's rows begin, int64 [count + 1]; the token of
    each row, int64 [tokens * k]; its weight), an expert's tokens in ascending order.

    `first`: the experts are that one and those after it, and rows of others stand behind all of theirs."""
    flat = chosen.flatten()
    if first is not None:
        flat = flat - first
        flat = torch.where((flat < 0) | (flat >= count), count, flat)
    order = flat.argsort(stable=True)
    starts = torch.zeros(count + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(torch.bincount(flat, minlength=count)[:count], 0, out=starts[1:])
    return starts, order.div(chosen.shape[1], rounding_mode="floor"), weights.flatten()[order]
