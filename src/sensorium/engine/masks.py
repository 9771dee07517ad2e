"""Which tokens grammars allow next: computed beside the forward pass, for the drawing of tokens on a CPU and for a
kernel (`MaskTable`) elsewhere.

On a thread, where they take longer than handing them to one; else, and that is so in small steps, just before they are
needed, when an accelerator is still computing. A mask that takes longer than to ask about single tokens is not computed
at all before a token is drawn that the grammar forbids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sensorium.engine.constraint import Constraint
from sensorium.engine.drawing import is_open
from sensorium.engine.sequence import Sequence
from sensorium.kernels.token_bits import WORD_BITS, bits_of, mask_of

if TYPE_CHECKING:
    from llguidance import LLExecutor

THREAD_S = 0.002  # that masks of a step must take for a thread to pay
ASKING_S = 10e-6  # that a mask must take for asking about one token, and sometimes for another, to pay

Held: TypeAlias = tuple[int, Constraint, int, int]
"""(row of the logits, what holds its sequence, the sequence's slot, index of the output token that they are for)"""
Wanted: TypeAlias = tuple[Constraint, int]
"""(what holds a sequence, its slot)"""
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
        self._address = self._bits.ctypes.data
        self.costs = np.zeros(max_num_seqs, np.int64)  # by slot, see `kernels.draw_held`
        self._filled: set[int] = set()  # the slots that have this step's mask
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None
        self._filling: Future[None] | None = None
        self._wanted: list[Wanted] = []
        self._seconds = 0.0  # that the last ones took

    def begin(self, sequences: Iterable[Sequence], *, may_ask: bool = False) -> None:
        """Start on the masks of a step: each for the token behind the sequence's drafts, if there is a choice.

        With `may_ask` none for sequences that draw first and ask about one token, where native code decides about that
        or their last took longer.
        """
        self.wait()
        self._filled.clear()
        self._wanted = [
            (seq.constraint, seq.slot)
            for seq in sequences
            if seq.constraint is not None
            and seq.constraint.needs_mask(seq.num_outputs + len(seq.drafts))
            and not (
                may_ask
                and (seq.constraint.functions is not None or seq.constraint.mask_s > ASKING_S)
                and seq.sampling
                and is_open(seq.sampling)
            )
        ]
        if self._wanted and self._seconds > THREAD_S:
            self._filling = self._thread.submit(self._fill_beside, self._wanted)
            self._filled.update(slot for _, slot in self._wanted)
            self._wanted = []

    def wait(self) -> None:
        """Until the masks are there."""
        if self._filling is not None:
            filling, self._filling = self._filling, None
            filling.result()
        if self._wanted:
            wanted, self._wanted = self._wanted, []
            self._seconds = self._fill(wanted)

    def _fill(self, wanted: list[Wanted]) -> float:
        """Returns the seconds that it took."""
        started = before = perf_counter()
        address, size = self._address, self._bits.itemsize * self._bits.shape[1]
        for constraint, slot in wanted:
            constraint.matcher.unsafe_compute_mask_ptr(address + slot * size, size)
            self._filled.add(slot)
            now = perf_counter()
            constraint.mask_s, before = now - before, now
            constraint.look_for_failure()
        return before - started

    def _fill_beside(self, wanted: list[Wanted]) -> None:
        """The same by another thread, which gives the interpreter's lock back for all of them at once."""
        from llguidance import LLExecutor, LLMatcher

        known = [(one.matcher, slot) for one, slot in wanted if isinstance(one.matcher, LLMatcher)]
        if len(known) < len(wanted):  # the executor does not take the other kind
            self._seconds = self._fill(wanted)
            return
        started = perf_counter()
        self._executor = self._executor or LLExecutor()
        rows, words = self._bits.shape
        self._executor.unsafe_compute_mask_ptr(known, self._address, words * self._bits.itemsize, rows)
        self._seconds = perf_counter() - started
        for constraint, _ in wanted:
            constraint.mask_s = self._seconds / len(wanted)
            constraint.look_for_failure()

    def tell(self, table: MaskTable, held: list[Held]) -> None:
        """Put masks for these rows into a table for kernels."""
        self.wait()
        for row, constraint, slot, index in held:
            known = constraint.known(index)
            if known is not None:
                table.held[row] = table.strict[row] = table.add(mask_of((known,), self._vocab_size))
            elif not constraint.error:
                table.held[row] = table.strict[row] = table.add(self._bits[slot])
                if constraint.late_ends:
                    strict = self._bits[slot].copy()
                    constraint.without_late_ends(strict, self._vocab_size)
                    table.strict[row] = table.add(strict)

    def allows(self, held: Held, token: int) -> bool:
        """Whether a token may come, which is asked of the grammar itself where there is no mask."""
        _, constraint, slot, _ = held
        if slot not in self._filled:
            return constraint.allows(token)
        is_set = bool(self._bits[slot, token // WORD_BITS] >> (token % WORD_BITS) & 1)
        return is_set and token not in constraint.late_ends

    def strict(self, held: list[Held]) -> NDArray[np.uint32]:
        """The masks of these rows, [rows, words], without the end tokens that are late."""
        self._fill([(constraint, slot) for _, constraint, slot, _ in held if slot not in self._filled])
        bits = self._bits[[slot for _, _, slot, _ in held]]
        for own, (_, constraint, _, _) in zip(bits, held, strict=True):
            constraint.without_late_ends(own, self._vocab_size)
        return bits

    def hold(self, row: Floats, raw: Floats, held: Held, *, is_edited: bool) -> None:
        """Of logits [vocab] leave only what a grammar allows, in place. They are `raw` with, where `is_edited`,
        everything else that a request asks for. Where that and the grammar leave nothing together, the grammar is kept
        and the rest is not; end tokens that are late are left only where there is nothing else."""
        [strict] = self.strict([held])
        whole = self._bits[held[2]]
        for values, bits in ((row, strict), (row, whole), (raw if is_edited else row, whole)):
            found = np.where(bits_of(bits, self._vocab_size), values, np.float32(-math.inf))
            if float(found.max()) != -math.inf:
                break
        row[:] = found
