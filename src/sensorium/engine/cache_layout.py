"""Where the keys and values of each layer lie in a block of the cache.

All blocks have the same bytes, so that one pool serves every table: a sequence may have many blocks in one and few in
another. A block is a row of lanes; a layer takes one, or narrow layers share one. Where all layers have the same window
there is one table; else each table has layers of one window, as many as the lanes hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sensorium.kernels import cache_width
from sensorium.kernels.context import KVCache, LayerCache, StateCache
from sensorium.models.cache import PagedGroup, StateGroup

MAX_TABLES = 16  # of a model with several windows: each is a little work for every sequence and step
MAX_WASTE = 0.1  # part of a block that no layer uses, where fewer tables are to be had for it


class Place(NamedTuple):
    table: int
    lane: int
    offset: int  # elements of a token that other layers have in the lane before it


@dataclass(frozen=True, slots=True)
class CacheLayout:
    groups: tuple[PagedGroup, ...]
    block_size: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]  # of each table
    lanes: tuple[int, ...]  # elements of one token's keys (or values) in each
    places: dict[int, Place]  # by layer

    @classmethod
    def of(
        cls, groups: Sequence[PagedGroup], block_size: int, dtype: torch.dtype, max_len: int | None = None
    ) -> CacheLayout:
        """`max_len`: tokens of the longest sequence; a window that is no shorter is none."""
        layers: dict[int | None, list[tuple[int, int]]] = {}  # (layer, elements of a token)
        for group in groups:
            window = group.sliding_window
            if window is not None and max_len is not None and window >= max_len:
                window = None
            width = group.num_kv_heads * cache_width(group.head_dim, dtype)
            layers.setdefault(window, []).extend((layer, width) for layer in group.layers)
        windows, lanes, places = _arranged(layers)
        return cls(tuple(groups), block_size, dtype, windows, lanes, places)

    @property
    def block_bytes(self) -> int:
        return 2 * self.block_size * sum(self.lanes) * self.dtype.itemsize

    def make(self, num_blocks: int, device: torch.device) -> dict[int, LayerCache]:
        """Zeros for every layer, by place; layers that share a cache have the same tensors."""
        shapes = [(num_blocks, self.block_size * width) for width in self.lanes]
        lanes = [(_zeros(shape, self.dtype, device), _zeros(shape, self.dtype, device)) for shape in shapes]
        layers: dict[int, LayerCache] = {}
        for group in self.groups:
            for layer in group.layers:
                place = self.places[layer]
                keys, values = (self._of_layer(tensor, group, place.offset) for tensor in lanes[place.lane])
                layers[layer] = LayerCache(keys, values, place.table)
            for layer, source in group.shared:
                layers[layer] = layers[source]
        return layers

    def _of_layer(self, lane: Tensor, group: PagedGroup, offset: int) -> Tensor:
        shape = (group.num_kv_heads, self.block_size, cache_width(group.head_dim, self.dtype))
        part = lane.narrow(1, offset * self.block_size, shape[0] * shape[1] * shape[2])
        return part.view(len(lane), *shape)


def make_states(
    groups: Sequence[StateGroup], num_slots: int, dtype: torch.dtype, device: torch.device
) -> dict[int, StateCache]:
    """Zeros for every layer, by place."""
    return {
        layer: StateCache(tuple(_zeros((num_slots, *part.shape), part.dtype or dtype, device) for part in group.parts))
        for group in groups
        for layer in group.layers
    }


def by_place(*layers: Mapping[int, LayerCache | StateCache]) -> KVCache:
    """What all layers keep, as a model is given it."""
    made = {number: one for part in layers for number, one in part.items()}
    return [made[number] for number in range(len(made))]


def _arranged(
    layers: dict[int | None, list[tuple[int, int]]],
) -> tuple[tuple[int | None, ...], tuple[int, ...], dict[int, Place]]:
    """(windows of the tables, widths of the lanes, the place of each layer)"""
    if len(layers) == 1:
        [(window, only)] = layers.items()
        return (window,), tuple(width for _, width in only), {only[i][0]: Place(0, i, 0) for i in range(len(only))}
    lane = _lane_width({width for own in layers.values() for _, width in own})
    rows = {window: _in_lanes(own, lane) for window, own in layers.items()}
    height = _height([len(own) for own in rows.values()])
    windows: list[int | None] = []
    places: dict[int, Place] = {}
    for window in sorted(rows, key=lambda one: (one is not None, one)):
        for index, row in enumerate(rows[window]):
            if index % height == 0:
                windows.append(window)
            places |= {layer: Place(len(windows) - 1, index % height, offset) for layer, offset in row}
    return tuple(windows), (lane,) * height, places


def _lane_width(widths: Iterable[int]) -> int:
    """That of the widest layer, or a little more where narrow ones then share a lane."""
    widest = max(widths)
    return max(width * round(widest / width) for width in widths if width * round(widest / width) <= 1.1 * widest)


def _in_lanes(layers: list[tuple[int, int]], lane: int) -> list[list[tuple[int, int]]]:
    """Layers of one window as lanes of (layer, offset)."""
    rows: list[list[tuple[int, int]]] = []
    room = 0
    for layer, width in sorted(layers, key=lambda one: -one[1]):
        if width > room:
            rows.append([])
            room = lane
        rows[-1].append((layer, lane - room))
        room -= width
    return rows


def _height(counts: list[int]) -> int:
    """Lanes of a block: as many as leave few of them empty, for windows whose layers take so many lanes each."""
    least = -(-sum(counts) // MAX_TABLES)
    made = {height: sum(-(-count // height) * height for count in counts) for height in range(least, max(counts) + 1)}
    good = [height for height, lanes in made.items() if lanes <= sum(counts) * (1 + MAX_WASTE)]
    return max(good) if good else min(made, key=made.__getitem__)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # torch.zeros writes to every page; numpy's come zeroed from the kernel when they are first used.
    count = int(np.prod(size))
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(size)
