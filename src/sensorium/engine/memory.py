"""How much memory there is and how many KV-cache blocks it makes: arithmetic, no trial runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sensorium.config import EngineConfig
from sensorium.errors import StartupError
from sensorium.kernels import cache_width
from sensorium.kernels.context import KVCache
from sensorium.models.base import Model
from sensorium.system.memory import free_memory_bytes

CPU_PART = 0.25  # of free memory for the KV cache, where the flag does not say
ENCODER_PART = 0.125  # of free memory that tower outputs may take, whatever the flag says


@dataclass(frozen=True, slots=True)
class CacheShape:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def row_width(self) -> int:
        """Elements of one token's keys or values in one head: of int8 the scale's bytes too."""
        return cache_width(self.head_dim, self.dtype)

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * self.row_width * self.dtype.itemsize


def cache_shape(model: Model, block_size: int, dtype: torch.dtype) -> CacheShape:
    return CacheShape(model.num_layers, model.num_kv_heads, model.head_dim, block_size, dtype)


def size_cache(config: EngineConfig, shape: CacheShape, wanted_len: int, available_bytes: int) -> tuple[int, int]:
    """(number of blocks, longest sequence): what fits, and no more than `max_num_seqs` longest sequences can use."""
    per_sequence = -(-wanted_len // shape.block_size)
    blocks = min(available_bytes // shape.block_bytes, per_sequence * config.max_num_seqs)
    capacity = blocks * shape.block_size
    if capacity < min(wanted_len, shape.block_size):
        raise StartupError(
            f"there is no memory for a KV cache: one block of {shape.block_size} tokens takes "
            f"{_readable(shape.block_bytes)}, {_readable(max(available_bytes, 0))} can be had "
            "(--kv-cache-memory or --gpu-memory-utilization sets how much)"
        )
    if capacity < wanted_len and config.max_model_len is not None:
        needed = _readable(per_sequence * shape.block_bytes)
        raise StartupError(
            f"--max-model-len {wanted_len} needs {needed} of KV cache, {_readable(available_bytes)} can "
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


def make_cache(shape: CacheShape, num_blocks: int, device: torch.device) -> KVCache:
    size = (num_blocks, shape.num_kv_heads, shape.block_size, shape.row_width)
    return [(_zeros(size, shape.dtype, device), _zeros(size, shape.dtype, device)) for _ in range(shape.num_layers)]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # torch.zeros writes to every page; numpy's come zeroed from the kernel when they are first used.
    count = int(np.prod(size))
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(size)


def _readable(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.2f} GiB" if size_bytes >= 1024**3 else f"{size_bytes / 1024**2:.1f} MiB"
