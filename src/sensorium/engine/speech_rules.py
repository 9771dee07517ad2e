"""What a transcript's tokens keep to (Whisper's rules). They follow from the tokens so far alone, so that neither
preemption nor batch mates change them.

Source: Radford et al. 2022 (Whisper) and the rules of its published decoder; transformers' processors of logits do the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sensorium.types import SpeechRules


def forbidden(rules: SpeechRules, vocab_size: int, *, is_first: bool) -> list[int]:
    """Single tokens that never come, or not as the first one."""
    return [token for token in (*rules.never, *(rules.never_first if is_first else ())) if 0 <= token < vocab_size]


def hold(row: Tensor, rules: SpeechRules, said: Sequence[int]) -> None:
    """Of tokens that are not `forbidden` leave only what may follow `said`, in place. row: float32 [vocab], of which
    nothing is read."""
    first = rules.timestamps
    if first is None or first >= len(row):
        return
    row[first - 1] = -math.inf  # the token that says that there are no timestamps
    lowest = _forbid_by_pairs(row, rules, first, said)
    row[first:lowest] = -math.inf
    if not said:
        row[:first] = -math.inf
        if rules.max_initial is not None:
            row[first + rules.max_initial + 1 :] = -math.inf
    row[:first].masked_fill_(torch.logsumexp(row[first:], dim=0) > row[:first].max(), -math.inf)


def _forbid_by_pairs(row: Tensor, rules: SpeechRules, first: int, said: Sequence[int]) -> int:
    """Timestamps come in pairs, the last may be single. Returns the lowest that may come next."""
    was_time = len(said) > 0 and said[-1] >= first
    was_time_before = len(said) < 2 or said[-2] >= first
    if was_time and was_time_before:
        row[first:] = -math.inf
    elif was_time:
        row[: rules.end] = -math.inf
    latest = next((token for token in reversed(said) if token >= first), None)
    if latest is None:
        return first
    return latest if was_time and not was_time_before else latest + 1
