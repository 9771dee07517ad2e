"""Attention over the paged cache in Triton: one query token per sequence in fixed splits, and runs of them in tiles.

The heads of a group are rows of one product, so that each key is read once for all of them. What must not be seen is
not loaded: a slot may hold the NaN of a sequence that had the block before.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from sensorium.kernels.cuda.device.fp8 import decoded
from sensorium.kernels.cuda.device.norms import times_sigmoid

SPLITS = 16  # of a decoding sequence's keys: as many for every length, so that batch mates change nothing
NO_WINDOW = 2**30
LOG2_E = math.log2(math.e)
AT_ONCE = tl.constexpr(8)  # splits whose loads are waited for together
LEAST_DIM = 16  # of a product's sides


@triton.jit
def load_rows(cache, at, seen, dtype: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [n, BLOCK_D] of a cache from the elements `at` [n] on; zeros where not `seen` and behind D."""
    dims = tl.arange(0, BLOCK_D)
    mask = seen[:, None]
    if D != BLOCK_D:
        mask = mask & (dims < D)[None, :]
    rows = tl.load(cache + at[:, None] + dims[None, :], mask=mask, other=0.0)
    if rows.dtype == tl.uint8:
        rows = decoded(rows)
    if rows.dtype != dtype:
        rows = rows.to(tl.float32).to(dtype)
    return rows


@triton.jit
def load_scales(cache, at, seen, D: tl.constexpr):
    """The float32 scales behind the D codes of rows of an int8 cache."""
    return tl.load((cache + at + D).to(tl.pointer_type(tl.float32)), mask=seen, other=0.0)


@triton.jit
def score(q, k_cache, at, seen, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_INT8: tl.constexpr):
    """Scaled scores float32 [rows, keys] in powers of two."""
    k = load_rows(k_cache, at, seen, q.dtype, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if IS_INT8:
        scores *= load_scales(k_cache, at, seen, D)[None, :]
    return scores


@triton.jit
def add_values(
    acc, weights, v_cache, at, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_INT8: tl.constexpr, dtype: tl.constexpr
):
    """acc + weights [rows, keys] x values"""
    if IS_INT8:
        weights *= load_scales(v_cache, at, seen, D)[None, :]
    v = load_rows(v_cache, at, seen, dtype, D, BLOCK_D)
    return tl.dot(weights.to(dtype), v, acc, input_precision="ieee")


@triton.jit
def places(tables, pos, seen, block_stride, PAGE: tl.constexpr, ROW: tl.constexpr):
    """Where the rows of positions `pos` begin in a cache, without the head's part."""
    block = tl.load(tables + pos // PAGE, mask=seen, other=0).to(tl.int64)
    return block * block_stride + (pos % PAGE) * ROW


@triton.jit
def add_keys(
    top, total, acc, query, k_cache, v_cache, table, pos, there, seen, scale, k_block, v_block, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """A running softmax (highest scores, sums, values times weights) with the keys at positions `pos` [keys] added,
    those that are `there`, for the queries that have `seen` them [rows or 1, keys]."""
    at = places(table, pos, there, k_block, PAGE, ROW)
    scores = tl.where(seen, score(query, k_cache, at, there, scale, D, BLOCK_D, IS_INT8), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    at = places(table, pos, there, v_block, PAGE, ROW)
    acc = add_values(acc * fade[:, None], weights, v_cache, at, there, D, BLOCK_D, IS_INT8, query.dtype)
    return higher, total, acc


@triton.jit
def span(length, window, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first position seen, positions of a split) of a sequence's last token"""
    lower = tl.maximum(length - window, 0)
    size = tl.cdiv(tl.cdiv(length - lower, SPLITS), BLOCK_N) * BLOCK_N
    return lower, tl.maximum(size, 1)


@triton.jit(
    do_not_specialize=["window", "table_stride", "gate_stride"],
    do_not_specialize_on_alignment=["tables", "lengths", "sinks", "arrived"],
)
def decode_split(
    q, k_cache, v_cache, tables, lengths, partial, tops, totals, arrived, sinks, gates, out, scale, window,
    table_stride, q_stride, q_head, k_block, k_head, v_block, v_head, gate_stride, gate_head, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    ROW: tl.constexpr, SPLITS: tl.constexpr, IS_INT8: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_GATES: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's keys for the heads of one group -> unnormalised values, highest score, sum. The
    program that is done last with such heads, whichever it is, makes their attention of all splits, in their order.

    `arrived` int32 counts those that are done, from zero, and is zero again behind the last one."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + seq)
    lower, size = span(length, window, SPLITS, BLOCK_N)
    first = lower + split * size
    last = tl.minimum(first + size, length)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    place = (seq * tl.num_programs(1) * GROUP + heads) * SPLITS
    keep = (rows < GROUP)[:, None] & (dims < D)[None, :]
    if first < last:
        query = tl.load(q + seq * q_stride + heads[:, None] * q_head + dims[None, :], mask=keep, other=0)
        top, total, acc = attend_split(
            query, k_cache + kv_head * k_head, v_cache + kv_head * v_head, tables + seq * table_stride, first, last,
            scale, k_block, v_block, D, BLOCK_D, BLOCK_M, BLOCK_N, PAGE, ROW, IS_INT8,
        )  # fmt: skip
        tl.store(tops + place + split, top, mask=rows < GROUP)
        tl.store(totals + place + split, total, mask=rows < GROUP)
        tl.store(partial + (place + split)[:, None] * D + dims[None, :], acc, mask=keep)
    tl.debug_barrier()  # all threads have stored before one of them says so
    own = arrived + seq * tl.num_programs(1) + kv_head
    if tl.atomic_add(own, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.store(own, 0)
        used = tl.cdiv(length - lower, size)
        merged = merge(partial, tops, totals, sinks, heads, rows < GROUP, place, used, D, BLOCK_D, BLOCK_M, SPLITS,
                       HAS_SINKS, LOG2_E).to(out.dtype.element_ty)  # fmt: skip
        if HAS_GATES:
            at = seq.to(tl.int64) * gate_stride + heads[:, None] * gate_head + dims[None, :]
            merged = times_sigmoid(merged, tl.load(gates + at, mask=keep, other=0.0))
        tl.store(out + (place // SPLITS).to(tl.int64)[:, None] * D + dims[None, :], merged, mask=keep)


@triton.jit
def attend_split(
    query, k_cache, v_cache, table, first, last, scale, k_block, v_block, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """(highest scores, sums, values times weights) of queries that see keys [first, last), which are some"""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        pos = start + tl.arange(0, BLOCK_N)
        there = pos < last
        top, total, acc = add_keys(
            top, total, acc, query, k_cache, v_cache, table, pos, there, there[None, :], scale, k_block, v_block, D,
            BLOCK_D, PAGE, ROW, IS_INT8,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def merge(
    partial, tops, totals, sinks, heads, is_head, place, used, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """The first `used` splits of the heads of a group -> float32 [BLOCK_M, BLOCK_D]; zeros of no keys. Other programs
    have written what is read, so it does not come from this one's own cache."""
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    there = is_head[:, None] & (splits < used)[None, :]
    at = place[:, None] + splits[None, :]
    top = tl.load(tops + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(totals + at, mask=there, other=0.0, cache_modifier=".cg")
    highest = tl.maximum(tl.max(top, 1), -1e30)
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=is_head, other=0.0) * LOG2_E
        highest = tl.maximum(highest, sink)
    whole = tl.sum(total * tl.exp2(top - highest[:, None]), 1)
    if HAS_SINKS:
        whole += tl.exp2(sink - highest)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, used, AT_ONCE):
        for more in tl.static_range(AT_ONCE):
            split = first + more + tl.zeros_like(heads)
            is_used = is_head & (split < used)
            own = tl.load(tops + place + split, mask=is_used, other=float("-inf"), cache_modifier=".cg")
            keep = is_used[:, None] & (dims < D)[None, :]
            part = tl.load(partial + (place + split)[:, None] * D + dims[None, :], mask=keep, other=0.0,
                           cache_modifier=".cg")  # fmt: skip
            acc += part * tl.exp2(own - highest)[:, None]
    return acc / tl.maximum(whole, 1e-30)[:, None]


@triton.jit
def queries(token, count, length, visible, HAS_VISIBLE: tl.constexpr):
    """(position, keys before which it sees) of tokens of a run"""
    position = length - count + token
    if HAS_VISIBLE:
        return position, tl.load(visible + token, mask=token < count, other=0)
    else:
        return position, tl.where(token < count, position + 1, 0)


@triton.jit(
    do_not_specialize=["skipped", "window", "table_stride"],
    do_not_specialize_on_alignment=["tables", "lengths", "starts", "visible", "sinks"],
)
def prefill(
    q, k_cache, v_cache, tables, lengths, starts, visible, sinks, out, skipped, scale, window, table_stride, q_stride,
    q_head, k_block, k_head, v_block, v_head, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr, IS_INT8: tl.constexpr,
    HAS_VISIBLE: tl.constexpr, HAS_SINKS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """A tile of one run's queries, (token, head of the group) by (token, head), against the keys that it sees."""
    seq, kv_head = skipped + tl.program_id(2), tl.program_id(1)
    start, length = tl.load(starts + seq), tl.load(lengths + seq)
    count = tl.load(starts + seq + 1) - start
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < count * GROUP:
        token, head, dims = row // GROUP, kv_head * GROUP + row % GROUP, tl.arange(0, BLOCK_D)
        keep = (token < count)[:, None] & (dims < D)[None, :]
        at = (start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * q_head + dims[None, :]
        query = tl.load(q + at, mask=keep, other=0)
        position, end = queries(token, count, length, visible + start, HAS_VISIBLE)
        lowest = tl.maximum(tl.min(position, 0) - window + 1, 0)
        top, total, acc = attend(
            query, k_cache + kv_head * k_head, v_cache + kv_head * v_head, tables + seq * table_stride, position, end,
            lowest, scale, window, k_block, v_block, D, BLOCK_D, BLOCK_M, BLOCK_N, PAGE, ROW, IS_INT8,
        )  # fmt: skip
        if HAS_SINKS:
            sink = tl.load(sinks + head) * LOG2_E
            highest = tl.maximum(top, sink)
            total = total * tl.exp2(top - highest) + tl.exp2(sink - highest)
            acc *= tl.exp2(top - highest)[:, None]
        acc /= tl.maximum(total, 1e-30)[:, None]
        heads = tl.num_programs(1) * GROUP
        at = ((start + token).to(tl.int64) * heads + head)[:, None] * D + dims[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def attend(
    query, k_cache, v_cache, table, position, end, lowest, scale, window, k_block, v_block, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    IS_INT8: tl.constexpr,
):  # fmt: skip
    """(highest scores, sums, values times weights) of queries that see keys (position - window, end)"""
    top = tl.full([BLOCK_M], -1e30, tl.float32)  # of a row that has seen nothing yet
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.max(end, 0)
    for first in range(lowest, last, BLOCK_N):
        pos = first + tl.arange(0, BLOCK_N)
        seen = (pos[None, :] < end[:, None]) & (pos[None, :] > position[:, None] - window)
        top, total, acc = add_keys(
            top, total, acc, query, k_cache, v_cache, table, pos, pos < last, seen, scale, k_block, v_block, D,
            BLOCK_D, PAGE, ROW, IS_INT8,
        )  # fmt: skip
    return top, total, acc
