"""Drafts: guessed next tokens, computed together with a sequence's last token and kept as far as they are right.

A draft is right if it is the very token that is sampled in its place. So drafts change how many tokens a step gives,
never which: the sampler takes the same number of a seed's stream for each token as it does one at a time. Where a
grammar leaves no choice but the drafts, only what follows them is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor

from sensorium.engine.sampler import Sampled, Sampler
from sensorium.engine.sequence import Sequence
from sensorium.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Row `first + k` of the logits belongs to the token after draft k of the sampled sequence `index`."""

    index: int
    first: int


@dataclass(slots=True)
class Tokens:
    """What sequences gained in a step, by their index. What is in `failed` had logits that are not numbers."""

    token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprob]]  # of those that asked
    failed: set[int]

    @classmethod
    def of(cls, sampled: Sampled, ahead: Seq[list[int]] = ()) -> Tokens:
        """One token each, behind what each has `ahead`."""
        logprobs = {index: [one] for index, one in sampled.logprobs.items()}
        token_ids = [[token] for token in sampled.token_ids]
        if ahead:
            token_ids = [[*known, *one] for known, one in zip(ahead, token_ids, strict=True)]
        return cls(token_ids, logprobs, set(sampled.failed))

    def extend(self, indices: Seq[int], sampled: Sampled) -> None:
        """One more token for each of `indices`."""
        self.failed.update(indices[row] for row in sampled.failed)
        for row, (index, token) in enumerate(zip(indices, sampled.token_ids, strict=True)):
            self.token_ids[index].append(token)
            if row in sampled.logprobs:
                self.logprobs[index].append(sampled.logprobs[row])


def is_certain(seq: Sequence) -> bool:
    """Whether its drafts are what its grammar leaves, and nobody asks how likely they are: they need no logits."""
    if seq.constraint is None or seq.sampling is None or seq.sampling.logprobs is not None:
        return False
    return seq.constraint.drafts(seq.num_outputs)[: len(seq.drafts)] == seq.drafts


def sample_after_drafts(
    sampler: Sampler, logits: Tensor, sequences: Seq[Sequence], drafts: Seq[DraftRows], tokens: Tokens
) -> None:
    """Add to `tokens`, which has the first token of each sequence, those that follow right drafts.

    `logits` [rows, vocab] are of the first tokens, then of the places after drafts. One round for each place.
    """
    place = 0
    while drafts := [one for one in drafts if _is_right(sequences[one.index], place, tokens, one.index)]:
        indices = [one.index for one in drafts]
        rows = logits[[one.first + place for one in drafts]]
        ahead = [tokens.token_ids[index] for index in indices]
        tokens.extend(indices, sampler.sample(rows, [sequences[index] for index in indices], ahead))
        place += 1


def _is_right(seq: Sequence, place: int, tokens: Tokens, index: int) -> bool:
    """Whether the draft at `place` is what was sampled there, and the sequence goes on after it."""
    if index in tokens.failed or place >= len(seq.drafts):
        return False
    token = tokens.token_ids[index][place]
    return token == seq.drafts[place] and token not in seq.stop_ids
