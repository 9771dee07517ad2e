"""What the sampler knows of each sequence, and what that makes of its logits: `edits_of`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sensorium.engine import speech_rules
from sensorium.engine.drawing import is_greedy, is_open, seed_of
from sensorium.engine.masks import MaskTable
from sensorium.engine.sequence import Sequence
from sensorium.kernels import Edits
from sensorium.kernels.token_bits import mask_of
from sensorium.types import SamplingParams


class TokenCounts:
    """Which tokens a sequence has seen and how often it has said them, for penalties."""

    __slots__ = ("_num_seen", "_places", "_said", "counts", "ids", "size")

    def __init__(self, prompt: NDArray[np.int32], vocab_size: int) -> None:
        """Placeholders of media may lie outside the vocabulary; they have no logit."""
        seen = np.unique(prompt[prompt < vocab_size])
        self.size = self._num_seen = len(seen)
        self.ids = np.empty(len(seen) + 256, np.int32)
        self.ids[: self.size] = seen
        self.counts = np.zeros(len(self.ids), np.float32)  # in the output
        self._places = {int(token): place for place, token in enumerate(seen)}
        self._said: list[int] = []  # what was counted

    def update(self, outputs: NDArray[np.int32]) -> None:
        """`outputs` is the whole output so far; what was counted before is not counted again."""
        news: list[int] = outputs[len(self._said) :].tolist()
        for token in news:
            place = self._places.setdefault(token, self.size)
            if place == self.size:
                if place == len(self.ids):
                    self.ids = np.concatenate((self.ids, np.empty_like(self.ids)))
                    self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
                self.ids[place] = token
                self.size += 1
            self.counts[place] += 1
        self._said += news

    def take_back(self, count: int) -> None:
        """Only the first `count` tokens of the output were said."""
        while len(self._said) > count:
            token = self._said.pop()
            place = self._places[token]
            self.counts[place] -= 1
            if not self.counts[place] and place >= self._num_seen:  # the last that came is the first that goes
                self.size -= 1
                del self._places[token]


class SamplerState:
    """What the sampler knows of one sequence."""

    __slots__ = (
        "_allowed",
        "allowed",
        "bad_words",
        "biases",
        "counts",
        "greedy",
        "open",
        "params",
        "plain",
        "seed",
        "stop_ids",
        "vocab_size",
    )

    def __init__(self, seq: Sequence, params: SamplingParams, engine_seed: int, vocab_size: int) -> None:
        self.params = params
        biases = dict(params.logit_bias) | {word[0]: -math.inf for word in params.bad_words if len(word) == 1}
        self.biases = {token: bias for token, bias in biases.items() if 0 <= token < vocab_size}
        self.greedy = is_greedy(params)
        self.open = is_open(params)
        self.stop_ids = [token for token in sorted(seq.stop_ids) if 0 <= token < vocab_size]
        self.bad_words: dict[int, list[tuple[int, ...]]] = {}  # those of several tokens, by the last but one
        for word in params.bad_words:
            if len(word) > 1:
                self.bad_words.setdefault(word[-2], []).append(word)
        self.allowed: NDArray[np.uint32] | None = None  # the mask of the tokens that are
        if params.allowed_token_ids:
            self.allowed = mask_of(params.allowed_token_ids, vocab_size)
        self._allowed = set(params.allowed_token_ids) - {word[0] for word in params.bad_words if len(word) == 1}
        penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        self.counts: TokenCounts | None = None
        if penalised:
            prompt = seq.tokens[: seq.num_prompt]
            self.counts = TokenCounts(prompt if params.repetition_penalty != 1 else prompt[:0], vocab_size)
        self.vocab_size = vocab_size
        self.plain = self.greedy and not (  # its token is that of the highest logit, and there is nothing else to do
            penalised
            or seq.constraint
            or params.logit_bias
            or params.min_tokens
            or params.logprobs is not None
            or params.allowed_token_ids
            or params.bad_words
            or params.rules
        )
        self.seed = seed_of(params.seed, engine_seed, seq.id)

    def added(self, seq: Sequence, gained: list[int]) -> dict[int, float]:
        """What is added to the logits of single tokens when `gained` are in the output that `seq` does not have yet."""
        forbidden = self.stop_ids if seq.num_outputs + len(gained) < self.params.min_tokens else []
        if self.bad_words:
            forbidden = forbidden + self.ends_of_bad_words(seq, gained)
        if self.params.rules is not None:
            is_first = not seq.num_outputs + len(gained)
            forbidden = forbidden + speech_rules.forbidden(self.params.rules, self.vocab_size, is_first=is_first)
        return self.biases | dict.fromkeys(forbidden, -math.inf) if forbidden else self.biases

    def ends_of_bad_words(self, seq: Sequence, gained: list[int]) -> list[int]:
        """Last tokens of the words whose other tokens the output ends with. None of them where a request leaves only
        such tokens: it goes on with what it allows."""
        last = gained[-1] if gained else int(seq.tokens[seq.num_tokens - 1])
        if last not in self.bad_words:
            return []
        longest = max(map(len, self.bad_words[last])) - 1
        start = max(seq.num_prompt, seq.num_tokens + len(gained) - longest)
        said = (*seq.tokens[start : seq.num_tokens].tolist(), *gained)
        ends = {word[-1] for word in self.bad_words[last] if said[-len(word) + 1 :] == word[:-1]}
        if self.allowed is not None:
            is_short = seq.num_outputs + len(gained) < self.params.min_tokens
            if ends.issuperset(self._allowed.difference(self.stop_ids if is_short else ())):
                return []
        return sorted(ends)


def edits_of(
    states: Seq[SamplerState], sequences: Seq[Sequence], ahead: Seq[list[int]], table: MaskTable
) -> Edits | None:
    """What is asked of the logits of rows, one for each sequence, that a kernel can do; None where that is nothing.
    `table` has the grammars' masks, and gets the requests'."""
    added: list[dict[int, float]] = []
    counts: list[TokenCounts | None] = []
    for row, (state, seq) in enumerate(zip(states, sequences, strict=True)):
        gained = ahead[row] if ahead else []
        added.append(state.added(seq, gained))
        if state.allowed is not None:
            table.narrowed[row] = table.add(state.allowed)
        if state.counts is not None:
            outputs = seq.tokens[seq.num_prompt : seq.num_tokens]
            state.counts.update(np.append(outputs, np.array(gained, np.int32)) if gained else outputs)
        counts.append(state.counts)
    seen = [None if one is None else (one.ids[: one.size], one.counts[: one.size]) for one in counts]
    if not table.bits and not any(added) and not any(seen):
        return None
    params = [state.params for state in states]
    return Edits(
        _starts(map(len, added)),
        np.array([token for one in added for token in one], np.int32),
        np.array([bias for one in added for bias in one.values()], np.float32),
        _starts(0 if one is None else len(one[0]) for one in seen),
        np.concatenate([np.empty(0, np.int32), *(one[0] for one in seen if one is not None)]),
        np.concatenate([np.empty(0, np.float32), *(one[1] for one in seen if one is not None)]),
        np.array([one.repetition_penalty for one in params], np.float32),
        np.array([one.frequency_penalty for one in params], np.float32),
        np.array([one.presence_penalty for one in params], np.float32),
        table.stacked(),
        table.narrowed,
        table.held,
        table.strict,
    )


def _starts(lengths: Iterable[int]) -> NDArray[np.int32]:
    return np.array([0, *accumulate(lengths)], np.int32)
