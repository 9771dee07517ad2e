"""Prompt look-up: a sequence that ends as it did once before is guessed to go on as it did then.

The guesses are drafts (see `drafts`), so they change how many tokens a step gives, never which. How many there are
follows from three measurements: how many of the sequence's own last guesses were right, how long steps without and
with drafts take, and how many sequences wait for the step. A sequence whose guesses fail is asked less and less often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sensorium.engine.scheduler import Plan, known_tokens
from sensorium.engine.sequence import Sequence

MATCH = 3  # tokens at the end that must have stood together before
CANDIDATES = 8  # latest places that are compared
MAX_MATCH = 16  # tokens of a place that are compared: the longest match is the best
FIRST = 4  # drafts of a sequence of which nothing is known
MAX_PAUSE = 64  # tokens until a sequence whose guesses were wrong is asked again
MAX_IDLE = 64  # tokens until a sequence that ends like nothing before is looked at again, where steps are short
LOOK_S = 20e-6  # that a look takes, about
LOOK_SHARE = 0.02  # of a step, that looks may take
MEMORY = 0.8  # weight of what is known of a sequence's guesses when it learns of others
FORGET = 0.98  # of a time that keeps drafts away, with each that it does: it may have been an accident


@dataclass(slots=True)
class Guesses:
    """What is known of one sequence's guesses. `hits` of `tries` were right, the latest counting most."""

    length: int = FIRST  # of the next ones, if the step's time allows
    hits: float = 1.5
    tries: float = 2.0
    resume: int = 0  # number of outputs from which on it may be asked
    pause: int = 0
    idle: int = 0

    def learn(self, drafted: int, right: int, num_outputs: int) -> None:
        self.hits = self.hits * MEMORY + right
        self.tries = self.tries * MEMORY + right + (right < drafted)
        self.length = 2 * drafted if right == drafted else max(2, right + 1)
        self.pause = 0 if right else min(2 * self.pause or 1, MAX_PAUSE)
        self.resume = num_outputs + self.pause

    def wait(self, num_outputs: int, most: int) -> None:
        """Nothing was found, or nothing that is worth its time; `most` tokens until the next look."""
        self.idle = min(2 * self.idle or 1, most)
        self.resume = num_outputs + self.idle

    def expected(self, length: int) -> float:
        """How many of so many guesses will be right."""
        chance = min(self.hits / self.tries, 0.98)
        return chance * (1 - chance**length) / (1 - chance)


class StepTimes:
    """Seconds of steps without prompts, by their rows: of those without drafts and of those with."""

    def __init__(self) -> None:
        self._seconds: tuple[dict[int, float], dict[int, float]] = ({}, {})
        self._seen: set[tuple[bool, int]] = set()

    def observe(self, rows: int, seconds: float, *, drafted: bool) -> None:
        """The first step of a kind is not counted: kernels prepare for shapes that are new."""
        size = size_class(rows)
        if (drafted, size) not in self._seen:
            self._seen.add((drafted, size))
            return
        known = self._seconds[drafted].get(size, seconds)
        self._seconds[drafted][size] = known + (seconds - known) * (0.5 if seconds < known else 0.1)

    def plain(self, sequences: int) -> float | None:
        """Seconds of a step of so many sequences without drafts, if that is known."""
        return self._seconds[False].get(size_class(sequences))

    def between_looks(self, sequences: int) -> int:
        """Tokens after which a sequence may be looked at again, so that looks take a small share of a step."""
        plain = self.plain(sequences)
        return 1 if plain is None else min(math.ceil(LOOK_S * sequences / (LOOK_SHARE * plain)), MAX_IDLE)

    def ratio(self, sequences: int, rows: int) -> float:
        """How many times as long a step of `rows` with drafts takes as one of so many sequences without. 1 where that
        is not known: it is found out."""
        plain = self.plain(sequences)
        size = size_class(rows)
        with_drafts = self._seconds[True]
        drafted = with_drafts.get(size) or max((s for one, s in with_drafts.items() if one < size), default=None)
        return 1.0 if plain is None or drafted is None else max(drafted / plain, 1.0)

    def doubt(self, rows: int) -> None:
        """A step with so many rows is not taken because of its time."""
        with_drafts = self._seconds[True]
        for size in with_drafts:
            if size <= size_class(rows):
                with_drafts[size] *= FORGET


def size_class(rows: int) -> int:
    """Of steps that take about as long: two classes for each doubling."""
    return round(2 * math.log2(rows)) if rows > 4 else rows - 1


class PromptLookup:
    """Proposes for the sequences of one engine: guesses, or what a grammar leaves no choice about. `most`: drafts of a
    sequence in a step."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.times = StepTimes()
        self.num_drafts = 0  # sequences' steps with guesses, ever
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.accepted_by_place = [0] * most  # of the guesses that were as long
        self._sequences = 1  # of the step that is planned
        self._rows = 1
        self._gain = 0.0  # tokens that are expected of its drafts
        self._wait = 1  # most tokens between two looks at a sequence

    def begin(self, num_decoding: int) -> None:
        """A step is planned in which so many sequences decode."""
        self._sequences = self._rows = num_decoding
        self._gain = 0.0
        self._wait = self.times.between_looks(num_decoding)

    def propose(self, seq: Sequence, most: int) -> list[int]:
        """At most `most` next tokens of a decoding sequence."""
        if seq.constraint is not None:
            found = known_tokens(seq, most)
            self._rows += len(found)
            return found
        guesses: Guesses = seq.guesses or Guesses()
        seq.guesses = guesses
        if seq.num_outputs < guesses.resume or (seq.sampling is not None and seq.sampling.rules is not None):
            return []
        most = min(most, self.most, guesses.length, seq.max_tokens - seq.num_outputs - 1)
        if most <= 0:
            return []
        start = last_match(seq)
        length = 0 if start is None else self._length(guesses, most)
        if not length:
            guesses.wait(seq.num_outputs, self._wait)
            return []
        guesses.idle = 0
        self._rows += length
        self._gain += guesses.expected(length)
        return [int(token) for token in np.resize(seq.tokens[start : seq.num_tokens], length)]

    def _length(self, guesses: Guesses, most: int) -> int:
        """Of `most`, half of it, a quarter and so on, and none, what lets the whole step give most tokens a second."""
        best, best_rate = 0, (self._sequences + self._gain) / self._ratio(self._rows)
        length = most
        while length:
            gain = self._gain + guesses.expected(length)
            rate = (self._sequences + gain) / self._ratio(self._rows + length)
            if rate > best_rate:
                best, best_rate = length, rate
            length //= 2
        if not best:
            self.times.doubt(self._rows + most)
        return best

    def _ratio(self, rows: int) -> float:
        return 1.0 if rows == self._sequences else self.times.ratio(self._sequences, rows)

    def learn(self, seq: Sequence, drafted: int, right: int) -> None:
        """So many of the drafts of a sequence were right."""
        if seq.guesses is None:  # its grammar's
            return
        seq.guesses.learn(drafted, right, seq.num_outputs)
        self._count(drafted, right)

    def _count(self, drafted: int, right: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += right
        for place in range(min(right, self.most)):
            self.accepted_by_place[place] += 1

    def forget(self, seq: Sequence) -> None:
        """A sequence ends, or gives its cache back."""

    def observe(self, plan: Plan, seconds: float) -> None:
        """A step took so long."""
        if not plan.prefills:
            rows = len(plan.decodes) + sum(count for _, count in plan.drafted)
            self.times.observe(rows, seconds, drafted=bool(plan.drafted))


def last_match(seq: Sequence) -> int | None:
    """Where a sequence went on after the tokens that it ends with, if they stood there before: of the latest such
    places the one before which most tokens are equal."""
    end = seq.num_tokens
    if end <= MATCH:
        return None
    tokens = seq.tokens[: end - 1]
    places = np.flatnonzero(tokens[MATCH - 1 :] == seq.last_token) + MATCH - 1  # of the last token
    for back in range(1, MATCH):
        places = places[tokens[places - back] == seq.tokens[end - 1 - back]]
    if not len(places):
        return None
    if len(places) == 1:
        return int(places[0]) + 1
    tail = seq.tokens[max(end - MAX_MATCH, 0) : end][::-1].tolist()
    best, best_equal = 0, 0
    for place in places[: -CANDIDATES - 1 : -1].tolist():
        before = seq.tokens[max(place + 1 - MAX_MATCH, 0) : place + 1][::-1].tolist()
        equal = next(
            (i for i, (a, b) in enumerate(zip(before, tail, strict=False)) if a != b), min(len(before), len(tail))
        )
        if equal > best_equal:
            best, best_equal = place + 1, equal
    return best
