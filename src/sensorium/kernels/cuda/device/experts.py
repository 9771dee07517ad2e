"""The experts of a routed layer: rows sorted by expert, in tiles of which each belongs to one expert.

Which expert a tile belongs to is found on the device: of few pairs of token and expert by each program, which compares
its own with all, of many from counts of tiles. Tiles behind those of the experts are of what all tokens take besides.
"""

import triton
import triton.language as tl

from sensorium.kernels.cuda.device.fp8 import numbers
from sensorium.kernels.cuda.device.linear import fp4_columns, fp4_tiles, int4_tiles
from sensorium.kernels.cuda.device.norms import gated_product, sigmoid, summed


@triton.jit
def sorted_tile(tile_ends, starts, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, sorted rows of this tile, end of the expert's rows); expert EXPERTS: there is nothing to do"""
    tile, experts = tl.program_id(0), tl.arange(0, BLOCK_E)
    ends = tl.load(tile_ends + experts, mask=experts < EXPERTS, other=2**30)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    known = expert < EXPERTS
    start, end = tl.load(starts + expert, mask=known, other=0), tl.load(starts + expert + 1, mask=known, other=0)
    return expert, start + (tile - before).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), end


@triton.jit
def found_tile(chosen, pairs, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """(expert, BLOCK_M of its pairs from the program's own one on, which of them there are). An expert's first pair is
    its first tile, the one BLOCK_M places behind it the second one; EXPERTS for all others."""
    own, every, rows = tl.program_id(0), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_M)
    expert = tl.load(chosen + own).to(tl.int32)
    same = tl.load(chosen + every, mask=every < pairs, other=-1).to(tl.int32) == expert
    before = tl.sum((same & (every < own)).to(tl.int32), 0)
    rank = tl.cumsum(same.to(tl.int32), 0) - 1 - before
    is_row = same[None, :] & (rank[None, :] == rows[:, None])
    pair = tl.sum(tl.where(is_row, every[None, :], 0), 1)
    there = rows < tl.sum(same.to(tl.int32), 0) - before
    return tl.where(before % BLOCK_M == 0, expert, EXPERTS), pair.to(tl.int64), there


@triton.jit
def tile_of(
    order, starts, tile_ends, pairs, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(expert, its pairs of token and place, where their inner states are, which of them there are). With BLOCK_P
    `order` are the chosen experts of so many pairs, unsorted."""
    if BLOCK_P:
        expert, pair, there = found_tile(order, pairs, EXPERTS, BLOCK_M, BLOCK_P)
        return expert, pair, pair, there
    else:
        expert, place, end = sorted_tile(tile_ends, starts, EXPERTS, BLOCK_E, BLOCK_M)
        return expert, tl.load(order + place, mask=place < end, other=0), place, place < end


@triton.jit
def weight_tile(weight, row, rows, at, size):
    """[BLOCK_N, BLOCK_K] of a weight [rows, size]"""
    mask = (row < rows)[:, None] & (at < size)[None, :]
    return tl.load(weight + row.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)


@triton.jit
def state_tile(x, place, there, at, size):
    """[BLOCK_M, BLOCK_K] of rows that are `there`"""
    return tl.load(x + place[:, None] * size + at[None, :], mask=there[:, None] & (at < size)[None, :], other=0.0)


@triton.jit
def scales_of(scales, row, rows, groups, group):
    """float32 [BLOCK_N] of one group, of a weight's [rows, groups]"""
    return tl.load(scales + row.to(tl.int64) * groups + group, mask=row < rows, other=0.0).to(tl.float32)


@triton.jit
def int4_part(
    x, place, there, weight, scales, zeros, row, rows, start, size, SCALED: tl.constexpr, HAS_ZEROS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_K bytes of one group, whose halves share bytes."""
    HALF: tl.constexpr = SCALED // 2
    groups, group = tl.cdiv(size, SCALED), start // SCALED
    inside = start // 2 % HALF + tl.arange(0, BLOCK_K)
    at = group * SCALED + inside
    first, second = state_tile(x, place, there, at, size), state_tile(x, place, there, at + HALF, size)
    low, high = int4_tiles(weight, row, rows, groups, group, inside, HALF, x.dtype.element_ty)
    part = tl.dot(first, tl.trans(low), input_precision="ieee")
    part = tl.dot(second, tl.trans(high), part, input_precision="ieee")
    if HAS_ZEROS:
        zero = scales_of(zeros, row, rows, groups, group) - 8.0
        part -= (tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1))[:, None] * zero[None, :]
    return part * scales_of(scales, row, rows, groups, group)[None, :]


@triton.jit
def add_product(
    acc, x, place, there, weight, scales, zeros, row, rows, start, size, LAYOUT: tl.constexpr, SCALED: tl.constexpr,
    HAS_ZEROS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds x [rows at `place`, size] times a weight [rows, size], for a step of inputs from `start` on.

    LAYOUT is that of `experts.Layout`: codes become numbers that x's type holds exactly, and scales, which SCALED
    inputs share (0: all), are applied to float32 sums, or, powers of two, to the numbers. Those that all inputs share
    are left to `finished`."""
    dtype: tl.constexpr = x.dtype.element_ty
    if LAYOUT == "mxfp4":
        at = fp4_columns(start // 2 + tl.arange(0, BLOCK_K))
        low, high = fp4_tiles(weight, scales, row, rows, start // 2, size, dtype, BLOCK_K)
        acc = tl.dot(state_tile(x, place, there, at, size), tl.trans(low), acc, input_precision="ieee")
        acc = tl.dot(state_tile(x, place, there, at + 16, size), tl.trans(high), acc, input_precision="ieee")
    elif LAYOUT == "int4":
        acc += int4_part(x, place, there, weight, scales, zeros, row, rows, start, size, SCALED, HAS_ZEROS, BLOCK_K)
    else:
        at = start + tl.arange(0, BLOCK_K)
        some, tile = state_tile(x, place, there, at, size), weight_tile(weight, row, rows, at, size)
        if LAYOUT == "int8":
            tile = (tile.to(tl.float32) - 128.0).to(dtype)
        elif LAYOUT == "fp8":
            tile = numbers(tile, dtype)
        if SCALED:
            part = tl.dot(some, tl.trans(tile), input_precision="ieee")
            acc += part * scales_of(scales, row, rows, tl.cdiv(size, SCALED), start // SCALED)[None, :]
        else:
            acc = tl.dot(some, tl.trans(tile), acc, input_precision="ieee")
    return acc


@triton.jit
def steps_end(size, LAYOUT: tl.constexpr, SCALED: tl.constexpr):
    """Up to which inputs steps begin: groups of int4 are whole, as the second half of one has the first one's bytes."""
    if LAYOUT == "int4":
        size = tl.cdiv(size, SCALED) * SCALED
    return size


@triton.jit
def finished(
    acc, scales, bias, row, rows, LAYOUT: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """A sum over all inputs with what is not yet in it."""
    if (LAYOUT != "plain") and (SCALED == 0):
        acc *= scales_of(scales, row, rows, 1, 0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def address_of(tables, which, expert, dtype: tl.constexpr, EXPERTS: tl.constexpr):
    return tl.multiple_of(tl.load(tables + which * EXPERTS + expert).to(tl.pointer_type(dtype)), 16)


@triton.jit
def matrix_of(tables, expert, dtype: tl.constexpr, LAYOUT: tl.constexpr, EXPERTS: tl.constexpr):
    """Where an expert's weight, scales, zeros and bias are, by a table [4, EXPERTS] of addresses."""
    if LAYOUT == "plain":
        weight = address_of(tables, 0, expert, dtype, EXPERTS)
        return weight, weight, weight, address_of(tables, 3, expert, dtype, EXPERTS)
    else:
        scale: tl.constexpr = tl.uint8 if LAYOUT == "mxfp4" else (tl.float16 if LAYOUT == "int4" else tl.float32)
        codes, scales = address_of(tables, 0, expert, tl.uint8, EXPERTS), address_of(tables, 1, expert, scale, EXPERTS)
        zeros = address_of(tables, 2, expert, tl.float16, EXPERTS)
        return codes, scales, zeros, address_of(tables, 3, expert, tl.float32, EXPERTS)


@triton.jit
def gate_and_up_tile(
    x, token, there, weight, scales, zeros, bias, out, place, inner, size, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAYOUT: tl.constexpr, SCALED: tl.constexpr, HAS_ZEROS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of rows `token` of x by one weight [2 * inner, size], to rows `place` of `out`."""
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    second, rows = inner + column, 2 * inner
    gate, up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    PACKED: tl.constexpr = 2 if LAYOUT == "mxfp4" else (2 if LAYOUT == "int4" else 1)  # numbers in an element
    for start in range(0, steps_end(size, LAYOUT, SCALED), PACKED * BLOCK_K):
        gate = add_product(gate, x, token, there, weight, scales, zeros, column, inner, start, size, LAYOUT, SCALED,
                           HAS_ZEROS, BLOCK_K)  # fmt: skip
        up = add_product(up, x, token, there, weight, scales, zeros, second, rows, start, size, LAYOUT, SCALED,
                         HAS_ZEROS, BLOCK_K)  # fmt: skip
    gate = finished(gate, scales, bias, column, inner, LAYOUT, SCALED, HAS_BIAS)
    up = finished(up, scales, bias, second, rows, LAYOUT, SCALED, HAS_BIAS)
    made = gated_product(gate, up, ACTIVATION).to(out.dtype.element_ty)
    mask = there[:, None] & (column < inner)[None, :]
    tl.store(out + place[:, None] * inner + column[None, :], made, mask=mask)


@triton.jit
def token_tile(tiles, tokens, BLOCK_M: tl.constexpr):
    """Rows of what all tokens take, of the programs behind the experts' `tiles`, and which of them there are."""
    token = (tl.program_id(0) - tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return token, token < tokens


@triton.jit(do_not_specialize=["pairs", "tiles", "tokens"])
def gate_and_up(
    x, order, starts, tile_ends, tables, out, inner, size, pairs, tiles, tokens, shared_x, shared_weight,
    shared_scales, shared_zeros, shared_out, shared_inner, CHOSEN: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, LAYOUT: tl.constexpr,
    SCALED: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_SHARED: tl.constexpr, IS_ALONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x [tokens, size] -> activation(gate) * up [rows of `tile_of`, inner]; and of what all tokens take, in the same
    layout without bias, [tokens, shared_inner]. IS_ALONE: of nothing else."""
    if IS_ALONE:
        token, there = token_tile(0, tokens, BLOCK_M)
        gate_and_up_tile(shared_x, token, there, shared_weight, shared_scales, shared_zeros, shared_scales, shared_out,
                         token, shared_inner, size, ACTIVATION, False, LAYOUT, SCALED, HAS_ZEROS, BLOCK_M, BLOCK_N,
                         BLOCK_K)  # fmt: skip
    elif tl.program_id(0) < tiles:
        expert, pair, place, there = tile_of(order, starts, tile_ends, pairs, EXPERTS, BLOCK_E, BLOCK_M, BLOCK_P)
        if (expert < EXPERTS) & (tl.program_id(1) * BLOCK_N < inner):
            weight, scales, zeros, bias = matrix_of(tables, expert, x.dtype.element_ty, LAYOUT, EXPERTS)
            gate_and_up_tile(x, pair // CHOSEN, there, weight, scales, zeros, bias, out, place, inner, size, ACTIVATION,
                             HAS_BIAS, LAYOUT, SCALED, HAS_ZEROS, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    elif HAS_SHARED:
        token, there = token_tile(tiles, tokens, BLOCK_M)
        if tl.program_id(1) * BLOCK_N < shared_inner:
            gate_and_up_tile(shared_x, token, there, shared_weight, shared_scales, shared_zeros, shared_scales,
                             shared_out, token, shared_inner, size, ACTIVATION, False, LAYOUT, SCALED, HAS_ZEROS,
                             BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit
def down_tile(
    x, place, there, weight, scales, zeros, bias, size, inner, HAS_BIAS: tl.constexpr, LAYOUT: tl.constexpr,
    SCALED: tl.constexpr, HAS_ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N] of rows `place` of x by one weight [size, inner]"""
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    PACKED: tl.constexpr = 2 if LAYOUT == "mxfp4" else (2 if LAYOUT == "int4" else 1)
    for start in range(0, steps_end(inner, LAYOUT, SCALED), PACKED * BLOCK_K):
        acc = add_product(acc, x, place, there, weight, scales, zeros, column, size, start, inner, LAYOUT, SCALED,
                          HAS_ZEROS, BLOCK_K)  # fmt: skip
    return finished(acc, scales, bias, column, size, LAYOUT, SCALED, HAS_BIAS)


@triton.jit(do_not_specialize=["pairs", "tiles", "tokens"])
def down_product(
    x, order, starts, tile_ends, tables, shares, out, size, inner, pairs, tiles, tokens, shared_x, shared_weight,
    shared_scales, shared_zeros, shared_out, shared_inner, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAYOUT: tl.constexpr, SCALED: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x [rows of `tile_of`, inner] -> float32 [tokens * chosen, size], times the experts' shares; and what all tokens
    take [tokens, shared_inner] -> [tokens, size]"""
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) < tiles:
        expert, pair, place, there = tile_of(order, starts, tile_ends, pairs, EXPERTS, BLOCK_E, BLOCK_M, BLOCK_P)
        if expert < EXPERTS:
            weight, scales, zeros, bias = matrix_of(tables, expert, x.dtype.element_ty, LAYOUT, EXPERTS)
            acc = down_tile(x, place, there, weight, scales, zeros, bias, size, inner, HAS_BIAS, LAYOUT, SCALED,
                            HAS_ZEROS, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
            acc *= tl.load(shares + pair, mask=there, other=0.0)[:, None]
            mask = there[:, None] & (column < size)[None, :]
            tl.store(out + pair[:, None] * size + column[None, :], acc, mask=mask)
    elif HAS_SHARED:
        token, there = token_tile(tiles, tokens, BLOCK_M)
        acc = down_tile(shared_x, token, there, shared_weight, shared_scales, shared_zeros, shared_scales, size,
                        shared_inner, False, LAYOUT, SCALED, HAS_ZEROS, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        mask = there[:, None] & (column < size)[None, :]
        tl.store(shared_out + token[:, None] * size + column[None, :], acc.to(shared_out.dtype.element_ty),
                 mask=mask)  # fmt: skip


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


@triton.jit(do_not_specialize=["gate_stride"])
def add_up(
    parts, shared, gate, gate_stride, out, size, PER_TOKEN: tl.constexpr, HAS_SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `summed`: [tokens, size]"""
    token, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = out.dtype.element_ty
    wide = summed(parts, shared, gate, gate_stride, token, dims, size, dtype, PER_TOKEN, HAS_SHARED, HAS_GATE)
    tl.store(out + token * size + dims, wide.to(dtype), mask=dims < size)


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
    logits, correction, factors, chosen, weights, stride, count, scale, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, RENORMALIZES: tl.constexpr, CORRECTED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, GROUPS_TAKEN: tl.constexpr, HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """Of one token's logits [count] the largest, one after the other, and their weights. CORRECTED: of their sigmoids
    with the correction, and the weights are the sigmoids without. HAS_FACTORS: times a number of each expert."""
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
    shares = shares / whole * scale
    if HAS_FACTORS:
        shares *= tl.load(factors + picks, mask=keep, other=0.0)
    tl.store(weights + token * PER_TOKEN + places, shares, mask=keep)
