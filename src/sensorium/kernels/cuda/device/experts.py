"""The experts of a routed layer: rows sorted by expert, in tiles of which each belongs to one expert.

Weights are where the table of addresses says. Which expert a tile belongs to is found from the tiles' counts on the
device.
"""

import triton
import triton.language as tl

from sensorium.kernels.cuda.device.linear import fp4_columns, fp4_tiles
from sensorium.kernels.cuda.device.norms import gated_product, sigmoid


@triton.jit
def tile_of(tile_ends, starts, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, sorted rows of this tile, end of the expert's rows); expert EXPERTS: there is nothing to do"""
    tile, experts = tl.program_id(0), tl.arange(0, BLOCK_E)
    ends = tl.load(tile_ends + experts, mask=experts < EXPERTS, other=2**30)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    known = expert < EXPERTS
    start, end = tl.load(starts + expert, mask=known, other=0), tl.load(starts + expert + 1, mask=known, other=0)
    return expert, start + (tile - before).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), end


@triton.jit
def weight_tile(weight, row, rows, at, size):
    """[BLOCK_N, BLOCK_K] of a weight [rows, size]"""
    mask = (row < rows)[:, None] & (at < size)[None, :]
    return tl.load(weight + row.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)


@triton.jit
def add_product(
    acc, x, place, there, weight, scales, row, rows, start, size, FP4: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Adds x [rows at `place`, size] times a weight [rows, size], for a step of inputs from `start` on."""
    dtype: tl.constexpr = x.dtype.element_ty
    if FP4:
        at = fp4_columns(start // 2 + tl.arange(0, BLOCK_K))
        low, high = fp4_tiles(weight, scales, row, rows, start // 2, size, dtype, BLOCK_K)
        acc = tl.dot(state_tile(x, place, there, at, size), tl.trans(low), acc, input_precision="ieee")
        return tl.dot(state_tile(x, place, there, at + 16, size), tl.trans(high), acc, input_precision="ieee")
    else:
        at = start + tl.arange(0, BLOCK_K)
        some = state_tile(x, place, there, at, size)
        return tl.dot(some, tl.trans(weight_tile(weight, row, rows, at, size)), acc, input_precision="ieee")


@triton.jit
def state_tile(x, place, there, at, size):
    """[BLOCK_M, BLOCK_K] of rows that are `there`"""
    return tl.load(x + place[:, None] * size + at[None, :], mask=there[:, None] & (at < size)[None, :], other=0.0)


@triton.jit
def address_of(table, expert, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(table + expert).to(tl.pointer_type(dtype)), 16)


@triton.jit
def gate_and_up(
    x, order, starts, tile_ends, weights, all_scales, biases, out, inner, size, CHOSEN: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, FP4: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [tokens, size] -> activation(gate) * up [sorted rows, inner]"""
    expert, place, end = tile_of(tile_ends, starts, EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        token = tl.load(order + place, mask=place < end, other=0) // CHOSEN
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        kind: tl.constexpr = tl.uint8 if FP4 else x.dtype.element_ty
        weight, scales = address_of(weights, expert, kind), address_of(all_scales, expert, tl.uint8)
        PACKED: tl.constexpr = 2 if FP4 else 1  # numbers in an element
        second = weight + inner.to(tl.int64) * (size // 32 * 16 if FP4 else size)
        second_scales = scales + inner.to(tl.int64) * (size // 32)
        gate, up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, size, PACKED * BLOCK_K):
            gate = add_product(gate, x, token, place < end, weight, scales, column, inner, start, size, FP4, BLOCK_K)
            up = add_product(up, x, token, place < end, second, second_scales, column, inner, start, size, FP4, BLOCK_K)
        if HAS_BIAS:
            bias = address_of(biases, expert, tl.float32 if FP4 else x.dtype.element_ty)
            gate += tl.load(bias + column, mask=column < inner, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + inner + column, mask=column < inner, other=0.0).to(tl.float32)[None, :]
        made = gated_product(gate, up, ACTIVATION).to(out.dtype.element_ty)
        mask = (place < end)[:, None] & (column < inner)[None, :]
        tl.store(out + place[:, None] * inner + column[None, :], made, mask=mask)


@triton.jit
def down_product(
    x, order, starts, tile_ends, weights, all_scales, biases, shares, out, size, inner, EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr, HAS_BIAS: tl.constexpr, FP4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [sorted rows, inner] -> float32 [tokens * chosen, size], times the experts' shares"""
    expert, place, end = tile_of(tile_ends, starts, EXPERTS, BLOCK_E, BLOCK_M)
    if expert < EXPERTS:
        pair = tl.load(order + place, mask=place < end, other=0)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        kind: tl.constexpr = tl.uint8 if FP4 else x.dtype.element_ty
        weight, scales = address_of(weights, expert, kind), address_of(all_scales, expert, tl.uint8)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, inner, 2 * BLOCK_K if FP4 else BLOCK_K):
            acc = add_product(acc, x, place, place < end, weight, scales, column, size, start, inner, FP4, BLOCK_K)
        if HAS_BIAS:
            bias = address_of(biases, expert, tl.float32 if FP4 else x.dtype.element_ty)
            acc += tl.load(bias + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
        acc *= tl.load(shares + pair, mask=place < end, other=0.0)[:, None]
        mask = (place < end)[:, None] & (column < size)[None, :]
        tl.store(out + pair[:, None] * size + column[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def arrange(
    chosen, order, starts, tile_ends, pairs, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Chosen experts [pairs] -> their places sorted by expert, the first ones first; where each expert's begin; the
    tiles up to and with each expert's. Every program places some pairs; the last one counts."""
    program, some = tl.program_id(0), tl.arange(0, BLOCK_P)
    if program * ROWS < pairs:
        own = program * ROWS + tl.arange(0, ROWS)
        expert = tl.load(chosen + own, mask=own < pairs, other=0)
        place = tl.zeros([ROWS], tl.int32)
        for start in range(0, pairs, BLOCK_P):
            at = start + some
            other = tl.load(chosen + at, mask=at < pairs, other=EXPERTS)
            is_before = (other[None, :] == expert[:, None]) & (at[None, :] < own[:, None])
            place += tl.sum(((other[None, :] < expert[:, None]) | is_before).to(tl.int32), 1)
        tl.store(order + place, own.to(tl.int64), mask=own < pairs)
    else:
        experts = tl.arange(0, BLOCK_E)
        count, before = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, pairs, BLOCK_P):
            at = start + some
            other = tl.load(chosen + at, mask=at < pairs, other=BLOCK_E)
            count += tl.sum((other[None, :] == experts[:, None]).to(tl.int32), 1)
            before += tl.sum((other[None, :] < experts[:, None]).to(tl.int32), 1)
        ends = tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)
        tl.store(tile_ends + experts, ends.to(tl.int64), mask=experts < EXPERTS)
        tl.store(starts + experts, before.to(tl.int64), mask=experts < EXPERTS)
        tl.store(starts + EXPERTS, pairs)


@triton.jit
def add_up(
    parts, shared, gate, out, size, PER_TOKEN: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 [tokens, PER_TOKEN, size] -> their sum [tokens, size], and what all tokens take besides, which the
    sigmoid of a number of each token scales."""
    token, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = dims < size
    dtype: tl.constexpr = out.dtype.element_ty
    acc = tl.zeros([BLOCK], tl.float32)
    for place in range(PER_TOKEN):
        acc += tl.load(parts + (token * PER_TOKEN + place) * size + dims, mask=keep, other=0.0)
    if HAS_SHARED:
        more = tl.load(shared + token * size + dims, mask=keep, other=0.0).to(tl.float32)
        if HAS_GATE:
            share = sigmoid(tl.load(gate + token).to(tl.float32)).to(dtype).to(tl.float32)
            more = (more * share).to(dtype).to(tl.float32)
        acc = acc.to(dtype).to(tl.float32) + more
    tl.store(out + token * size + dims, acc.to(dtype), mask=keep)


@triton.jit
def best_groups(left, at, count, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, GROUPS_TAKEN: tl.constexpr):
    """Far below all others what is not in the groups whose two largest have the largest sums."""
    group, groups = at // (count // GROUPS), tl.arange(0, BLOCK_G)
    sums = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for one in range(GROUPS):
        own = tl.where(group == one, left, float("-inf"))
        first, best = tl.max(own, 0), tl.argmax(own, 0)
        sums = tl.where(groups == one, first + tl.max(tl.where(at == best, float("-inf"), own), 0), sums)
    inside = group < 0
    for _ in range(GROUPS_TAKEN):
        best = tl.argmax(sums, 0)
        inside = inside | (group == best)
        sums = tl.where(groups == best, float("-inf"), sums)
    return tl.where(inside | (left == float("-inf")), left, -3e38)


@triton.jit
def choose(
    logits, correction, chosen, weights, stride, count, scale, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, RENORMALIZES: tl.constexpr, CORRECTED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, GROUPS_TAKEN: tl.constexpr,
):  # fmt: skip
    """Of one token's logits [count] the largest, one after the other, and their weights. CORRECTED: of their sigmoids
    with the correction, and the weights are the sigmoids without."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    left = tl.load(logits + token * stride + at, mask=at < count, other=float("-inf")).to(tl.float32)
    left = tl.where(at < count, tl.maximum(left, -3e38), left)  # above what is taken, or not there
    top = tl.max(left, 0)
    whole = tl.sum(tl.exp(left - top), 0)
    scores = left
    if CORRECTED:
        scores = tl.where(at < count, sigmoid(left), 0.0)
        more = tl.load(correction + at, mask=at < count, other=0.0).to(tl.float32)
        left = tl.where(at < count, scores + more, float("-inf"))
        if GROUPS > 1:
            left = best_groups(left, at, count, GROUPS, BLOCK_G, GROUPS_TAKEN)
    places = tl.arange(0, BLOCK_K)
    picks, values = tl.zeros([BLOCK_K], tl.int32), tl.full([BLOCK_K], float("-inf"), tl.float32)
    for place in range(PER_TOKEN):
        best = tl.argmax(left, 0)
        picks = tl.where(places == place, best, picks)
        values = tl.where(places == place, tl.max(tl.where(at == best, scores, float("-inf")), 0), values)
        left = tl.where(at == best, float("-inf"), left)
    if CORRECTED:
        shares = tl.where(places < PER_TOKEN, values, 0.0)
        whole = 1.0
    else:
        shares = tl.exp(values - top)
    if RENORMALIZES:
        whole = tl.sum(shares, 0)
    keep = places < PER_TOKEN
    tl.store(chosen + token * PER_TOKEN + places, picks.to(tl.int64), mask=keep)
    tl.store(weights + token * PER_TOKEN + places, shares / whole * scale, mask=keep)
