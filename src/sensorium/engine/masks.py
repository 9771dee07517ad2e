"""Which tokens grammars allow next: computed beside the forward pass, applied to the logits behind it, by numpy on a
CPU and by a kernel (`MaskTable`) elsewhere.

On a thread, where they take longer than handing them to one; else, and that is so in small steps, just before they are
needed, when an accelerator is still computing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sensorium.engine.constraint import GRAMMAR_FAILED, Constraint
from sensorium.engine.sequence import Sequence

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from sensorium.engine.matchers import NativeMatcher

WORD_BITS = 32
SMALL_VOCABULARY = 8192
THREAD_S = 0.002  # that masks of a step must take for a thread to pay

Held: TypeAlias = tuple[int, Constraint, int, int]
"""(row of the logits, what holds its sequence, the sequence's slot, index of the output token that they are for)"""
Wanted: TypeAlias = "tuple[LLMatcher | NativeMatcher, int]"
"""(matcher, slot of its sequence)"""
Floats: TypeAlias = NDArray[np.float32]


class MaskTable:
    """Masks for a kernel, see `Edits`: which tokens each row of a step's logits is left."""

    __slots__ = ("_words", "bits", "held", "narrowed", "strict")

    def __init__(self, rows: int, vocab_size: int) -> None:
        self.bits: list[NDArray[np.uint32]] = []
        self._words = -(-vocab_size // WORD_BITS)
        self.narrowed, self.held, self.strict = (np.full(rows, -1, np.int32) for _ in range(3))

    def add(self, bits: NDArray[np.uint32]) -> int:
        """The number of a mask [words]."""
        self.bits.append(bits)
        return len(self.bits) - 1

    def stacked(self) -> NDArray[np.uint32]:
        """[masks, words]"""
        return np.stack(self.bits) if self.bits else np.empty((0, self._words), np.uint32)


class Masks:
    """A row of bits for each slot of a running sequence. Everything but the filling belongs to the step loop."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._bits = np.zeros((max_num_seqs, -(-vocab_size // WORD_BITS)), np.uint32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None
        self._filling: Future[None] | None = None
        self._wanted: list[Wanted] = []
        self._seconds = 0.0  # that the last ones took
        bit = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._weights = np.where(bit, np.float32(0), np.float32(-np.inf))  # [256, 8], of the bits of every byte
        self._work = np.empty((1, 4 * self._bits.shape[1], 8), np.float32)  # a row that stays in a processor's cache

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """Start on the masks of a step: each for the token behind the sequence's drafts, if there is a choice."""
        self._wanted = []
        self.wait()
        self._wanted = [
            (seq.constraint.matcher, seq.slot)
            for seq in sequences
            if seq.constraint is not None and seq.constraint.needs_mask(seq.num_outputs + len(seq.drafts))
        ]
        if self._wanted and self._seconds > THREAD_S:
            self._filling = self._thread.submit(self._fill_beside, self._wanted)
            self._wanted = []

    def wait(self) -> None:
        """Until the masks are there."""
        if self._filling is not None:
            filling, self._filling = self._filling, None
            filling.result()
        if self._wanted:
            wanted, self._wanted = self._wanted, []
            self._fill(wanted)

    def _fill(self, wanted: list[Wanted]) -> None:
        started = perf_counter()
        address, size = self._bits.ctypes.data, self._bits.itemsize * self._bits.shape[1]
        for matcher, slot in wanted:
            matcher.unsafe_compute_mask_ptr(address + slot * size, size)
        self._seconds = perf_counter() - started

    def _fill_beside(self, wanted: list[Wanted]) -> None:
        """The same by another thread, which gives the interpreter's lock back for all of them at once."""
        from llguidance import LLExecutor, LLMatcher

        known = [(matcher, slot) for matcher, slot in wanted if isinstance(matcher, LLMatcher)]
        if len(known) < len(wanted):  # the executor does not take the other kind
            self._fill(wanted)
            return
        started = perf_counter()
        self._executor = self._executor or LLExecutor()
        rows, words = self._bits.shape
        self._executor.unsafe_compute_mask_ptr(known, self._bits.ctypes.data, words * self._bits.itemsize, rows)
        self._seconds = perf_counter() - started

    def tell(self, table: MaskTable, held: list[Held]) -> None:
        """Put masks for these rows into a table for kernels."""
        self.wait()
        for row, constraint, slot, index in held:
            known = constraint.known(index)
            if known is not None:
                table.held[row] = table.strict[row] = table.add(mask_of((known,), self._vocab_size))
            elif constraint.matcher.is_error():
                constraint.error = GRAMMAR_FAILED
            else:
                table.held[row] = table.strict[row] = table.add(self._bits[slot])
                if constraint.late_ends:
                    without = ~mask_of(constraint.late_ends, self._vocab_size)
                    table.strict[row] = table.add(self._bits[slot] & without)

    def apply(self, rows: Floats, raw: Floats, held: list[Held], *, is_edited: bool) -> None:
        """Of logits [rows, vocab] leave only what grammars allow, in place, on a CPU, where numpy is several times as
        fast as torch for few numbers. They are `raw` with, where `is_edited`, everything else that requests ask for.

        Where that and the grammar leave nothing together, the grammar is kept and the rest is not.
        """
        self.wait()
        chosen = [one for one in held if one[1].needs_mask(one[3])]
        if chosen:
            self._apply_masks(rows, raw, chosen, is_edited=is_edited)
        if len(chosen) == len(held):
            return
        for row, constraint, _, index in held:
            known = constraint.known(index)
            if known is not None:
                value = float(raw[row, known])
                rows[row] = -math.inf
                rows[row, known] = value

    def _apply_masks(self, rows: Floats, raw: Floats, chosen: list[Held], *, is_edited: bool) -> None:
        is_small = self._vocab_size <= SMALL_VOCABULARY and not is_edited
        if is_small and not any(constraint.is_delicate for _, constraint, _, _ in chosen):
            slots = [slot for _, _, slot, _ in chosen]
            where = slice(None) if len(chosen) == len(rows) else [row for row, _, _, _ in chosen]
            rows[where] += self._weights_of(self._bits[slots])  # all at once: what small steps have time for
            return
        for row, constraint, slot, _ in chosen:
            if constraint.matcher.is_error():
                constraint.error = GRAMMAR_FAILED
            else:
                allowed = self._weights_of(self._bits[slot : slot + 1])[0]
                _hold(rows[row], raw[row], allowed, constraint.late_ends, is_edited=is_edited)

    def _weights_of(self, bits: NDArray[np.uint32]) -> Floats:
        """float32 [rows, vocab]: 0 for what is allowed, minus infinity for all else. One row is overwritten by the next
        call."""
        out = self._work if len(bits) == 1 else None
        found = self._weights.take(bits.view(np.uint8), axis=0, out=out, mode="clip").reshape(len(bits), -1)
        return found[:, : self._vocab_size]


def mask_of(tokens: Collection[int], vocab_size: int) -> NDArray[np.uint32]:
    """[words], the bits of these tokens"""
    found = np.zeros(-(-vocab_size // WORD_BITS), np.uint32)
    at = np.fromiter(tokens, np.int64, len(tokens))
    np.bitwise_or.at(found, at // WORD_BITS, np.left_shift(np.uint32(1), (at % WORD_BITS).astype(np.uint32)))
    return found


def _hold(row: Floats, raw: Floats, allowed: Floats, late_ends: list[int], *, is_edited: bool) -> None:
    """One row [vocab], in place. `late_ends` are chosen only where the grammar leaves nothing else."""
    row += allowed
    if late_ends:
        kept = row[late_ends]
        row[late_ends] = -math.inf
        if _is_empty(row):
            row[late_ends] = kept
    if is_edited and _is_empty(row):
        row[:] = raw + allowed


def _is_empty(row: Floats) -> bool:
    return float(row.max()) == -math.inf
