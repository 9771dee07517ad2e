"""What a model keeps of the tokens that it has seen: groups of layers, each with its kind and shape.

A layer is named by its place in the `KVCache` that `Model.forward` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from sensorium.kernels import cache_width


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that keep the same. Each kind of cache is a subclass."""

    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KeyValueGroup(CacheGroup):
    """Layers whose keys and values have one shape."""

    num_kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that all layers keep of one token (or one row of an encoder)."""
        width = cache_width(self.head_dim, dtype)
        return 2 * len(self.layers) * self.num_kv_heads * width * dtype.itemsize


@dataclass(frozen=True, slots=True)
class PagedGroup(KeyValueGroup):
    """Keys and values of every token, in blocks.

    `sliding_window`: a token at position p sees p - sliding_window + 1 .. p in these layers; None: all before it.
    `shared`: (layer, the layer of this group whose keys and values it reads); such layers keep none of their own.
    """

    sliding_window: int | None = None
    shared: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class EncoderGroup(KeyValueGroup):
    """Keys and values of an encoder's rows, which all of a sequence's tokens attend to. Its layers have no place in the
    `KVCache`, they are numbered by themselves.

    `Model.encoding` computes them once for an input: they are the rows that the encoder cache keeps, by content and
    tenant, as long as a sequence needs them. `num_rows`: of one input, at most.
    """

    num_rows: int

    def input_bytes(self, dtype: torch.dtype) -> int:
        return self.num_rows * self.token_bytes(dtype)


class StatePart(NamedTuple):
    """A tensor of a layer's state; `dtype` None: the model's."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class StateGroup(CacheGroup):
    """A state of fixed size for each sequence, which every token changes (`StateCache`). Snapshots of it are what the
    prefix cache has of these layers."""

    parts: tuple[StatePart, ...]

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state, or of one snapshot, in all layers."""
        sizes = (prod(part.shape) * (part.dtype or dtype).itemsize for part in self.parts)
        return len(self.layers) * sum(sizes)


def states(groups: list[CacheGroup]) -> list[StateGroup]:
    return [group for group in groups if isinstance(group, StateGroup)]


def paged(groups: list[CacheGroup]) -> list[PagedGroup]:
    return [group for group in groups if isinstance(group, PagedGroup)]


def attends_to_media(groups: list[CacheGroup]) -> bool:
    """Whether a prompt has one media item beside its tokens, which all attend to its rows in the encoder cache:
    `AttentionContext.memories` has them, of the shape [num_rows, ...] that the model gave them."""
    return any(isinstance(group, EncoderGroup) for group in groups)
