"""Sampling by threshold: a row is filtered by value and never sorted, and its token found by one number of its stream.

A logit's key is how far it lies below the row's highest, in steps of the temperature, as the bits of a float: smaller
keys are likelier tokens. Thresholds are found by halving the interval of keys, over the likely logits alone where they
decide, which are few.
"""

import triton
import triton.language as tl

LIKELY = tl.constexpr(8.0)  # keys below this one's usually hold any nucleus
HIGHEST_KEY = tl.constexpr(0x7F800000)  # infinity


@triton.jit
def mix(state):
    """The finaliser of splitmix64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def uniform(seed, index):
    """float64 in [0, 1) of uint64 numbers"""
    bits = mix(mix(seed + 0x9E3779B97F4A7C15) + index * 0x9E3779B97F4A7C15)
    return (bits >> 32).to(tl.float64) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def below(source, at, size, highest, temperature):
    """float32 of at least 0: how far logits lie below the highest; infinity behind `size`"""
    value = tl.load(source + at, mask=at < size, other=float("-inf"))
    return tl.abs((value - highest) / temperature)


@triton.jit
def key_of(distance):
    return distance.to(tl.int32, bitcast=True)


@triton.jit
def first_highest(row, size, BLOCK: tl.constexpr):
    """(highest logit, its first place); NaN if the row has one"""
    highest = tl.full([], float("-inf"), tl.float32)
    place = tl.full([], 0, tl.int32)
    bad = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=float("-inf"))
        bad += tl.sum((value != value).to(tl.int32), 0)
        value = tl.where(value != value, float("-inf"), value)
        top = tl.max(value, 0)
        found = tl.min(tl.where(value == top, at, size), 0)
        place = tl.where(top > highest, found, place)
        highest = tl.maximum(top, highest)
    return tl.where(bad > 0, float("nan"), highest), place


@triton.jit
def collect(row, kept, size, highest, temperature, least, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """Likely logits' distances go to `kept` -> (how many there are, their weight, the row's weight), both without what
    min_p leaves out"""
    count = tl.full([], 0, tl.int32)
    held, total = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        distance = below(row, start + tl.arange(0, BLOCK), size, highest, temperature)
        weight = tl.where(key_of(distance) <= least, tl.exp(-distance), 0.0)
        likely = distance <= LIKELY
        total += tl.sum(weight, 0).to(tl.float64)
        held += tl.sum(tl.where(likely, weight, 0.0), 0).to(tl.float64)
        place = count + tl.cumsum(likely.to(tl.int32), 0) - 1
        tl.store(kept + place, -distance, mask=likely & (place < ROOM))
        count += tl.sum(likely.to(tl.int32), 0)
    return count, held, total


@triton.jit
def tally(source, size, highest, temperature, limit, BLOCK: tl.constexpr):
    """(how many logits have keys of at most `limit`, float64 sum of their weights)"""
    count, total = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        distance = below(source, start + tl.arange(0, BLOCK), size, highest, temperature)
        stays = key_of(distance) <= limit
        count += tl.sum(stays.to(tl.int32), 0)
        total += tl.sum(tl.where(stays, tl.exp(-distance), 0.0), 0).to(tl.float64)
    return count, total


@triton.jit
def smallest_key(source, size, highest, temperature, most, wanted, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key of up to `most` whose logits, with all of smaller ones, are `wanted` in number or weight."""
    low, high = tl.full([], 0, tl.int32), most
    while low < high:
        middle = low + (high - low) // 2
        count, total = tally(source, size, highest, temperature, middle, BLOCK)
        if BY_COUNT:
            enough = count >= wanted
        else:
            enough = total >= wanted
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return low


@triton.jit
def threshold(row, kept, size, highest, temperature, top_k, top_p, least, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key that min_p, top_k and top_p leave; equal logits stay together."""
    limit = least
    if (top_k > 0) | (top_p < 1.0):
        count, held, total = collect(row, kept, size, highest, temperature, least, ROOM, BLOCK)
        tl.debug_barrier()
        decide = (count <= ROOM) & tl.where(top_k > 0, count >= top_k, held > top_p * total)
        source, length = row, size
        if decide:
            source, length, highest, temperature = kept, count, tl.zeros_like(highest), tl.zeros_like(temperature) + 1.0
        if top_k > 0:
            last = smallest_key(source, length, highest, temperature, tl.full([], HIGHEST_KEY, tl.int32), top_k, True,
                                BLOCK)  # fmt: skip
            limit = tl.minimum(least, last)
            before, total = tally(source, length, highest, temperature, tl.minimum(limit, last - 1), BLOCK)
            if last <= least:  # of equal ones as many count as there is room for
                total += (top_k - before) * tl.exp(-last.to(tl.float32, bitcast=True)).to(tl.float64)
        if top_p < 1.0:
            limit = smallest_key(source, length, highest, temperature, limit, top_p * total, False, BLOCK)
    return limit


@triton.jit
def draw(row, size, highest, temperature, limit, number, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The first token, in the vocabulary's order, up to which `number` of all weight is passed."""
    blocks = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], tl.float64)
    for start in range(0, size, BLOCK):
        distance = below(row, start + tl.arange(0, BLOCK), size, highest, temperature)
        weight = tl.sum(tl.where(key_of(distance) <= limit, tl.exp(-distance), 0.0), 0).to(tl.float64)
        sums = tl.where(blocks == start // BLOCK, weight, sums)
    passed = tl.cumsum(sums, 0)
    target = number * tl.max(passed, 0)
    chosen = tl.minimum(tl.sum((passed <= target).to(tl.int32), 0), tl.max(tl.where(sums > 0.0, blocks, 0), 0))
    target -= tl.max(tl.where(blocks < chosen, passed, 0.0), 0)
    inside = tl.arange(0, BLOCK)
    distance = below(row, chosen * BLOCK + inside, size, highest, temperature)
    weight = tl.where(key_of(distance) <= limit, tl.exp(-distance), 0.0)
    place = tl.sum((tl.cumsum(weight.to(tl.float64), 0) <= target).to(tl.int32), 0)
    return chosen * BLOCK + tl.minimum(place, tl.max(tl.where(weight > 0.0, inside, 0), 0))


@triton.jit
def sample(
    logits, kept, seeds, indices, temperatures, top_ks, top_ps, leasts, tokens, highests, stride, size,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One row: its token, and its highest logit, which is no number where the row has none to choose by."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    highest, token = first_highest(row, size, BLOCK)
    temperature = tl.load(temperatures + number)
    if (temperature > 0.0) & (tl.abs(highest) < float("inf")):
        least = key_of(tl.abs(tl.load(leasts + number)))
        top_k, top_p = tl.load(top_ks + number), tl.load(top_ps + number)
        limit = threshold(row, kept + number * ROOM, size, highest, temperature, top_k, top_p, least, ROOM, BLOCK)
        seed = tl.load(seeds + number).to(tl.uint64, bitcast=True)
        index = tl.load(indices + number).to(tl.uint64, bitcast=True)
        token = draw(row, size, highest, temperature, limit, uniform(seed, index), BLOCKS, BLOCK)
    tl.store(tokens + number, token.to(tl.int64))
    tl.store(highests + number, highest)
