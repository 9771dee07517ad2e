"""What requests ask of single logits: biases, then penalties, then masks, all in one launch and in place."""

import triton
import triton.language as tl


@triton.jit
def penalised(value, said, repetition, frequency, presence):
    """Repetition over all that was seen, frequency and presence over what was said."""
    value = tl.where(value > 0.0, value / repetition, value * repetition)
    return value - frequency * said - tl.where(said > 0.0, presence, 0.0)


@triton.jit(
    do_not_specialize=["words"],
    do_not_specialize_on_alignment=["bias_starts", "biased", "biases", "seen_starts", "seen", "said", "masks"],
)
def edit(
    logits, bias_starts, biased, biases, seen_starts, seen, said, repetitions, frequencies, presences, masks, mask_of,
    stride, size, words, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. A token stands once in each of its lists; every list is done before the next one begins."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
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
    mask = tl.load(mask_of + number)
    if mask >= 0:
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            bits = tl.load(masks + mask * words + at // 32, mask=at < size, other=0)
            tl.store(row + at, float("-inf"), mask=(at < size) & (((bits >> (at % 32)) & 1) == 0))
