"""Which part of a recording each token is about, by the attention of those heads that follow it (Whisper)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sensorium.types import PoolingParams


class AlignPooler:
    """Heads' attention, each standardised over the tokens, smoothed over time, and averaged.

    Of `PoolingParams`, `prompt_tokens` are left out at the beginning, and `dimensions` are the rows of the recording
    that count (None: all).
    """

    all_tokens = True
    first_only = False
    size = 0  # as many numbers as the recording has rows

    def __init__(self, num_heads: int, filter_width: int) -> None:
        self._num_heads = num_heads
        self._filter_width = filter_width

    def __call__(self, hidden: Tensor, params: PoolingParams, token_ids: NDArray[np.int32]) -> Tensor:
        """[tokens, heads * rows] -> float32 [tokens - prompt_tokens, dimensions]"""
        weights = hidden.view(len(hidden), self._num_heads, -1)[params.prompt_tokens :, :, : params.dimensions]
        std = weights.std(dim=0, keepdim=True, unbiased=False)
        weights = ((weights - weights.mean(dim=0, keepdim=True)) / std).nan_to_num(
            0.0
        )  # one token alone varies nowhere
        return self._smoothed(weights).mean(dim=1)

    def _smoothed(self, x: Tensor) -> Tensor:
        """The median of every row and its neighbours; what is too short for that stays."""
        margin = self._filter_width // 2
        if x.shape[-1] <= margin:
            return x
        padded = functional.pad(x, (margin, margin), mode="reflect")
        return padded.unfold(-1, self._filter_width, 1).sort()[0][..., margin]
