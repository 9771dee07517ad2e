"""Tokens of single rows, as a CPU draws them by the reference, and grammars that allow the same at every place."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sensorium.engine.constraint import Constraint
from sensorium.engine.drawing import draw_filtered, is_greedy, is_open
from sensorium.engine.sequence import Sequence
from sensorium.kernels import RowDraws, reference
from sensorium.types import EngineRequest, Prompt, SamplingParams


def drawn(row: NDArray[np.float32], params: SamplingParams, uniform: float) -> int:
    """Of logits [vocab], by a number of [0, 1)."""
    if not is_open(params):
        return draw_filtered(row, params, uniform)
    temperatures = np.array([0 if is_greedy(params) else params.temperature], np.float32)
    rows = np.zeros(1, np.int64)
    return int(reference.draw_rows(row[None], RowDraws(rows, temperatures, np.array([uniform])))[0][0])


def sequence(prompt: list[int], outputs: list[int], request_id: int = 1, **sampling: Any) -> Sequence:
    """One that has said `outputs`, and may say 50 more."""
    params = SamplingParams(max_tokens=len(outputs) + 50, **sampling)
    seq = Sequence(EngineRequest(request_id, Prompt(np.array(prompt, np.int32)), params), 0)
    for token in outputs:
        seq.append(token)
    return seq


class FixedMatcher:
    """A place in a grammar that allows `allowed` bool [vocab]; `forced` comes next. Counts its masks."""

    def __init__(self, allowed: NDArray[np.bool_], forced: list[int] | None = None) -> None:
        self.allowed, self._forced, self.masks = allowed, forced or [], 0
        self.taken: list[int] = []

    def is_error(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False

    def compute_ff_tokens(self) -> list[int]:
        return self._forced

    def consume_tokens(self, tokens: list[int]) -> bool:
        self._forced = []
        return True

    def consume_token(self, token: int) -> bool:
        self.taken.append(token)
        return bool(self.allowed[token])

    def validate_tokens(self, tokens: list[int]) -> int:
        return int(self.allowed[tokens[0]])

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        self.masks += 1
        bits = np.zeros(8 * size, bool)
        bits[: len(self.allowed)] = self.allowed
        ctypes.memmove(address, np.packbits(bits, bitorder="little").tobytes(), size)


def held_by(seq: Sequence, matcher: FixedMatcher, slot: int, late_ends: list[int] | None = None) -> None:
    """To this grammar from the sequence's next token on."""
    seq.slot = slot
    seq.constraint = Constraint(cast(Any, matcher), late_ends)
    seq.constraint._tokens[:0] = seq.tokens[seq.num_prompt : seq.num_tokens].tolist()
