"""How much memory there is and how many KV-cache blocks it makes: arithmetic, no trial runs. On a GPU the first large
step shows whether the arithmetic was right."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from sensorium.config import ENCODER_CACHE_BYTES, WINDOWS_TOGETHER, EngineConfig
from sensorium.engine.encoder_cache import OTHERS_PART
from sensorium.engine.tables import BlockTables
from sensorium.errors import StartupError
from sensorium.models.cache import CacheGroup, EncoderGroup
from sensorium.system.memory import free_memory_bytes
from sensorium.units import size_text

CPU_PART = 0.25  # of free memory for the KV cache, where the flag does not say
STATES_PART = 0.5  # of the cache's memory that states may take
SNAPSHOT_TOKENS = 128  # for so many tokens of keys and values there is one snapshot of states
LEAST_SLOTS = 3  # of states: see `StateSlots`
WORKSPACES = 64 * 1024 * 1024  # bytes of a GPU that libraries of products keep
ENCODER_PART = 0.125  # of free memory that tower outputs may take, whatever the flag says
LARGE_STEP = 0.5  # of the tokens that a step may have, from which on it is a large one

logger = logging.getLogger(__name__)


def size_cache(
    config: EngineConfig, tables: BlockTables, block_bytes: int, wanted_len: int, available_bytes: int
) -> tuple[int, int]:
    """(number of blocks, longest sequence): what fits, and no more than `max_num_seqs` longest sequences can use."""
    per_sequence = tables.needed(wanted_len)
    blocks = min(available_bytes // block_bytes, per_sequence * config.max_num_seqs)
    capacity = wanted_len if blocks >= per_sequence else longest_sequence(tables, wanted_len, blocks)
    if capacity <= 0:
        raise StartupError(
            f"there is no memory for a KV cache: one block of {tables.block_size} tokens takes "
            f"{size_text(tables.needed(1) * block_bytes)}, {size_text(max(available_bytes, 0))} can be had "
            "(--kv-cache-memory or --gpu-memory-utilization sets how much)"
        )
    if capacity < wanted_len and config.max_model_len is not None:
        needed = size_text(per_sequence * block_bytes)
        raise StartupError(
            f"--max-model-len {wanted_len} needs {needed} of KV cache, {size_text(available_bytes)} can "
            "be had: lower it, or raise --kv-cache-memory (on a GPU --gpu-memory-utilization)"
        )
    return blocks, capacity


def size_states(
    config: EngineConfig, tables: BlockTables, block_bytes: int, slot_bytes: int, wanted_len: int, available_bytes: int
) -> int:
    """Slots of states: two for each sequence that runs, and snapshots in proportion to the tokens whose keys and values
    the rest of the memory holds; 0 without states. Snapshots and then sequences are given up where states would take
    more than their part, or not leave --max-model-len what it needs."""
    if not slot_bytes:
        return 0
    running = 1 + 2 * config.max_num_seqs
    per_sequence = tables.needed(wanted_len) * block_bytes
    per_token = per_sequence / wanted_len + slot_bytes / SNAPSHOT_TOKENS
    tokens = min((available_bytes - running * slot_bytes) / per_token, config.max_num_seqs * wanted_len)
    most = STATES_PART * available_bytes
    if config.max_model_len is not None:
        most = min(most, available_bytes - per_sequence)
    wanted = running + max(round(tokens / SNAPSHOT_TOKENS), 0)
    return max(min(wanted, int(most / slot_bytes)), LEAST_SLOTS)


def longest_sequence(tables: BlockTables, wanted_len: int, num_blocks: int) -> int:
    """Tokens, in whole blocks, of a sequence that so many blocks hold."""
    counts = range(tables.blocks(wanted_len) + 1)
    return (bisect_right(counts, num_blocks, key=lambda count: tables.needed(count * tables.block_size)) - 1) * (
        tables.block_size
    )


def available_for_cache(
    config: EngineConfig, device: torch.device, activation_bytes: int, mapped_bytes: int = 0, num_ranks: int = 1
) -> int:
    """Bytes that the KV cache may take, now that the weights are loaded; of several ranks, each rank's."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if device.type == "cpu":
        return int(max(free_memory_bytes() - mapped_bytes, 0) * CPU_PART) // num_ranks
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - activation_bytes - WORKSPACES


def graph_bytes(rows: int, vocab_size: int, step_bytes: int) -> int:
    """What graphs of decodes of up to so many sequences keep: float32 logits, which all share, and the memory of the
    largest, which the others use in turn. `step_bytes`: of the states of such a step."""
    return 4 * rows * vocab_size + step_bytes if rows else 0


@dataclass(slots=True)
class StepMemory:
    """What a GPU says of the sum that its cache was sized by."""

    device: torch.device
    allowed_bytes: int  # beside weights and cache
    most_tokens: int  # of a step
    kept_bytes: int  # weights and cache

    @classmethod
    def begin(cls, device: torch.device, allowed_bytes: int, most_tokens: int) -> StepMemory:
        """From now on: what loading took is not counted."""
        torch.cuda.reset_peak_memory_stats(device)
        return cls(device, allowed_bytes, most_tokens, torch.cuda.memory_allocated(device))

    def is_known_after(self, tokens: int) -> bool:
        """Whether a step of so many tokens was large enough to tell. If it took more than was allowed for, the log
        says what leaves room for it."""
        if tokens < LARGE_STEP * self.most_tokens:
            return False
        taken = torch.cuda.max_memory_allocated(self.device) - self.kept_bytes
        if taken <= self.allowed_bytes:
            logger.info("a step took %s beside weights and cache, of %s allowed for", *self._sizes(taken))
            return True
        _, total = torch.cuda.mem_get_info(self.device)
        logger.warning(
            "a step of %d tokens took %s beside weights and cache, %s were allowed for: lower "
            "--gpu-memory-utilization by %.2f or --max-num-batched-tokens if memory runs out",
            tokens,
            *self._sizes(taken),
            -(-100 * (taken - self.allowed_bytes) // total) / 100,
        )
        return True

    def _sizes(self, taken: int) -> tuple[str, str]:
        return size_text(taken), size_text(self.allowed_bytes)


def encoder_cache_bytes(
    config: EngineConfig, device: torch.device, groups: Sequence[CacheGroup], dtype: torch.dtype
) -> int:
    """What tower outputs may take: as the flag says, or what a small container has room for. Of inputs that sequences
    attend to there are as many as are decoded together, in what the cache leaves to one tenant."""
    wanted = config.encoder_cache_memory
    if wanted is None:
        inputs = sum(group.input_bytes(dtype) for group in groups if isinstance(group, EncoderGroup))
        wanted = max(ENCODER_CACHE_BYTES, ceil(WINDOWS_TOGETHER * inputs / (1 - OTHERS_PART)))
    return wanted if device.type != "cpu" else min(wanted, int(free_memory_bytes() * ENCODER_PART))


def encoder_row_bytes(groups: Sequence[CacheGroup], hidden_size: int, dtype: torch.dtype) -> int:
    """Of one row in the encoder cache: a hidden state, or the keys and values that a decoder's layers have of it."""
    of_layers = sum(group.token_bytes(dtype) for group in groups if isinstance(group, EncoderGroup))
    return of_layers or hidden_size * dtype.itemsize
