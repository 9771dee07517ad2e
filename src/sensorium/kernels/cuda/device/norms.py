"""Norms and activations: a row is read once, sums are float32, results are rounded where the reference rounds."""

import triton
import triton.language as tl


@triton.jit
def normed(wide, weight, scale, offset, dtype: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """float32 numbers times their scale, and times the weight; rounded to `dtype` between the two, as models are
    trained, but where an offset is added to the weight."""
    if HAS_OFFSET:
        return wide * scale * (weight + offset)
    return (wide * scale).to(dtype).to(tl.float32) * weight


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def summed(
    parts, shared, gate, gate_stride, token, dims, size, dtype: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_SHARED: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Of a token float32 [PER_TOKEN, size], what its experts give -> their sum, and what all tokens take besides, which
    the sigmoid of a number of each token scales; rounded to `dtype`, as float32."""
    keep = dims < size
    acc = tl.zeros_like(dims).to(tl.float32)
    for place in tl.static_range(PER_TOKEN):
        acc += tl.load(parts + (token * PER_TOKEN + place) * size + dims, mask=keep, other=0.0)
    if HAS_SHARED:
        more = tl.load(shared + token * size + dims, mask=keep, other=0.0).to(tl.float32)
        if HAS_GATE:
            more = times_sigmoid(more.to(dtype), tl.load(gate + token * gate_stride)).to(tl.float32)
        acc = acc.to(dtype).to(tl.float32) + more
    return acc.to(dtype).to(tl.float32)


@triton.jit
def normed_row(
    wide, weight, dims, size, eps, offset, dtype: tl.constexpr, HAS_OFFSET: tl.constexpr
):  # fmt: skip
    """The norm of a row of float32 numbers, zeros behind `size`, in `dtype`."""
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    factor = tl.load(weight + dims, mask=dims < size, other=0.0).to(tl.float32)
    return normed(wide, factor, scale, offset, dtype, HAS_OFFSET).to(dtype)


@triton.jit(do_not_specialize=["gate_stride"], do_not_specialize_on_alignment=["factor"])
def rms_norm(
    x, residual, first, weight, out, total, wide_out, shared, gate, factor, parts_norm, shared_norm, eps, offset,
    stride, size, gate_stride, BLOCK: tl.constexpr, ADDS: tl.constexpr, IS_NORMED: tl.constexpr,
    HAS_OFFSET: tl.constexpr, PARTS: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_GATE: tl.constexpr,
    ARE_NORMED: tl.constexpr, IS_WIDE: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """Of one row, or of its sum with the residual's, which goes to `total`; with `IS_NORMED` the row is normed by the
    weight `first` before, and the sum is multiplied by the number at `factor` with `HAS_FACTOR`. PARTS: a row is the
    sum of so many, see `summed`; ARE_NORMED: their sum and what all tokens take are normed before. IS_WIDE: float32
    `wide_out` gets the same numbers as `out`."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    keep = dims < size
    dtype: tl.constexpr = out.dtype.element_ty
    if ARE_NORMED:
        wide = summed(x, shared, gate, gate_stride, row, dims, size, dtype, PARTS, False, False)
        wide = normed_row(wide, parts_norm, dims, size, eps, offset, dtype, HAS_OFFSET).to(tl.float32)
        more = tl.load(shared + row * size + dims, mask=keep, other=0.0).to(tl.float32)
        wide += normed_row(more, shared_norm, dims, size, eps, offset, dtype, HAS_OFFSET).to(tl.float32)
        wide = wide.to(dtype).to(tl.float32)
    elif PARTS:
        wide = summed(x, shared, gate, gate_stride, row, dims, size, dtype, PARTS, HAS_SHARED, HAS_GATE)
    else:
        wide = tl.load(x + row * stride + dims, mask=keep, other=0.0).to(tl.float32)
    if IS_NORMED:
        wide = normed_row(wide, first, dims, size, eps, offset, dtype, HAS_OFFSET).to(tl.float32)
    if ADDS:
        wide += tl.load(residual + row * size + dims, mask=keep, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        if HAS_FACTOR:
            rounded = (rounded.to(tl.float32) * tl.load(factor).to(tl.float32)).to(dtype)
        tl.store(total + row * size + dims, rounded, mask=keep)
        wide = rounded.to(tl.float32)
    made = normed_row(wide, weight, dims, size, eps, offset, dtype, HAS_OFFSET)
    tl.store(out + row * size + dims, made, mask=keep)
    if IS_WIDE:
        tl.store(wide_out + row * size + dims, made.to(tl.float32), mask=keep)


@triton.jit
def normed_sum(x, residual, weight, at, dims, size, eps, dtype: tl.constexpr):
    """A row of the residual at `at` plus the norm of x's, of `dtype`."""
    keep = dims < size
    wide = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    wide = normed_row(wide, weight, dims, size, eps, 0.0, dtype, False).to(tl.float32)
    return (wide + tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)).to(dtype)


@triton.jit
def add_normed(x, residual, weight, total, eps, size, BLOCK: tl.constexpr):
    """residual + the norm of x, [rows, size]"""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * size + dims
    rounded = normed_sum(x, residual, weight, at, dims, size, eps, total.dtype.element_ty)
    tl.store(total + at, rounded, mask=dims < size)


@triton.jit
def branching_norms(
    x, residual, first, weight, experts_weight, router_weight, total, out, experts_out, router_out, eps, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The residual's row plus the norm of x's by the weight `first` goes to `total`, and three norms of that, by a
    weight each, to the three others."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    keep = dims < size
    dtype: tl.constexpr = total.dtype.element_ty
    at = row * size + dims
    rounded = normed_sum(x, residual, first, at, dims, size, eps, dtype)
    tl.store(total + at, rounded, mask=keep)
    wide = rounded.to(tl.float32)
    tl.store(out + at, normed_row(wide, weight, dims, size, eps, 0.0, dtype, False), mask=keep)
    tl.store(experts_out + at, normed_row(wide, experts_weight, dims, size, eps, 0.0, dtype, False), mask=keep)
    tl.store(router_out + at, normed_row(wide, router_weight, dims, size, eps, 0.0, dtype, False), mask=keep)


@triton.jit
def times_sigmoid(x, gate):
    """x, of its type, times the sigmoid of a gate that is rounded to that type."""
    return (x.to(tl.float32) * sigmoid(gate.to(tl.float32)).to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, small - 1.0, 1.0 - small) / (1.0 + small)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Of float32 numbers."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "quick_gelu":
        return x * sigmoid(1.702 * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return tanh(x)


@triton.jit
def gated_product(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up of float32 numbers."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return gate * sigmoid(1.702 * gate) * (up + 1.0)
    else:
        return activated(gate, ACTIVATION) * up


@triton.jit
def gated(x, out, size, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """[rows, 2 * size], gates first -> [rows, size]"""
    row, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = dims < size
    at = x + row * size * 2 + dims
    gate = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * size + dims, gated_product(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["count"])
def activate(x, out, count, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """Elementwise, of `count` numbers one behind the other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, activated(wide, ACTIVATION).to(out.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["rows_stride"])
def token_gates(
    x, residual, first, weight, rows, total, out, eps, size, inner, rows_stride, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """residual + the norm of x by the weight `first` goes to `total`, and of that by `weight` [inner, size] the
    activation, times `rows` [tokens, inner], to `out`. A program has one token and BLOCK_N outputs."""
    token, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep, is_column = dims < size, columns < inner
    dtype: tl.constexpr = out.dtype.element_ty
    rounded = normed_sum(x, residual, first, token * size + dims, dims, size, eps, dtype)
    if tl.program_id(1) == 0:
        tl.store(total + token * size + dims, rounded, mask=keep)
    own = tl.load(weight + columns.to(tl.int64)[:, None] * size + dims[None, :],
                  mask=is_column[:, None] & keep[None, :], other=0.0).to(tl.float32)  # fmt: skip
    gate = tl.sum(own * rounded.to(tl.float32)[None, :], 1).to(dtype).to(tl.float32)
    gate = activated(gate, ACTIVATION).to(dtype).to(tl.float32)
    row = tl.load(rows + token * rows_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + token * inner + columns, (gate * row).to(dtype), mask=is_column)


@triton.jit(do_not_specialize=["rows_stride"])
def activate_mul(
    x, rows, out, size, rows_stride, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """activation(x) * rows, [tokens, size]"""
    token, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = dims < size
    dtype: tl.constexpr = out.dtype.element_ty
    gate = tl.load(x + token * size + dims, mask=keep, other=0.0).to(tl.float32)
    gate = activated(gate, ACTIVATION).to(dtype).to(tl.float32)
    row = tl.load(rows + token * rows_stride + dims, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + token * size + dims, (gate * row).to(dtype), mask=keep)
