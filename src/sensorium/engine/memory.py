"""How much memory there is and how many KV-cache blocks it makes: arithmetic, no trial runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensorium.config import EngineConfig
from sensorium.errors import StartupError
from sensorium.kernels import cache_width
from sensorium.kernels.context import KVCache
from sensorium.models.cache import CacheGroup, EncoderGroup, PagedGroup
from sensorium.system.memory import free_memory_bytes
from sensorium.units import size_text

CPU_PART = 0.25  # of free memory for the KV cache, where the flag does not say
ENCODER_PART = 0.125  # of free memory that tower outputs may take, whatever the flag says


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The blocks of a model's paged groups: each holds `block_size` tokens of all of them."""

    groups: tuple[PagedGroup, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return self.block_size * sum(group.token_bytes(self.dtype) for group in self.groups)

    def make(self, num_blocks: int, device: torch.device) -> KVCache:
        """Zeros for every layer, by place; layers that share a cache have the same tensors."""
        layers: dict[int, tuple[Tensor, Tensor]] = {}
        for group in self.groups:
            size = (num_blocks, group.num_kv_heads, self.block_size, cache_width(group.head_dim, self.dtype))
            for layer in group.layers:
                layers[layer] = (_zeros(size, self.dtype, device), _zeros(size, self.dtype, device))
            for layer, source in group.shared:
                layers[layer] = layers[source]
        return [layers[place] for place in range(len(layers))]


def size_cache(config: EngineConfig, layout: CacheLayout, wanted_len: int, available_bytes: int) -> tuple[int, int]:
    """(number of blocks, longest sequence): what fits, and no more than `max_num_seqs` longest sequences can use."""
    per_sequence = -(-wanted_len // layout.block_size)
    blocks = min(available_bytes // layout.block_bytes, per_sequence * config.max_num_seqs)
    capacity = blocks * layout.block_size
    if capacity < min(wanted_len, layout.block_size):
        raise StartupError(
            f"there is no memory for a KV cache: one block of {layout.block_size} tokens takes "
            f"{size_text(layout.block_bytes)}, {size_text(max(available_bytes, 0))} can be had "
            "(--kv-cache-memory or --gpu-memory-utilization sets how much)"
        )
    if capacity < wanted_len and config.max_model_len is not None:
        needed = size_text(per_sequence * layout.block_bytes)
        raise StartupError(
            f"--max-model-len {wanted_len} needs {needed} of KV cache, {size_text(available_bytes)} can "
            "be had: lower it, or raise --kv-cache-memory (on a GPU --gpu-memory-utilization)"
        )
    return blocks, min(wanted_len, capacity)


def available_for_cache(
    config: EngineConfig, device: torch.device, activation_bytes: int, mapped_bytes: int = 0
) -> int:
    """Bytes that the KV cache may take, now that the weights are loaded."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if device.type == "cpu":
        return int(max(free_memory_bytes() - mapped_bytes, 0) * CPU_PART)
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - activation_bytes


def encoder_cache_bytes(config: EngineConfig, device: torch.device) -> int:
    """What tower outputs may take: as the flag says, or what a small container has room for."""
    if device.type != "cpu":
        return config.encoder_cache_memory
    return min(config.encoder_cache_memory, int(free_memory_bytes() * ENCODER_PART))


def encoder_row_bytes(groups: Sequence[CacheGroup], hidden_size: int, dtype: torch.dtype) -> int:
    """Of one row in the encoder cache: a hidden state, or the keys and values that a decoder's layers have of it."""
    of_layers = sum(group.token_bytes(dtype) for group in groups if isinstance(group, EncoderGroup))
    return of_layers or hidden_size * dtype.itemsize


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # torch.zeros writes to every page; numpy's come zeroed from the kernel when they are first used.
    count = int(np.prod(size))
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(size)
