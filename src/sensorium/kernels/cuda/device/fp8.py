"""Numbers of e4m3 and their bytes, also for GPUs that do not know them: sm_80 has no such type in Triton."""

import triton
import triton.language as tl


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
