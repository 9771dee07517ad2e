"""Layers that keep a state, one token of each sequence: the convolution over the last tokens, and the delta rule with
all that stands around it. Results are rounded where the reference rounds."""

import triton
import triton.language as tl

from sensorium.kernels.cuda.device.norms import normed, sigmoid, times_sigmoid


@triton.jit
def conv_step(
    x, taps, bias, states, sources, targets, out, stride, slot_stride, channels, TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[rows, channels], or, GATED, three parts of it: the product of the first and the last goes in, and what comes out
    is multiplied by the second. States [slots, TAPS - 1, channels]."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = at < channels
    dtype: tl.constexpr = out.dtype.element_ty
    own = x + row * stride + at
    value = tl.load(own, mask=keep, other=0.0)
    if GATED:
        value = (value.to(tl.float32) * tl.load(own + 2 * channels, mask=keep, other=0.0).to(tl.float32)).to(dtype)
    source = states + tl.load(sources + row) * slot_stride + at
    target = states + tl.load(targets + row) * slot_stride + at
    weight = taps + at * TAPS
    acc = value.to(tl.float32) * tl.load(weight + TAPS - 1, mask=keep, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(source + tap * channels, mask=keep, other=0.0)
        acc += before.to(tl.float32) * tl.load(weight + tap, mask=keep, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(target + (tap - 1) * channels, before, mask=keep)
    tl.store(target + (TAPS - 2) * channels, value, mask=keep)
    if HAS_BIAS:
        acc += tl.load(bias + at, mask=keep, other=0.0).to(tl.float32)
    if SILU:
        acc = acc * sigmoid(acc)
    if GATED:
        acc = acc.to(dtype).to(tl.float32) * tl.load(own + channels, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * channels + at, acc.to(dtype), mask=keep)


@triton.jit
def unit(x):
    """A vector of length one, but for those near zero."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def delta_step(
    mixed, gates, z, rate, bias, norm, states, sources, targets, out, eps, scale, mixed_stride, gates_stride, z_stride,
    slot_stride, KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TAKES_TURNS: tl.constexpr,
):  # fmt: skip
    """Of one value head: queries, keys and values of one token [.., heads * dim] -> what its memory gives, normed and
    gated. Memories stand in the order of the key heads."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    GROUP: tl.constexpr = VALUE_HEADS // KEY_HEADS
    dtype: tl.constexpr = out.dtype.element_ty
    if TAKES_TURNS:
        key_head, memory_head = head % KEY_HEADS, head % KEY_HEADS * GROUP + head // KEY_HEADS
    else:
        key_head, memory_head = head // GROUP, head
    keys, values = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    own = mixed + row * mixed_stride
    q = tl.load(own + key_head * KEY_DIM + keys, mask=keys < KEY_DIM, other=0.0).to(tl.float32)
    k = tl.load(own + (KEY_HEADS + key_head) * KEY_DIM + keys, mask=keys < KEY_DIM, other=0.0).to(tl.float32)
    v = tl.load(own + 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + values, mask=values < VALUE_DIM, other=0.0)
    q, k = unit(q) * scale, unit(k)
    learned = sigmoid(tl.load(gates + row * gates_stride + head).to(tl.float32))
    kept = tl.load(gates + row * gates_stride + VALUE_HEADS + head).to(tl.float32) + tl.load(bias + head)
    soft = tl.where(kept > 20.0, kept, tl.log(1.0 + tl.exp(tl.where(kept > 20.0, 0.0, kept))))
    at = memory_head * KEY_DIM * VALUE_DIM + keys[:, None] * VALUE_DIM + values[None, :]
    there = (keys < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
    memory = tl.load(states + tl.load(sources + row) * slot_stride + at, mask=there, other=0.0)
    memory = memory * tl.exp(-tl.exp(tl.load(rate + head)) * soft)
    news = (v.to(tl.float32) - tl.sum(memory * k[:, None], 0)) * learned
    memory += k[:, None] * news[None, :]
    tl.store(states + tl.load(targets + row) * slot_stride + at, memory, mask=there)
    read = tl.sum(memory * q[:, None], 0).to(dtype).to(tl.float32)
    factor = tl.load(norm + values, mask=values < VALUE_DIM, other=0.0).to(tl.float32)
    length = tl.rsqrt(tl.sum(read * read, 0) / VALUE_DIM + eps)
    made = normed(read, factor, length, 0.0, dtype, False).to(dtype).to(tl.float32)
    place = head * VALUE_DIM + values
    gate = tl.load(z + row * z_stride + place, mask=values < VALUE_DIM, other=0.0).to(tl.float32)
    tl.store(out + row * VALUE_HEADS * VALUE_DIM + place, (gate * sigmoid(gate) * made).to(dtype),
             mask=values < VALUE_DIM)  # fmt: skip


@triton.jit
def gate_heads(
    x, gates, stride, head_stride, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[tokens, HEADS * D] times the sigmoids of gates, in place."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = at < HEADS * D
    gate = tl.load(gates + token * stride + at // D * head_stride + at % D, mask=keep, other=0.0)
    own = tl.load(x + token * HEADS * D + at, mask=keep, other=0.0)
    tl.store(x + token * HEADS * D + at, times_sigmoid(own, gate), mask=keep)
