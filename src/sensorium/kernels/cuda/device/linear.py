"""Products with weights in codes: activations stay as they are, codes become numbers that both types hold exactly, and
scales are applied to float32 sums."""

import triton
import triton.language as tl


@triton.jit
def rows_of(x, row, rows, stride, at, size):
    """[BLOCK_M, BLOCK_K] of x at columns `at`; zeros behind its end."""
    mask = (row < rows)[:, None] & (at < size)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + at[None, :], mask=mask, other=0.0)


@triton.jit
def finish(acc, out, bias, row, column, rows, columns, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def int4_tiles(codes, row, rows, groups, group, inside, HALF: tl.constexpr, dtype: tl.constexpr):
    """Of a weight [rows, groups, HALF] bytes what the low halves of those `inside` a group say, and the high ones."""
    at = (row.to(tl.int64) * groups + group)[:, None] * HALF + inside[None, :]
    packed = tl.load(codes + at, mask=(row < rows)[:, None], other=0)
    return ((packed & 15).to(tl.float32) - 8.0).to(dtype), ((packed >> 4).to(tl.float32) - 8.0).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def int4_product(
    x, codes, scales, zeros, bias, out, rows, columns, size, stride, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes [columns, groups, GROUP / 2], the first half of a group in the low halves of its bytes; scales and zeros
    [columns, groups]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = GROUP // 2
    groups, inside = tl.cdiv(size, GROUP), tl.arange(0, HALF)
    keep = column < columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(groups):
        first = rows_of(x, row, rows, stride, group * GROUP + inside, size)
        second = rows_of(x, row, rows, stride, group * GROUP + HALF + inside, size)
        low, high = int4_tiles(codes, column, columns, groups, group, inside, HALF, first.dtype)
        part = tl.dot(first, tl.trans(low), input_precision="ieee")
        part = tl.dot(second, tl.trans(high), part, input_precision="ieee")
        if HAS_ZEROS:
            zero = tl.load(zeros + column * groups + group, mask=keep, other=8.0).to(tl.float32) - 8.0
            part -= (tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1))[:, None] * zero[None, :]
        scale = tl.load(scales + column * groups + group, mask=keep, other=0.0).to(tl.float32)
        acc += part * scale[None, :]
    finish(acc, out, bias, row, column, rows, columns, HAS_BIAS)


@triton.jit
def fp4_numbers(codes):
    """float32, a 2^14th of what codes of E2M1 are: their bits are those of a float16 with a larger range"""
    bits = ((codes & 7).to(tl.int16) << 9) | ((codes & 8).to(tl.int16) << 12)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fp4_tiles(codes, scales, row, rows, start, size, dtype: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a weight [rows, size] the numbers [BLOCK_N, BLOCK_K] of the low halves of its bytes from `start` on, and of
    the high ones. A group of 32 has 16 bytes, its first half in their low halves. Scales are powers of two, up to
    2^113, so all numbers are exact."""
    groups = size // 32
    place, keep = row.to(tl.int64)[:, None], (row < rows)[:, None]
    byte, group = start + tl.arange(0, BLOCK_K), start // 16 + tl.arange(0, BLOCK_K // 16)
    packed = tl.load(codes + place * (groups * 16) + byte[None, :], mask=keep & (byte < groups * 16)[None, :], other=0)
    exponent = tl.load(scales + place * groups + group[None, :], mask=keep & (group < groups)[None, :], other=0)
    scale = (tl.minimum(exponent.to(tl.int32) + 14, 254) << 23).to(tl.float32, bitcast=True)
    scale = tl.broadcast_to(scale[:, :, None], (row.shape[0], BLOCK_K // 16, 16)).reshape(row.shape[0], BLOCK_K)
    return (fp4_numbers(packed & 15) * scale).to(dtype), (fp4_numbers(packed >> 4) * scale).to(dtype)


@triton.jit
def fp4_columns(byte):
    """Of the inputs that the low halves of bytes are for; those of the high halves come 16 later."""
    return byte // 16 * 32 + byte % 16


@triton.jit(do_not_specialize=["rows"])
def fp4_product(
    x, codes, scales, bias, out, rows, columns, size, stride, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes [columns, size / 2] and scales [columns, size / 32] of mxfp4."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, size // 2, BLOCK_K):
        at = fp4_columns(start + tl.arange(0, BLOCK_K))
        low, high = fp4_tiles(codes, scales, column, columns, start, size, x.dtype.element_ty, BLOCK_K)
        acc = tl.dot(rows_of(x, row, rows, stride, at, size), tl.trans(low), acc, input_precision="ieee")
        acc = tl.dot(rows_of(x, row, rows, stride, at + 16, size), tl.trans(high), acc, input_precision="ieee")
    finish(acc, out, bias, row, column, rows, columns, HAS_BIAS)


@triton.jit(do_not_specialize=["rows"])
def int8_product(
    x, codes, scales, bias, out, rows, columns, size, stride, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes [columns, size], each 128 more than its value; scales [columns]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = column < columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        some = rows_of(x, row, rows, stride, at, size)
        mask = keep[:, None] & (at < size)[None, :]
        code = tl.load(codes + column.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=128)
        weight = (code.to(tl.float32) - 128.0).to(some.dtype)
        acc = tl.dot(some, tl.trans(weight), acc, input_precision="ieee")
    acc *= tl.load(scales + column, mask=keep, other=0.0)[None, :]
    finish(acc, out, bias, row, column, rows, columns, HAS_BIAS)
