"""Attention whose scores have something added that depends on how far a key is from the query.

Runs are computed one by one, and a long one a part of its queries at a time, so that what is added stays small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sensorium import kernels
from sensorium.models.encoder import PostNormEncoder, SelfAttention, Step

BIAS_ELEMENTS = 4 * 1024 * 1024
"""Of one piece of queries, all heads together."""
PIECE_COPIES = 6
"""Biases, scores and what they are made of, that are held at once."""


class BiasedAttention(SelfAttention):
    def attended(self, q: Tensor, k: Tensor, v: Tensor, step: Step, *, first_only: bool) -> Tensor:
        shared = self.shared(step)
        counts = [1] * len(step.lengths) if first_only else step.lengths
        out = torch.empty_like(q)
        runs = (torch.split(k, step.lengths), torch.split(v, step.lengths), torch.split(q, counts))
        for all_keys, all_values, queries, into, seen in zip(*runs, torch.split(out, counts), step.seen, strict=True):
            keys, values = all_keys[:seen], all_values[:seen]
            size = max(1, BIAS_ELEMENTS // (keys.shape[0] * keys.shape[1]))
            for start in range(0, len(queries), size):
                some = queries[start : start + size]
                bias = self.bias(some, keys, start, shared)
                into[start : start + size] = kernels.biased_attention(some, keys, values, bias, self.scale)
        return out

    def shared(self, step: Step) -> Sequence[Tensor]:
        """What all runs of a step need to make their biases."""
        raise NotImplementedError

    def bias(self, q: Tensor, k: Tensor, start: int, shared: Sequence[Tensor]) -> Tensor:
        """q [queries, heads, head_dim], the first of them token `start` of a run with the keys k -> what is added to
        the scaled scores, [heads, queries, keys]"""
        raise NotImplementedError


class BiasedEncoder(PostNormEncoder):
    """An encoder with such attention."""

    def activation_bytes(self, tokens: int) -> int:
        size = self.embeddings.LayerNorm.weight.element_size()
        return super().activation_bytes(tokens) + PIECE_COPIES * BIAS_ELEMENTS * max(size, 4)


def by_distance(table: Tensor, start: int, queries: int, keys: int) -> Tensor:
    """[heads, 2 * longest - 1] by the distance from query to key, the longest way back first -> [heads, queries,
    keys] of the queries from token `start` on."""
    longest = (table.shape[1] + 1) // 2
    rows = table.unfold(1, keys, 1)[:, longest - start - queries : longest - start]
    return rows.flip(1)
