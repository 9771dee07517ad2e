"""Guesses of a draft model, for sequences of which prompt look-up says nothing, as long as they save time.

How many tokens are guessed follows from measurements, as in `lookup`: how many of a sequence's last guesses were right,
how long a step with and without drafts takes, and a round of the draft model. What it costs to find out that nothing is
gained is bounded by an account: a small part of all steps, and what guesses have saved.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import monotonic

from sensorium.engine.draft_model import DraftModel
from sensorium.engine.lookup import FORGET, MAX_PAUSE, Guesses, PromptLookup, size_class
from sensorium.engine.scheduler import Plan
from sensorium.engine.sequence import Sequence

SHARE = 0.01  # of all steps, whose time guesses may cost that save nothing
GIVEN = 8.0  # steps, whose time they may cost at once
MOST_SAVED = 100.0  # steps that the account holds
CATCH_UP_TOKENS = 256  # of all sequences that the draft model computes in a step before it guesses
AT_ONCE = 16  # tokens that it may be behind when it guesses
EXPLORED = 2  # tokens that are guessed to find out whether it pays now
FORESEEN = 128  # tokens that a sequence is taken to go on for, if it may: over them catching up has to pay
PLAIN_EVERY = 64  # steps with guesses after which one without says how long it takes


@dataclass(slots=True)
class Account:
    """The time that guesses have saved, and may cost: in steps without guesses."""

    steps: float = GIVEN

    def give(self) -> None:
        """A step was computed."""
        self.steps = max(self.steps, min(self.steps + SHARE, GIVEN))

    def settle(self, gain: float) -> None:
        """A step's guesses have saved so much, or cost. The first ones may cost much: weights come from the disk."""
        self.steps = min(max(self.steps + gain, min(self.steps, -GIVEN)), MOST_SAVED)

    @property
    def allows_trials(self) -> bool:
        return self.steps >= GIVEN


class Drafting(PromptLookup):
    """Prompt look-up, and a draft model where nothing was found."""

    def __init__(self, most: int, model: DraftModel, step_tokens: int, clock: Callable[[], float] = monotonic) -> None:
        """`most`: drafts of a sequence in a step, which has at most `step_tokens`."""
        super().__init__(most)
        self.account = Account()
        self._model: DraftModel | None = model
        self._step_tokens = step_tokens
        self._clock = clock
        self._known: dict[int, Guesses] = {}  # of the model's guesses, by request
        self._ready: dict[int, list[int]] = {}  # drafts of the step that is planned next
        self._asked: set[int] = set()  # whose drafts are the model's
        self._hits, self._tries = 0.75, 1.0  # as `Guesses` has them, of all sequences
        self._round_s: dict[int, float] = {}  # of the draft model, by the size class of its sequences
        self._token_s = 0.0  # that it takes for a token of a prompt
        self._plain_s: float | None = None  # of a step without guesses, as the next one would be
        self._spent_s = 0.0  # by the draft model on the next step
        self._saved = 0.0  # steps, by the guesses of the last one
        self._in_row = 0  # steps with its guesses

    @property
    def is_idle(self) -> bool:
        """Whether nothing is kept of any sequence."""
        return not self._known and (self._model is None or self._model.pool_is_idle)

    # Before a step

    def think(self, decoding: Seq[Sequence]) -> None:
        """Guess for a step in which these decode, before it is planned."""
        self._ready.clear()
        self._asked.clear()
        self.account.settle(self._saved)
        self._saved = self._spent_s = 0.0
        super().begin(len(decoding))
        left = (self._step_tokens - len(decoding)) // 2  # as the scheduler has
        self._plain_s = self.times.plain(len(decoding))
        pays = self._may_pay()
        asked = []
        for seq in decoding:
            if found := super().propose(seq, left):
                self._ready[seq.id] = found
                left -= len(found)
            elif pays and self._may_ask(seq):
                asked.append(seq)
        if asked:
            self._ask(asked, left)
        self._in_row = self._in_row + 1 if self._asked else 0

    def _may_pay(self) -> bool:
        """Whether the model may be asked at all: now and then a step without says what there is to be gained."""
        return bool(self._model and self._plain_s and self._in_row < PLAIN_EVERY and self.account.steps > 0)

    def _may_ask(self, seq: Sequence) -> bool:
        if seq.constraint is not None or seq.sampling is None or seq.sampling.rules is not None:
            return False
        known = self._known.get(seq.id)
        if known is None:  # as good as those of the others
            known = self._known[seq.id] = Guesses(hits=2 * self._hits / self._tries)
        return seq.num_outputs >= known.resume and seq.max_tokens - seq.num_outputs > 1

    def _ask(self, asked: list[Sequence], left: int) -> None:
        model = self._model
        if model is None:
            return
        started = self._clock()
        behind = {seq.id: lag for seq in asked if (lag := model.behind(seq)) is not None}
        for seq in asked:
            if seq.id not in behind:
                self._known[seq.id].resume = seq.max_tokens  # never again
        asked = [seq for seq in asked if seq.id in behind]
        length = self._length_of(asked, behind, left) if asked else 0
        if not length:
            return
        self._catch_up(model, [seq for seq in asked if behind[seq.id] > AT_ONCE])
        caught_up = self._clock()
        ready = [seq for seq in asked if (lag := model.behind(seq)) is not None and lag <= AT_ONCE]
        if ready:
            guesses = model.guess([(seq, self._limit(seq, length)) for seq in ready])
            round_s = (self._clock() - caught_up) / max(1, *map(len, guesses.values()))
            size = size_class(len(ready))
            self._round_s[size] = min(self._round_s.get(size, round_s) / FORGET, round_s)
            self._take(ready, guesses)
        self._spent_s = self._clock() - started

    def _catch_up(self, model: DraftModel, late: list[Sequence]) -> None:
        started = self._clock()
        count = model.catch_up(late, CATCH_UP_TOKENS)
        if count:
            token_s = (self._clock() - started) / count
            self._token_s = min(self._token_s / FORGET, token_s) if self._token_s else token_s

    def _take(self, ready: Seq[Sequence], guesses: dict[int, list[int]]) -> None:
        for seq in ready:
            if found := guesses.get(seq.id):
                self._ready[seq.id] = found
                self._asked.add(seq.id)
                self._rows += len(found)
            else:  # it would end here
                self._known[seq.id].wait(seq.num_outputs, MAX_PAUSE)

    def _limit(self, seq: Sequence, length: int) -> int:
        return min(length, self._known[seq.id].length, seq.max_tokens - seq.num_outputs - 1)

    def _length_of(self, ready: list[Sequence], behind: dict[int, int], left: int) -> int:
        """How many tokens of each let the step give most tokens a second; 0: none. What is to be caught up with is
        shared out over the tokens that it may be for."""
        late_s = sum(behind[seq.id] / min(seq.max_tokens - seq.num_outputs, FORESEEN) for seq in ready) * self._token_s
        late = late_s / self._sequences / self._plain_s if self._plain_s else 0.0  # of a token
        best, best_rate = 0, (self._sequences + self._gain) / self._ratio(self._rows)
        length = most = min(self.most, left // len(ready), max(self._limit(seq, self.most) for seq in ready))
        while length > 0:
            limits = [(self._known[seq.id], self._limit(seq, length)) for seq in ready]
            gain = self._gain + sum(known.expected(limit) for known, limit in limits)
            rows = self._rows + sum(limit for _, limit in limits)
            step = self._ratio(rows) + self._rounds_ratio(len(ready), length)
            rate = 1 / (step / (self._sequences + gain) + late)
            if rate > best_rate:
                best, best_rate = length, rate
            length //= 2
        if not best and most > 0 and self.account.allows_trials:
            return min(EXPLORED, most)
        if not best:
            for seq in ready:
                self._known[seq.id].wait(seq.num_outputs, MAX_PAUSE)
        return best

    def _rounds_ratio(self, sequences: int, rounds: int) -> float:
        """How many times as long as a step without drafts so many rounds of the draft model take."""
        known = self._round_s.get(size_class(sequences))
        return 0.0 if not self._plain_s or known is None else rounds * known / self._plain_s

    # What the scheduler asks and says

    def begin(self, num_decoding: int) -> None:
        """All is guessed already."""

    def propose(self, seq: Sequence, most: int) -> list[int]:
        return self._ready.pop(seq.id, [])[:most]

    def learn(self, seq: Sequence, drafted: int, right: int) -> None:
        if seq.id not in self._asked:
            super().learn(seq, drafted, right)
            return
        self._known[seq.id].learn(drafted, right, seq.num_outputs)
        self._hits = self._hits * FORGET + right
        self._tries = self._tries * FORGET + right + (right < drafted)
        self._count(drafted, right)
        self._saved += right / self._sequences

    def forget(self, seq: Sequence) -> None:
        self._ready.pop(seq.id, None)
        self._known.pop(seq.id, None)
        if self._model is not None:
            self._model.forget(seq)

    def observe(self, plan: Plan, seconds: float) -> None:
        super().observe(plan, seconds)
        self.account.give()
        if not self._plain_s:
            return
        self._saved -= self._spent_s / self._plain_s
        if self._asked:  # beside a prompt it takes as long as it does alone, and never longer than its rows one by one
            longer = self._ratio(self._rows) if plan.prefills else seconds / self._plain_s
            self._saved -= max(min(longer, self._rows / self._sequences) - 1, 0.0)

    def give_up(self) -> None:
        """The model failed: nobody asks it again."""
        if self._model is not None:
            self._model.forget_all()
        self._model = None
        self._ready.clear()
        self._asked.clear()
