"""Attention and the KV cache in native code: bf16, int8 caches, and float32 where it is faster than torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.cpu.library import AttentionArguments, Library

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext

QUERY_STEP = 192  # of one run; up to a tile's rows (96) the keys of a run are split among threads, which adds otherwise
CACHE_DTYPES = (torch.bfloat16, torch.int8)
_BF16 = torch.bfloat16


def heads_are_adjacent(x: Tensor, dtype: torch.dtype = _BF16) -> bool:
    """Whether the heads of each token lie side by side: [tokens, heads, head_dim], any distance between tokens."""
    head_dim = x.shape[2]
    return x.dtype is dtype and x.stride(2) == 1 and (x.stride(1) == head_dim or x.shape[1] == 1)


class AttentionKernels(Library):
    """What the kernels do not take (odd head sizes, strange strides) is computed by the reference implementation."""

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        if not (
            heads_are_adjacent(k)
            and heads_are_adjacent(v)
            and k_cache.dtype is v_cache.dtype
            and k_cache.dtype in CACHE_DTYPES
            and k_cache.is_contiguous()
            and v_cache.is_contiguous()
            and slots.is_contiguous()
        ):
            reference.write_kv(k, v, k_cache, v_cache, slots)
            return
        _, heads, block_size, _ = k_cache.shape
        self._write_kv(
            self._runtime,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            k.shape[0],
            heads,
            k.shape[2],
            block_size,
            k_cache.dtype is torch.int8,
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        context: AttentionContext,
        scale: float,
        sliding_window: int | None = None,
        visible: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if not self._takes_pages(q, k_cache, v_cache, context):
            return reference.paged_attention(q, k_cache, v_cache, context, scale, sliding_window, visible, sinks)
        _, heads, head_dim = q.shape
        sizes = (heads, k_cache.shape[1], head_dim, k_cache.shape[2])  # of a block: [key-value heads, tokens]
        tables = context.block_tables
        out = q.new_empty(q.shape)
        arguments = AttentionArguments(
            q.data_ptr(),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            q.stride(0),
            heads * head_dim,
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            *(t.data_ptr() for t in (tables, context.query_start, context.seq_lens)),
            *(None if t is None else t.data_ptr() for t in (visible, sinks)),
            tables.stride(0),
            len(context.query_lens),
            *sizes,
            1,
            sliding_window or 0,
            k_cache.dtype is torch.int8,
            q.dtype is torch.float32,
            scale,
        )
        self._attention(self._runtime, ctypes.addressof(arguments))
        return out

    def _takes_pages(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, context: AttentionContext) -> bool:
        fp32 = self._attends_in_float32(q)
        return (
            heads_are_adjacent(q, torch.float32 if fp32 else _BF16)
            and k_cache.dtype is v_cache.dtype
            and (k_cache.dtype is torch.float32 if fp32 else k_cache.dtype in CACHE_DTYPES)
            and q.shape[2] % 2 == 0
            and k_cache.stride(3) == v_cache.stride(3) == 1
            and context.block_tables.stride(-1) == 1
        )

    def varlen_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
    ) -> Tensor:
        if not (self._attends(q, k, v) and window != 0):
            return reference.varlen_attention(q, k, v, lengths, scale, window)
        lens = torch.tensor(lengths, dtype=torch.int32)
        start = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(lens, 0, out=start[1:])
        return self._both_ways(q, k, v, start, lens, scale, window)

    def heard_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], heard: list[int], scale: float
    ) -> Tensor:
        return reference.heard_attention(q, k, v, lengths, heard, scale, self.varlen_attention)

    def query_step(self, q: Tensor) -> int:
        return QUERY_STEP if self._attends(q) else reference.query_step(q)

    def run_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if not self._attends(q, k, v):
            return reference.run_attention(q, k, v, scale)
        start, lens = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, len(q)], [len(k)]))
        return self._both_ways(q, k, v, start, lens, scale)

    def _attends_in_float32(self, q: Tensor) -> bool:
        return q.dtype is torch.float32 and self.isa != "portable"  # which is a third as fast as torch

    def _attends(self, *tensors: Tensor) -> bool:
        dtype = torch.float32 if self._attends_in_float32(tensors[0]) else _BF16
        q, *others = tensors
        return (
            heads_are_adjacent(q, dtype)
            and q.shape[2] % 2 == 0
            and all(t.dtype is dtype and t.stride(2) == 1 for t in others)
        )

    def _both_ways(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, lens: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """`start` int32 [runs + 1]: where each run's queries begin; `lens` int32 [runs]: its keys."""
        tokens, heads, head_dim = q.shape
        out = q.new_empty((tokens, heads, head_dim))
        arguments = AttentionArguments(
            q.data_ptr(),
            out.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            q.stride(0),
            heads * head_dim,
            0,
            k.stride(1),
            k.stride(0),
            0,
            v.stride(1),
            v.stride(0),
            None,
            start.data_ptr(),
            lens.data_ptr(),
            None,
            None,
            0,
            len(lens),
            heads,
            k.shape[1],
            head_dim,
            1,
            0,
            window or 0,
            0,
            self._attends_in_float32(q),
            scale,
        )
        self._attention(self._runtime, ctypes.addressof(arguments))
        return out
