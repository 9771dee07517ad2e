"""Attention in plain torch and the KV cache that it reads, rows of int8 and of fp8 included."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.context import AttentionContext
from sensorium.kernels.reference.fp8 import E4M3, to_fp8

QUERY_STEP = 768  # torch computes queries in blocks of one size from so many on
GATHER_ELEMENTS = 16 * 1024 * 1024  # bound of one padded gather of keys
SCALE_BYTES = 4  # behind every row of an int8 cache
MASK_ELEMENTS = 4 * 1024 * 1024  # bound of one prefill mask


def quantize_heads(x: Tensor) -> Tensor:
    """[.., head_dim] -> int8 [.., head_dim + 4]: codes, and behind them the bytes of their float32 scale."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    codes = (wide / scale).nan_to_num_(0.0).round_().to(torch.int8)  # 0 / 0 where all is zero
    return torch.cat([codes, scale.view(torch.int8)], dim=-1)


def dequantize_heads(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [.., head_dim + 4] -> [.., head_dim]"""
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES] * scale).to(dtype)


def _gathered(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of a cache. Not every device has the operation for fp8."""
    if cache.dtype == E4M3:
        return cache.view(torch.uint8).index_select(0, blocks).view(E4M3)
    return cache.index_select(0, blocks)


def _as_numbers(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a cache as numbers of `dtype`, which a cache without codes has."""
    if rows.dtype == torch.int8:
        return dequantize_heads(rows, dtype)
    return rows.to(dtype) if rows.dtype == E4M3 else rows


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    if k_cache.dtype == torch.int8:
        k, v = quantize_heads(k), quantize_heads(v)
    elif k_cache.dtype == E4M3:
        k, v, k_cache, v_cache = to_fp8(k), to_fp8(v), k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    block_size = k_cache.shape[2]
    blocks = slots.div(block_size, rounding_mode="floor")
    offsets = slots - blocks * block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    sliding_window: int | None = None,
    visible: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    decodes = context.num_decodes
    if decodes == len(context.query_lens):
        return _decode(q, k_cache, v_cache, context, scale, sliding_window, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if decodes:
        out[:decodes] = _decode(q[:decodes], k_cache, v_cache, context, scale, sliding_window, sinks)
    start = decodes
    for index in range(decodes, len(context.query_lens)):
        end = start + context.query_lens[index]
        length = context.context_lens[index]
        num_blocks = -(-length // context.block_size)
        table = context.block_tables[index, :num_blocks]
        keys, values = _run(k_cache, table, length, q.dtype), _run(v_cache, table, length, q.dtype)
        seen = None if visible is None else visible[start:end]
        out[start:end] = _prefill(q[start:end], keys, values, scale, sliding_window, seen, sinks)
        start = end
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """`mask` bool, `sinks` [.., queries or 1, 1] for q [.., queries, head_dim]: the score of one more key without a
    value."""
    if sinks is not None:
        scores = q.new_zeros((*q.shape[:-1], mask.shape[-1])).masked_fill_(~mask, -torch.inf)
        mask = torch.cat([scores, sinks.to(q.dtype).expand(*q.shape[:-1], 1)], -1)
        k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context: AttentionContext,
    scale: float,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """One query token per sequence: a padded gather, then the heads of a group are the queries of one attention."""
    count, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    longest = max(context.context_lens[:count])
    num_blocks = -(-longest // context.block_size)
    width = num_blocks * context.block_size
    rows = max(1, GATHER_ELEMENTS // (width * kv_heads * head_dim))
    tables = context.block_tables[:count, :num_blocks]
    position = torch.arange(width, dtype=torch.int32, device=q.device)
    lengths = context.seq_lens[:count].unsqueeze(1)
    mask = position < lengths  # [count, width]
    if sliding_window is not None:
        mask &= position >= lengths - sliding_window
    grouped = q.reshape(count, kv_heads, heads // kv_heads, head_dim)
    sinks = None if sinks is None else sinks.view(kv_heads, heads // kv_heads, 1)
    out = []
    for i in range(0, count, rows):
        part = slice(i, i + rows)
        keys, values = (_padded(cache, tables[part], mask[part], q.dtype) for cache in (k_cache, v_cache))
        out.append(_attend(grouped[part], keys, values, mask[part, None, None], scale, sinks))
    return (out[0] if len(out) == 1 else torch.cat(out)).reshape(count, heads, head_dim)


def _padded(cache: Tensor, tables: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of every sequence: [seqs, kv_heads, blocks * block_size, head_dim].

    What is masked is zeroed too: a slot may still hold the NaN of a sequence that had the block before, and 0 * NaN is
    NaN.
    """
    seqs, num_blocks = tables.shape
    _, kv_heads, block_size, head_dim = cache.shape
    gathered = _gathered(cache, tables.reshape(-1)).view(seqs, num_blocks, kv_heads, block_size, head_dim)
    run = _as_numbers(gathered.transpose(1, 2).reshape(seqs, kv_heads, num_blocks * block_size, head_dim), dtype)
    return run.masked_fill_(~mask[:, None, :, None], 0)  # all of `run` is a copy


def _run(cache: Tensor, table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The cached run of one sequence: [kv_heads, 1, length, head_dim]."""
    _, kv_heads, _, head_dim = cache.shape
    run = _gathered(cache, table).transpose(0, 1).reshape(kv_heads, 1, -1, head_dim)[:, :, :length]
    return _as_numbers(run, dtype)


def _prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    sliding_window: int | None,
    visible: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The last `q.shape[0]` positions of a run attend to everything before them and to themselves, or to as many keys
    as `visible` says of each.

    Key heads are expanded by stride only; queries go in pieces so that the mask stays small.
    """
    count, heads, head_dim = q.shape
    kv_heads, _, length, _ = keys.shape
    group = heads // kv_heads
    queries = q.view(count, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, count, head_dim]
    keys = keys.expand(kv_heads, group, length, head_dim)
    values = values.expand(kv_heads, group, length, head_dim)
    is_whole = count == length and (sliding_window is None or sliding_window >= length)
    if is_whole and visible is None and sinks is None:
        out = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return out.permute(2, 0, 1, 3).reshape(count, heads, head_dim)
    rows = max(1, MASK_ELEMENTS // (length if sinks is None else length * heads))
    sinks = None if sinks is None else sinks.view(kv_heads, group, 1, 1)
    offset = length - count
    pieces = []
    for i in range(0, count, rows):
        piece = queries[:, :, i : i + rows]
        last = offset + i + piece.shape[2] if visible is None else length
        first = 0 if sliding_window is None else max(0, offset + i + 1 - sliding_window)
        position = torch.arange(offset + i, offset + i + piece.shape[2], device=q.device).unsqueeze(1)
        key_position = torch.arange(first, last, device=q.device)
        mask = key_position < (position + 1 if visible is None else visible[i : i + rows].unsqueeze(1))
        if sliding_window is not None:
            mask &= key_position > position - sliding_window
        pieces.append(_attend(piece, keys[:, :, first:last], values[:, :, first:last], mask, scale, sinks))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return out.permute(2, 0, 1, 3).reshape(count, heads, head_dim)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
) -> Tensor:
    if window is not None and max(lengths) > window + 1:
        return _windowed(q, k, v, lengths, scale, window)
    if len(set(lengths)) == 1:  # equal runs: one batch
        shape = (len(lengths), lengths[0], -1, q.shape[-1])
        return _both_ways(q.reshape(shape), k.reshape(shape), v.reshape(shape), scale).reshape(q.shape)
    qs, ks, vs = (torch.split(t.unsqueeze(0), lengths, dim=1) for t in (q, k, v))
    return torch.cat([_both_ways(*run, scale) for run in zip(qs, ks, vs, strict=True)], dim=1).squeeze(0)


def heard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    heard: list[int],
    scale: float,
    attend: Callable[[Tensor, Tensor, Tensor, list[int], float], Tensor] = varlen_attention,
) -> Tensor:
    """`attend` computes the queries that are heard, torch the few behind them."""
    out = torch.empty_like(q)
    kept = heard_places(lengths, heard, q.device)
    out[kept] = attend(q[kept], k[kept], v[kept], heard, scale)
    start = 0
    for length, count in zip(lengths, heard, strict=True):
        if count < length:
            late = slice(start + count, start + length)
            keys, values = (x[start : start + count].transpose(0, 1) for x in (k, v))
            attended = functional.scaled_dot_product_attention(q[late].transpose(0, 1), keys, values, scale=scale)
            out[late] = attended.transpose(0, 1)
        start += length
    return out


def heard_places(lengths: list[int], heard: list[int], device: torch.device) -> Tensor:
    """int64, the first `heard` tokens of each run."""
    starts = accumulate(lengths, initial=0)
    parts = [torch.arange(start, start + count, device=device) for start, count in zip(starts, heard, strict=False)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def query_step(q: Tensor) -> int:
    return QUERY_STEP


def run_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _both_ways(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), scale).squeeze(0)


def first_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
) -> Tensor:
    out = torch.empty_like(q)
    queries = q.unsqueeze(2)  # [runs, heads, 1, head_dim]
    start = 0
    for index, length in enumerate(lengths):
        end = start + (length if window is None else min(length, window + 1))
        keys, values = k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)  # [heads, length, head_dim]
        out[index] = functional.scaled_dot_product_attention(queries[index], keys, values, scale=scale).squeeze(1)
        start += length
    return out


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Of one run: q [queries, heads, head_dim], k and v [keys, heads, head_dim]; `bias` [heads, queries, keys] is added
    to the scaled scores. -> [queries, heads, head_dim]"""
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = bias.to(q.dtype).unsqueeze(0)
    out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out.squeeze(0).transpose(0, 1)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """All [runs, tokens, heads, head_dim], several heads of q to one of k and v; mask bool [runs, 1, tokens, keys]"""
    out = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int) -> Tensor:
    """All runs as one row of blocks; a block's queries see the keys from `window` before it to `window` after it.

    So the scores are tokens x (block + 2 * window), whatever the runs' lengths.
    """
    tokens, heads, head_dim = q.shape
    size = window_queries(window)
    count = -(-tokens // size)
    end = count * size - tokens  # padding of the last block
    runs = torch.repeat_interleave(
        torch.arange(len(lengths), dtype=torch.int32, device=q.device), torch.tensor(lengths, device=q.device)
    )
    queries = functional.pad(q, (0, 0, 0, 0, 0, end)).view(count, size, heads, head_dim)
    keys, values = (
        functional.pad(x, (0, 0, 0, 0, window, window + end)).unfold(0, size + 2 * window, size).permute(0, 3, 1, 2)
        for x in (k, v)
    )  # [count, size + 2 * window, kv_heads, head_dim], overlapping
    of_query = functional.pad(runs, (0, end), value=-1).view(count, size, 1)
    of_key = functional.pad(runs, (window, window + end), value=-1).unfold(0, size + 2 * window, size).unsqueeze(1)
    offset = torch.arange(size + 2 * window, device=q.device) - torch.arange(size, device=q.device).unsqueeze(1)
    mask = (of_query == of_key) & (offset >= 0) & (offset <= 2 * window)  # [count, size, size + 2 * window]
    out = _both_ways(queries, keys, values, scale, mask.unsqueeze(1))
    return out.reshape(count * size, heads, head_dim)[:tokens]


def window_queries(window: int) -> int:
    """Queries of one block of windowed attention: few enough that most of its keys are seen by most of them."""
    return max(window, 32)
