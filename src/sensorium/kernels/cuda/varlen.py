"""Attention inside runs of tokens, both ways: all runs in one call of torch's flash attention."""

from __future__ import annotations

from collections import OrderedDict
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from sensorium.kernels.transfers import to_device

WIDEST = 256  # head size
MULTIPLE = 8  # of a head's numbers; others are filled up with zeros, which change no score
KEPT = 64  # batches whose starts stay on the device: all layers of a tower ask for the same

Starts = OrderedDict[tuple[int, ...], Tensor]


def takes(*tensors: Tensor) -> bool:
    """Whether torch computes with such queries, keys and values."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in (torch.bfloat16, torch.float16)
        and first.shape[2] <= WIDEST
        and all(one.dtype is first.dtype and one.stride(2) == 1 for one in tensors)
    )


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
    heard: list[int] | None,
    kept: Starts,
) -> Tensor:
    """See `Backend.varlen_attention`; k and v are those of the keys that are `heard`, if that is given."""
    size, group = q.shape[2], q.shape[1] // k.shape[1]
    if group > 1:  # before torch 2.12 it takes as many heads of each
        k, v = (one.repeat_interleave(group, dim=1) for one in (k, v))
    if missing := -size % MULTIPLE:
        q, k, v = (functional.pad(one, (0, missing)) for one in (q, k, v))
    keys = heard or lengths
    sides = (-1, -1) if window is None else (window, window)
    out = varlen_attn(
        q, k, v, _starts(lengths, q.device, kept), _starts(keys, q.device, kept), max(lengths), max(keys), scale=scale,
        window_size=sides,
    )  # fmt: skip
    if not isinstance(out, Tensor):
        raise TypeError("torch's attention gave more than was asked for")
    return out[..., :size] if missing else out


def _starts(lengths: list[int], device: torch.device, kept: Starts) -> Tensor:
    """int32 [runs + 1], on the device."""
    key = tuple(lengths)
    if key not in kept:
        [kept[key]] = to_device([np.fromiter(accumulate(lengths, initial=0), np.int32)], device)
        if len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
