"""Paged attention of a step: which kernels it starts, and in what tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sensorium.kernels.context import AttentionContext
from sensorium.kernels.cuda.device.attention import LEAST_DIM, LOG2_E, NO_WINDOW, SPLITS, decode_split, prefill
from sensorium.kernels.cuda.launch import FLOATS, capability, has_fp8, launch, octets, power_of_two
from sensorium.kernels.cuda.states import gate_heads
from sensorium.kernels.reference.attention import SCALE_BYTES
from sensorium.kernels.reference.fp8 import E4M3

CACHE_TYPES = (*FLOATS, torch.int8, E4M3)
WIDEST = 512  # head size
LEAST_ARRIVALS = 1 << 14  # 256 sequences of 64 heads of keys
STAGE_BYTES = 32 * 1024  # of keys or values in a tile, at most


class Arrivals:
    """Zeros for programs of one launch that tell each other how many of them are done, and leave zeros behind: they
    serve all launches of a stream, and stay where graphs know them to be."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[object, Tensor] = {}

    def of(self, count: int, like: Tensor) -> Tensor:
        """int32 [count] or more, on a tensor's device."""
        place = like.device, id(like.fake_mode) if isinstance(like, FakeTensor) else None
        kept = self._kept.get(place)
        if kept is None or len(kept) < count:
            size = power_of_two(count, LEAST_ARRIVALS)
            kept = self._kept[place] = torch.zeros(size, dtype=torch.int32, device=like.device)
        return kept


class Tiles(NamedTuple):
    """How many rows of queries and of keys a program holds, and with how many warps and copies in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


def decode_tiles(group: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    dim = power_of_two(head_dim, LEAST_DIM)
    keys = max(16, min(64, STAGE_BYTES // (dim * dtype.itemsize)))
    return Tiles(power_of_two(group, LEAST_DIM), keys, 4, 2)


def prefill_tiles(rows: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tiles:
    """For up to so many `rows` of queries of one run. Before Hopper products take their sums from the registers of
    fewer threads, which hold half the keys. Codes need twice the threads where they become numbers in registers."""
    dim = power_of_two(head_dim, LEAST_DIM)
    most = 32 if dim > 256 or (dim > 128 and dtype.itemsize > 2) else 64
    keys = max(16, min(64, STAGE_BYTES // (2 * dim * dtype.itemsize)))
    is_old, is_int8 = capability() < 90, cache_dtype == torch.int8
    if dim == 128 and (is_int8 or is_old):
        keys = min(keys, 32)
    has_many = rows > LEAST_DIM
    is_coded = (is_int8 and (is_old or has_many)) or (is_old and has_many and cache_dtype.itemsize == 1)
    warps = 8 if dim > 128 or (dim == 128 and is_coded) else 4
    return Tiles(most if has_many else LEAST_DIM, keys, warps, 2 if dim <= 256 else 1)


def refusal(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Why these kernels do not take such tensors; None: they do."""
    if q.dtype not in FLOATS or k_cache.dtype not in CACHE_TYPES or k_cache.dtype != v_cache.dtype:
        return f"queries of {q.dtype} and a cache of {k_cache.dtype}"
    if q.shape[2] > WIDEST:
        return f"heads of {q.shape[2]} numbers, more than {WIDEST}"
    if k_cache.dtype == torch.int8 and q.shape[2] % SCALE_BYTES:
        return f"int8 heads of {q.shape[2]} codes, no multiple of {SCALE_BYTES}"
    if not (q.stride(2) == 1 == k_cache.stride(3) == v_cache.stride(3)):
        return "heads whose numbers are not adjacent"
    if not (k_cache.stride(2) == k_cache.shape[3] == v_cache.stride(2)):
        return "a cache whose rows are not adjacent"
    return None


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    arrivals: Arrivals,
    sliding_window: int | None = None,
    visible: Tensor | None = None,
    sinks: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """See `Backend.paged_attention`; of tensors that `refusal` has nothing against. No size of it is read from a
    device: how many programs are started follows from the lists of the context. By the sigmoid of `gates` [tokens,
    heads, head_dim], a strided view, the result is multiplied."""
    if not has_fp8():
        k_cache, v_cache = octets(k_cache), octets(v_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes, window = context.num_decodes, NO_WINDOW if sliding_window is None else sliding_window
    if decodes:
        decode(q, k_cache, v_cache, context, scale, window, sinks, gates, out, arrivals)
    if len(context.query_lens) > decodes:
        prefill_runs(q, k_cache, v_cache, context, scale, window, visible, sinks, out)
        if gates is not None:
            gate_heads(out[decodes:], gates[decodes:])
    return out


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    window: int,
    sinks: Tensor | None,
    gates: Tensor | None,
    out: Tensor,
    arrivals: Arrivals,
) -> None:
    """One query token of each of the first sequences."""
    count, (heads, head_dim) = context.num_decodes, q.shape[1:]
    kv_heads, page, row = k_cache.shape[1:]
    group, tiles = heads // kv_heads, decode_tiles(heads // kv_heads, head_dim, q.dtype)
    partial = torch.empty((count, heads, SPLITS, head_dim), dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty((count, heads, SPLITS), dtype=torch.float32, device=q.device) for _ in range(2))
    gate_strides = (0, 0) if gates is None else gates.stride()[:2]
    launch(
        decode_split, (count, kv_heads, SPLITS), q, k_cache, v_cache, context.block_tables, context.seq_lens, partial,
        tops, totals, arrivals.of(count * kv_heads, q), tops if sinks is None else sinks,
        q if gates is None else gates, out, scale * LOG2_E, window, context.block_tables.stride(0), q.stride(0),
        q.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1), *gate_strides,
        GROUP=group, D=head_dim, BLOCK_D=power_of_two(head_dim, LEAST_DIM), BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        PAGE=page, ROW=row, SPLITS=SPLITS, IS_INT8=k_cache.dtype == torch.int8, HAS_SINKS=sinks is not None,
        HAS_GATES=gates is not None, LOG2_E=LOG2_E, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def prefill_runs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    window: int,
    visible: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """The runs behind the first `num_decodes` sequences, all in one launch."""
    heads, head_dim = q.shape[1:]
    kv_heads, page, row = k_cache.shape[1:]
    decodes, group = context.num_decodes, heads // kv_heads
    rows = max(context.query_lens[decodes:]) * group
    tiles = prefill_tiles(rows, head_dim, q.dtype, k_cache.dtype)
    launch(
        prefill, (-(-rows // tiles.queries), kv_heads, len(context.query_lens) - decodes), q, k_cache, v_cache,
        context.block_tables, context.seq_lens, context.query_start, q if visible is None else visible,
        q if sinks is None else sinks, out, decodes, scale * LOG2_E, window,
        context.block_tables.stride(0), q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(1), GROUP=group, D=head_dim, BLOCK_D=power_of_two(head_dim, LEAST_DIM),
        BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, PAGE=page, ROW=row, IS_INT8=k_cache.dtype == torch.int8,
        HAS_VISIBLE=visible is not None, HAS_SINKS=sinks is not None, LOG2_E=LOG2_E, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
