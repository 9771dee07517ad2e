"""What requests ask of logits: biases, then penalties, then masks, all in one launch and in place."""

import triton
import triton.language as tl


@triton.jit
def penalised(value, said, repetition, frequency, presence):
    """Repetition over all that was seen, frequency and presence over what was said."""
    value = tl.where(value > 0.0, value / repetition, value * repetition)
    return value - frequency * said - tl.where(said > 0.0, presence, 0.0)


@triton.jit
def allowed(masks, number, words, at, size):
    """Whether mask `number` has these tokens; without a mask it has all."""
    bits = tl.load(masks + number * words + at // 32, mask=at < tl.where(number >= 0, size, 0), other=-1)
    return ((bits >> (at % 32)) & 1) != 0


@triton.jit
def edit_single(
    row, number, bias_starts, biased, biases, seen_starts, seen, said, repetitions, frequencies, presences,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token stands once in each of its lists; every list is done before the next one begins."""
    last = tl.load(bias_starts + number + 1)
    for start in range(tl.load(bias_starts + number), last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(biased + at, mask=at < last, other=0)
        value = tl.load(row + token, mask=at < last, other=0.0) + tl.load(biases + at, mask=at < last, other=0.0)
        tl.store(row + token, value, mask=at < last)
    tl.debug_barrier()
    last = tl.load(seen_starts + number + 1)
    repetition = tl.load(repetitions + number)
    frequency, presence = tl.load(frequencies + number), tl.load(presences + number)
    for start in range(tl.load(seen_starts + number), last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(seen + at, mask=at < last, other=0)
        value = tl.load(row + token, mask=at < last, other=0.0)
        value = penalised(value, tl.load(said + at, mask=at < last, other=0.0), repetition, frequency, presence)
        tl.store(row + token, value, mask=at < last)
    tl.debug_barrier()


@triton.jit
def choose_mask(row, masks, narrowed, held, strict, words, size, BLOCK: tl.constexpr):
    """(the first of two masks that leaves the row any token, whether one of them does)"""
    some, some_strict = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=float("-inf"))
        there = (value != float("-inf")) & allowed(masks, narrowed, words, at, size)
        some += tl.sum((there & allowed(masks, held, words, at, size)).to(tl.int32), 0)
        some_strict += tl.sum((there & allowed(masks, strict, words, at, size)).to(tl.int32), 0)
    return tl.where(some_strict > 0, strict, held), some + some_strict > 0


@triton.jit(do_not_specialize=["words"])
def edit(
    logits, raw, bias_starts, biased, biases, seen_starts, seen, said, repetitions, frequencies, presences, masks,
    narrow_masks, held_masks, strict_masks, stride, raw_stride, size, words, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    edit_single(row, number, bias_starts, biased, biases, seen_starts, seen, said, repetitions, frequencies, presences,
                BLOCK)  # fmt: skip
    narrowed, held = tl.load(narrow_masks + number), tl.load(held_masks + number)
    if (narrowed >= 0) | (held >= 0):
        source, chosen = row, held
        if held >= 0:
            chosen, some = choose_mask(row, masks, narrowed, held, tl.load(strict_masks + number), words, size, BLOCK)
            tl.debug_barrier()
            if not some:
                source, narrowed = raw + number.to(tl.int64) * raw_stride, tl.full([], -1, tl.int32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            keep = allowed(masks, narrowed, words, at, size) & allowed(masks, chosen, words, at, size)
            value = tl.load(source + at, mask=(at < size) & keep, other=float("-inf"))
            tl.store(row + at, value, mask=at < size)
