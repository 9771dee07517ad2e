"""Slots of the states of layers that keep no keys and values: whose they are, and snapshots for the prefix cache.

A running sequence holds the slot of its state after `num_computed` tokens. A step writes what comes of it to another
slot, and those of its snapshots; once it is computed, the first becomes the sequence's, the others stay behind for
whoever finds them, as long as nobody needs their slots. A slot that others may read is never written to: its content
is found by the key of all tokens before it, like a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from sensorium.engine.block_pool import BlockPool
from sensorium.engine.sequence import Sequence

ZERO_SLOT = 0  # the state before the first token


class StateSlots:
    def __init__(self, num_slots: int) -> None:
        """At least three: of zeros, and of one sequence before and after a step."""
        self.pool = BlockPool(num_slots)
        if self.pool.allocate() != ZERO_SLOT:
            raise RuntimeError("the first slot is not the one of zeros")

    @property
    def max_running(self) -> int:
        """Sequences that can run at a time: each holds a slot, and takes one in every step."""
        return (self.pool.num_blocks - 1) // 2

    def find(self, key: bytes) -> int | None:
        return self.pool.find(key)

    def forget(self, key: bytes) -> None:
        """What has this key, if anything has, is not to be found again."""
        slot = self.pool.find(key)
        if slot is not None:
            self.pool.forget(slot)

    def start(self, seq: Sequence, slot: int) -> None:
        """`seq` begins with the state in a slot that `find` returned, or that of zeros."""
        if slot:
            self.pool.retain(slot)
        seq.state = slot

    def prepare(self, work: Iterable[tuple[Sequence, int, list[int]]]) -> None:
        """Slots for what a step writes: (sequence, number of its tokens, places between them where a snapshot is
        wanted, ascending). Snapshots are left out where there is no room."""
        wanted = list(work)
        for seq, count, _ in wanted:
            self._drop(seq)
            seq.segments = [(count, self.pool.allocate())]
        for seq, _, places in wanted:
            for place in reversed(places):
                if not self.pool.num_free:
                    return
                count, target = seq.segments[0]
                seq.segments[0] = (count - (place - seq.num_computed), target)
                seq.segments.insert(0, (place - seq.num_computed, self.pool.allocate()))

    def advance(self, seq: Sequence, publish: Callable[[int, int], None]) -> None:
        """The step is computed, `seq.num_computed` counts it. `publish` is called with (number of tokens, slot) of each
        state that was written, in this order."""
        if seq.state:
            self.pool.release(seq.state)
        place = seq.num_computed - sum(count for count, _ in seq.segments)
        for count, slot in seq.segments:
            place += count
            publish(place, slot)
        for _, slot in seq.segments[:-1]:
            self.pool.release(slot)
        seq.state = seq.segments[-1][1]
        seq.segments = []

    def give_back(self, seq: Sequence) -> None:
        self._drop(seq)
        if seq.state:
            self.pool.release(seq.state)
        seq.state = ZERO_SLOT

    def _drop(self, seq: Sequence) -> None:
        """What a step that did not come to its end would have written."""
        for _, slot in seq.segments:
            self.pool.release(slot)
        seq.segments = []


def segments_of(sequences: Iterable[Sequence]) -> tuple[list[int], NDArray[np.int64]]:
    """The runs of a step, in the order of its batch: (tokens of each, the slots that each reads and writes
    [2, runs])"""
    lengths, sources, targets = [], [], []
    for seq in sequences:
        source = seq.state
        for count, target in seq.segments:
            lengths.append(count)
            sources.append(source)
            targets.append(target)
            source = target
    return lengths, np.array((sources, targets), np.int64)
