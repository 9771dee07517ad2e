"""Hidden states of one sequence -> one vector. Pure functions on [tokens, hidden]; no padding exists here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.checkpoint.pooling import PoolingKind


def _last(hidden: Tensor, skipped: int) -> Tensor:
    return hidden[-1]


def _cls(hidden: Tensor, skipped: int) -> Tensor:
    return hidden[0]


def _mean(hidden: Tensor, skipped: int) -> Tensor:
    return hidden.mean(0)


def _max(hidden: Tensor, skipped: int) -> Tensor:
    return hidden.amax(0)


def _mean_sqrt_len(hidden: Tensor, skipped: int) -> Tensor:
    return hidden.sum(0) / math.sqrt(len(hidden))


def _weighted_mean(hidden: Tensor, skipped: int) -> Tensor:
    """Later tokens weigh more: token i of the whole text (from 1) by i (SGPT, Muennighoff 2022)."""
    weights = skipped + torch.arange(1, hidden.shape[0] + 1, device=hidden.device, dtype=hidden.dtype)
    return (hidden * weights.unsqueeze(1)).sum(0) / weights.sum()


POOLINGS: dict[PoolingKind, Callable[[Tensor, int], Tensor]] = {
    "last": _last,
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "mean_sqrt_len": _mean_sqrt_len,
    "weighted_mean": _weighted_mean,
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softmax": lambda x: torch.softmax(x, -1),
}


def pool(hidden: Tensor, kinds: tuple[PoolingKind, ...], skip: int = 0) -> Tensor:
    """[tokens, hidden] -> float32 [hidden * len(kinds)]. Sums are taken in float32.

    The first `skip` tokens take no part, unless there are no others.
    """
    skip = max(0, min(skip, len(hidden) - 1))
    wide = hidden[skip:].float()
    if len(kinds) == 1:
        return POOLINGS[kinds[0]](wide, skip)
    return torch.cat([POOLINGS[kind](wide, skip) for kind in kinds])


def finish(vector: Tensor, dimensions: int | None, normalize: bool) -> Tensor:
    """Matryoshka cut, then unit length: the order matters. [.., dim] -> [.., dimensions or dim]"""
    if dimensions is not None:
        vector = vector[..., :dimensions]
    return functional.normalize(vector, dim=-1) if normalize else vector
