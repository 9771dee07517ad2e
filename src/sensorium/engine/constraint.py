"""What holds one sequence to its grammar: which tokens it has had, which come next without a choice, when it is done.

Tokens that the grammar forces are taken at once, in the tokenizer's own way of writing them, so that they are known
before they are sampled: as drafts they cost one step together. A token that is known is what is sampled in its place,
drafted or not, and again if a step is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import GRAMMAR_FAILED
from sensorium.kernels.token_bits import mask_of

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from sensorium.engine.matchers import NativeMatcher
    from sensorium.kernels import GrammarFunctions, Taken


class Constraint:
    """Belongs to one sequence. `error` says why it cannot go on, or is "".

    `matcher` is at its beginning. `late_ends` are end tokens of the model that the request does not want to end by:
    they come only where the grammar leaves nothing else.
    """

    __slots__ = (
        "_allows",
        "_late_address",
        "_late_bits",
        "_stopped",
        "_tokens",
        "address",
        "error",
        "functions",
        "late_ends",
        "mask_s",
        "matcher",
    )

    def __init__(self, matcher: LLMatcher | NativeMatcher, late_ends: list[int] | None = None) -> None:
        self.matcher = matcher
        self.late_ends = late_ends or []
        self.error = ""
        self._allows: Callable[[int], bool] | None = getattr(matcher, "allows", None)  # quicker where there is one
        self.functions: GrammarFunctions | None = getattr(matcher, "functions", None)
        """Of the matcher at `address`, where native code may ask it; else None."""
        self.address: int = getattr(matcher, "address", 0)
        self._late_bits: NDArray[np.uint32] | None = None
        self._late_address = 0
        self.mask_s = 0.0  # that the last mask took
        self._tokens: list[int] = []  # of the output, as far as they are known
        self._stopped = False
        self._look_ahead()

    def needs_mask(self, index: int) -> bool:
        """Whether there is a choice for output token `index`, so that the matcher must say what is allowed."""
        return index >= len(self._tokens)

    def allows(self, token: int) -> bool:
        """Whether a token may come next where there is a choice. End tokens that are late count as not allowed."""
        if token in self.late_ends:
            return False
        return self.matcher.validate_tokens([token]) == 1 if self._allows is None else self._allows(token)

    def known(self, index: int) -> int | None:
        """Output token `index`, if it is known."""
        return self._tokens[index] if index < len(self._tokens) else None

    def drafts(self, index: int) -> list[int]:
        """The tokens that are known to come from `index` on; when the text ends with them, the last is no draft, as
        nothing is sampled behind it."""
        return self._tokens[index:-1] if self._stopped else self._tokens[index:]

    def is_complete(self, num_outputs: int) -> bool:
        """Whether the text is whole with so many tokens and nothing may follow."""
        return self._stopped and num_outputs >= len(self._tokens)

    def take(self, index: int, token: int) -> bool:
        """Note that output token `index` is `token`. False if the grammar has failed: see `error`."""
        if index < len(self._tokens):
            return True
        self._tokens.append(token)
        if self.matcher.consume_token(token):
            self._look_ahead()
        else:
            self.error = GRAMMAR_FAILED
        return not self.error

    def is_ready(self, index: int) -> bool:
        """Whether output token `index` is news, which the matcher can take by itself."""
        return index >= len(self._tokens) and not self._stopped

    def note(self, token: int) -> None:
        """The next output token, which the matcher has taken."""
        self._tokens.append(token)

    def note_taken(self, taken: Taken) -> None:
        """And what came of that."""
        if taken.is_more:
            self._look_ahead()
            return
        self._tokens += taken.forced
        self._stopped = taken.stopped
        if taken.failed:
            self.error = GRAMMAR_FAILED

    def on_time(self, vocab_size: int) -> NDArray[np.uint32] | None:
        """The bits of all tokens but end tokens that are late; None: there are no such."""
        if self.late_ends and self._late_bits is None:
            self._late_bits = ~mask_of(self.late_ends, vocab_size)
            self._late_address = self._late_bits.ctypes.data
        return self._late_bits

    def address_on_time(self, vocab_size: int) -> int:
        """Of these bits; 0: there are none."""
        if self.late_ends and not self._late_address:
            self.on_time(vocab_size)
        return self._late_address

    def without_late_ends(self, bits: NDArray[np.uint32], vocab_size: int) -> None:
        """Of a mask [words], in place."""
        on_time = self.on_time(vocab_size)
        if on_time is not None:
            bits &= on_time

    def look_for_failure(self) -> None:
        """After a mask was asked for."""
        if self.matcher.is_error():
            self.error = GRAMMAR_FAILED

    def _look_ahead(self) -> None:
        forced = self.matcher.compute_ff_tokens()
        if forced and self.matcher.consume_tokens(forced):
            self._tokens += forced
        self._stopped = self.matcher.is_stopped()
        if self._stopped and self.matcher.is_error():  # a failed one has stopped, too
            self.error = GRAMMAR_FAILED
