"""Norms of queries and keys, their rotation, and the writing of keys and values into the cache, in one launch.

A head's numbers are two halves that turn together, and a rest that does not turn. Results are rounded where the
reference rounds: behind the norm and behind the rotation.
"""

import triton
import triton.language as tl

from sensorium.kernels.cuda.device.fp8 import encoded, rounded
from sensorium.kernels.cuda.device.norms import normed


@triton.jit
def part(x, at, heads, limit, first, size: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr = 1):
    """float32 [heads, BLOCK] of `size` numbers from `first` on, every STEP-th, of heads that begin at `at`."""
    dims = tl.arange(0, BLOCK)
    keep = (heads < limit)[:, None]
    if size != BLOCK:
        keep = keep & (dims < size)[None, :]
    return tl.load(x + at[:, None] + first + dims[None, :] * STEP, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def put(x, at, heads, limit, first, value, size: tl.constexpr, BLOCK: tl.constexpr):
    """The other way."""
    dims = tl.arange(0, BLOCK)
    keep = (heads < limit)[:, None]
    if size != BLOCK:
        keep = keep & (dims < size)[None, :]
    tl.store(x + at[:, None] + first + dims[None, :], value, mask=keep)


@triton.jit
def weigh(value, weight, heads, limit, first, scale, offset, dtype: tl.constexpr, size: tl.constexpr,
          BLOCK: tl.constexpr, HAS_OFFSET: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
          D: tl.constexpr):  # fmt: skip
    """WHOLE: each head has weights of its own."""
    dims = tl.arange(0, BLOCK)
    if WHOLE:
        keep = (heads < limit)[:, None] & (dims < size)[None, :]
        factor = tl.load(weight + heads[:, None] * D + first + dims[None, :] * STEP, mask=keep, other=0.0)
    else:
        factor = tl.load(weight + first + dims * STEP, mask=dims < size, other=0.0)[None, :]
    return normed(value, factor.to(tl.float32), scale[:, None], offset, dtype, HAS_OFFSET).to(dtype).to(tl.float32)


@triton.jit
def whole_squares(x, at, size: tl.constexpr):
    """The sum of squares of `size` numbers from `at` on."""
    BLOCK: tl.constexpr = triton.next_power_of_2(size)
    dims = tl.arange(0, BLOCK)
    wide = tl.load(x + at + dims, mask=dims < size, other=0.0).to(tl.float32)
    return tl.sum(wide * wide, 0)


@triton.jit
def turned(
    x, at, heads, limit, whole, weight, cos, sin, eps, offset, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, HAS_NORM: tl.constexpr, HAS_OFFSET: tl.constexpr,
    PAIRED: tl.constexpr = False, WHOLE: tl.constexpr = 0,
):  # fmt: skip
    """(first half, second half, rest) of heads, normed and rotated, in the type of `x`. PAIRED: what turns together
    lies side by side. WHOLE: so many numbers, which begin at `whole`, are normed together."""
    dtype: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = 2 if PAIRED else 1
    SECOND: tl.constexpr = 1 if PAIRED else HALF
    one = part(x, at, heads, limit, 0, HALF, BLOCK_H, STEP)
    two = part(x, at, heads, limit, SECOND, HALF, BLOCK_H, STEP)
    rest = part(x, at, heads, limit, 2 * HALF, D - 2 * HALF, BLOCK_R)
    if HAS_NORM:
        if WHOLE:
            scale = tl.rsqrt((tl.zeros_like(heads) + whole_squares(x, whole, WHOLE)) / WHOLE + eps)
        else:
            squares = tl.sum(one * one, 1) + tl.sum(two * two, 1) + tl.sum(rest * rest, 1)
            scale = tl.rsqrt(squares / D + eps)
        one = weigh(one, weight, heads, limit, 0, scale, offset, dtype, HALF, BLOCK_H, HAS_OFFSET, STEP, WHOLE, D)
        two = weigh(two, weight, heads, limit, SECOND, scale, offset, dtype, HALF, BLOCK_H, HAS_OFFSET, STEP, WHOLE, D)
        rest = weigh(rest, weight, heads, limit, 2 * HALF, scale, offset, dtype, D - 2 * HALF, BLOCK_R, HAS_OFFSET, 1,
                     WHOLE, D)  # fmt: skip
    dims = tl.arange(0, BLOCK_H)
    c = tl.load(cos + dims, mask=dims < HALF, other=0.0)[None, :]
    s = tl.load(sin + dims, mask=dims < HALF, other=0.0)[None, :]
    return (one * c - two * s).to(dtype), (two * c + one * s).to(dtype), rest.to(dtype)


@triton.jit
def scaled(value, scale):
    """`value` times a number that is rounded to its type before."""
    return (value.to(tl.float32) * scale.to(value.dtype).to(tl.float32)).to(value.dtype)


@triton.jit
def keep_part(cache, at, heads, limit, first, value, scale, KIND: tl.constexpr, size: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    if KIND == "int8":
        codes = rounded(value.to(tl.float32) / tl.where(scale > 0.0, scale, 1.0)[:, None])
        put(cache, at, heads, limit, first, codes.to(tl.int8), size, BLOCK)
    elif KIND == "fp8":
        put(cache, at, heads, limit, first, encoded(value.to(tl.float32)), size, BLOCK)
    else:
        put(cache, at, heads, limit, first, value.to(cache.dtype.element_ty), size, BLOCK)


@triton.jit
def keep(
    cache, at, heads, limit, one, two, rest, KIND: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Heads of one token into the rows of a cache that begin at `at`."""
    scale = tl.zeros_like(heads).to(tl.float32)
    if KIND == "int8":
        largest = tl.maximum(tl.max(tl.abs(one.to(tl.float32)), 1), tl.max(tl.abs(two.to(tl.float32)), 1))
        scale = tl.maximum(largest, tl.max(tl.abs(rest.to(tl.float32)), 1)) / 127
        tl.store((cache + at + D).to(tl.pointer_type(tl.float32)), scale, mask=heads < limit)
    keep_part(cache, at, heads, limit, 0, one, scale, KIND, HALF, BLOCK_H)
    keep_part(cache, at, heads, limit, HALF, two, scale, KIND, HALF, BLOCK_H)
    keep_part(cache, at, heads, limit, 2 * HALF, rest, scale, KIND, D - 2 * HALF, BLOCK_R)


@triton.jit
def heads_of(tile, HEADS_AT_ONCE: tl.constexpr):
    return tile * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)


@triton.jit
def row_of(slots, token, heads, block_stride, head_stride, PAGE: tl.constexpr, ROW: tl.constexpr):
    """Where the rows of heads begin in a cache."""
    slot = tl.load(slots + token)
    return slot // PAGE * block_stride + heads.to(tl.int64) * head_stride + slot % PAGE * ROW


@triton.jit
def rotate(
    q, k, cos, sin, q_stride, q_head, k_stride, k_head, turn_stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, HEADS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Heads of q, then of k, of one token, in place."""
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_cos, own_sin = cos + token * turn_stride, sin + token * turn_stride
    if tile < tl.cdiv(HEADS, HEADS_AT_ONCE):
        heads = heads_of(tile, HEADS_AT_ONCE)
        at = token * q_stride + heads * q_head
        one, two, _ = turned(q, at, heads, HEADS, 0, q, own_cos, own_sin, 0.0, 0.0, D, HALF, BLOCK_H, BLOCK_R, False,
                             False)  # fmt: skip
        put(q, at, heads, HEADS, 0, one, HALF, BLOCK_H)
        put(q, at, heads, HEADS, HALF, two, HALF, BLOCK_H)
    else:
        heads = heads_of(tile - tl.cdiv(HEADS, HEADS_AT_ONCE), HEADS_AT_ONCE)
        at = token * k_stride + heads * k_head
        one, two, _ = turned(k, at, heads, KV_HEADS, 0, k, own_cos, own_sin, 0.0, 0.0, D, HALF, BLOCK_H, BLOCK_R, False,
                             False)  # fmt: skip
        put(k, at, heads, KV_HEADS, 0, one, HALF, BLOCK_H)
        put(k, at, heads, KV_HEADS, HALF, two, HALF, BLOCK_H)


@triton.jit
def write_head_tile(
    x, cache, slots, token, tile, stride, head_stride, block, cache_head, LIMIT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, HEADS_AT_ONCE: tl.constexpr,
    eps=0.0, IS_NORMED: tl.constexpr = False,
):  # fmt: skip
    """Heads of one token as they are, or, IS_NORMED, normed without weights."""
    heads = heads_of(tile, HEADS_AT_ONCE)
    value = part(x, token * stride + heads * head_stride, heads, LIMIT, 0, D, BLOCK_D)
    if IS_NORMED:
        value *= tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    value = value.to(x.dtype.element_ty)
    at = row_of(slots, token, heads, block, cache_head, PAGE, ROW)
    scale = tl.zeros_like(heads).to(tl.float32)
    if KIND == "int8":
        scale = tl.max(tl.abs(value.to(tl.float32)), 1) / 127
        tl.store((cache + at + D).to(tl.pointer_type(tl.float32)), scale, mask=heads < LIMIT)
    keep_part(cache, at, heads, LIMIT, 0, value, scale, KIND, D, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_kv(
    k, v, k_cache, v_cache, slots, k_stride, k_head, v_stride, v_head, k_block, k_cache_head, v_block, v_cache_head,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    KIND: tl.constexpr, HEADS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    write_head_tile(k, k_cache, slots, token, tile, k_stride, k_head, k_block, k_cache_head, KV_HEADS, D, BLOCK_D, PAGE,
                    ROW, KIND, HEADS_AT_ONCE)  # fmt: skip
    write_head_tile(v, v_cache, slots, token, tile, v_stride, v_head, v_block, v_cache_head, KV_HEADS, D, BLOCK_D, PAGE,
                    ROW, KIND, HEADS_AT_ONCE)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots", "scales"])
def rotate_and_write(
    q, k, v, cos, sin, q_norm, k_norm, q_out, k_cache, v_cache, slots, scales, eps, offset, q_stride, q_head, k_stride,
    k_head, v_stride, v_head, out_stride, out_head, turn_stride, k_block, k_cache_head, v_block, v_cache_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_OFFSET: tl.constexpr, PAIRED: tl.constexpr, WHOLE: tl.constexpr,
    NORMS_VALUES: tl.constexpr, HAS_SCALES: tl.constexpr, HEADS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Tiles of q's heads, normed and rotated, to `q_out`, which may be q; of k's, which go to the cache; of v's, which
    only go there. Of PAIRED ones the first of each pair then stand before the second ones. WHOLE: all heads of q, and
    all of k, are normed together; what several programs read is not written over then."""
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_cos, own_sin = cos + token * turn_stride, sin + token * turn_stride
    q_tiles: tl.constexpr = (HEADS + HEADS_AT_ONCE - 1) // HEADS_AT_ONCE
    k_tiles: tl.constexpr = (KV_HEADS + HEADS_AT_ONCE - 1) // HEADS_AT_ONCE
    if tile < q_tiles:
        heads, whole = heads_of(tile, HEADS_AT_ONCE), token * q_stride
        one, two, rest = turned(q, whole + heads * q_head, heads, HEADS, whole, q_norm, own_cos, own_sin, eps, offset,
                                D, HALF, BLOCK_H, BLOCK_R, HAS_NORM, HAS_OFFSET, PAIRED,
                                HEADS * D if WHOLE else 0)  # fmt: skip
        if HAS_SCALES:
            scale = tl.load(scales + token)
            one, two, rest = scaled(one, scale), scaled(two, scale), scaled(rest, scale)
        if PAIRED:
            tl.debug_barrier()  # other threads of this block read where this one writes
        at = token * out_stride + heads * out_head
        put(q_out, at, heads, HEADS, 0, one, HALF, BLOCK_H)
        put(q_out, at, heads, HEADS, HALF, two, HALF, BLOCK_H)
        put(q_out, at, heads, HEADS, 2 * HALF, rest, D - 2 * HALF, BLOCK_R)
    elif tile < q_tiles + k_tiles:
        heads, whole = heads_of(tile - q_tiles, HEADS_AT_ONCE), token * k_stride
        one, two, rest = turned(k, whole + heads * k_head, heads, KV_HEADS, whole, k_norm, own_cos, own_sin, eps,
                                offset, D, HALF, BLOCK_H, BLOCK_R, HAS_NORM, HAS_OFFSET, PAIRED,
                                KV_HEADS * D if WHOLE else 0)  # fmt: skip
        at = row_of(slots, token, heads, k_block, k_cache_head, PAGE, ROW)
        keep(k_cache, at, heads, KV_HEADS, one, two, rest, KIND, D, HALF, BLOCK_H, BLOCK_R)
    else:
        write_head_tile(v, v_cache, slots, token, tile - q_tiles - k_tiles, v_stride, v_head, v_block, v_cache_head,
                        KV_HEADS, D, BLOCK_D, PAGE, ROW, KIND, HEADS_AT_ONCE, eps, NORMS_VALUES)  # fmt: skip
