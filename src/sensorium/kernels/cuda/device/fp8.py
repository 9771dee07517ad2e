"""Numbers of e4m3 and their bytes, also for GPUs that do not know them (sm_80 has no such type in Triton), and products
with weights of them."""

import triton
import triton.language as tl

from sensorium.kernels.cuda.device.linear import finish, rows_of


@triton.jit
def rounded(x):
    """To whole numbers of at most 2^22, halves to even ones."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encoded(x):
    """float32 -> the bytes of the nearest e4m3 numbers, halves to even ones; beyond 448, of 448."""
    size = tl.abs(x)
    size = tl.where(size > 448.0, 448.0, size)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # of the exponents' biases 127 and 7
    is_small = size < 0.015625  # than the least normal number: steps of 2^-9
    small = rounded(tl.where(is_small, size * 512.0, 0.0)).to(tl.int32)
    code = tl.where(is_small, small, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decoded(octets):
    """The bytes of e4m3 numbers -> float16, which holds them exactly; NaN becomes a number."""
    wide = octets.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)  # the same number, 2^8 times smaller
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def quantize_rows(
    x, codes, scales, stride, size, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Some groups of one row -> bytes of e4m3 [rows, size], scales float32 [rows, groups]."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    dims = tl.arange(0, BLOCK)
    at = group[:, None] * GROUP + dims[None, :]
    mask = (dims < GROUP)[None, :] & (at < size)
    wide = tl.load(x + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(wide), 1) / 448.0
    tl.store(scales + row * groups + group, scale, mask=group < groups)
    tl.store(codes + row * size + at, encoded(wide / tl.where(scale > 0.0, scale, 1.0)[:, None]), mask=mask)


@triton.jit
def numbers(codes, dtype: tl.constexpr):
    """Codes of weights as what activations of `dtype` are multiplied with."""
    if codes.dtype == tl.uint8:
        return decoded(codes).to(tl.float32).to(dtype)
    else:
        return codes


@triton.jit(do_not_specialize=["rows"])
def fp8_product(
    x, x_scales, codes, scales, bias, out, rows, columns, size, stride, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes [columns, size] as e4m3, then x is so too, with scales [rows, groups], or as bytes, then x is numbers;
    scales [columns, groups] of GROUP inputs; 0: one group."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = column < columns
    is_scaled: tl.constexpr = codes.dtype.element_ty != tl.uint8
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        some = rows_of(x, row, rows, stride, at, size)
        mask = keep[:, None] & (at < size)[None, :]
        code = tl.load(codes + column.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0)
        part = tl.dot(some, tl.trans(numbers(code, some.dtype)), input_precision="ieee")
        if GROUP:
            groups, group = tl.cdiv(size, GROUP), start // GROUP
            part *= tl.load(scales + column * groups + group, mask=keep, other=0.0)[None, :]
            if is_scaled:
                part *= tl.load(x_scales + row * groups + group, mask=row < rows, other=0.0)[:, None]
        acc += part
    if not GROUP:
        acc *= tl.load(scales + column, mask=keep, other=0.0)[None, :]
        if is_scaled:
            acc *= tl.load(x_scales + row, mask=row < rows, other=0.0)[:, None]
    finish(acc, out, bias, row, column, rows, columns, HAS_BIAS)
