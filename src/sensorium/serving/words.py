"""When each word of a transcript is said: the path through the attention of the heads that follow the recording.

Sources: dynamic time warping (Sakoe and Chiba 1978) over Whisper's cross-attention, with the words and the times that
transformers' recogniser gives: a token ends where the path moves on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
OPENING = "\"'“¡¿([{-"
CLOSING = "\"'.。,，!！?？:：”)]}、"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
BROKEN = "\ufffd"

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    start_s: float
    end_s: float


def token_ends(weights: NDArray[np.float32], row_s: float) -> list[float]:
    """Attention [tokens, rows] -> when each token is over, in seconds: the row where the path comes to it."""
    path = _path(-weights.astype(np.float64))
    return [row * row_s for row in path]


def _path(cost: NDArray[np.float64]) -> list[int]:
    """Of the cheapest monotonous path through cost [tokens, rows], the first row of each token.

    Computed by anti-diagonals, whose cells do not depend on each other. Where ways cost the same, the path stays with
    its token.
    """
    tokens, rows = cost.shape
    total = np.full((tokens + 1, rows + 1), np.inf)
    total[0, 0] = 0
    step = np.full((tokens + 1, rows + 1), 2, np.int8)  # from: 0 both before, 1 the token before, 2 the row before
    for diagonal in range(2, tokens + rows + 1):
        i = np.arange(max(1, diagonal - rows), min(tokens, diagonal - 1) + 1)
        j = diagonal - i
        both, token, row = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        chosen = np.where((both < token) & (both < row), 0, np.where((token < both) & (token < row), 1, 2))
        step[i, j] = chosen
        total[i, j] = cost[i - 1, j - 1] + np.choose(chosen, (both, token, row))
    first = [0] * tokens
    i, j = tokens, rows
    while i > 0 and j > 0:
        first[i - 1] = int(j) - 1
        i, j = i - (step[i, j] != 2), j - (step[i, j] != 1)
    return first


def words_of(
    ids: Sequence[int], times: Sequence[tuple[float, float]], decode: Decode, *, spaced: bool, first_control: int
) -> list[Word]:
    """Text tokens with (start, end) of each, in seconds -> words. `spaced`: the language has spaces between them."""
    groups = _characters(list(ids), decode)
    if spaced:
        groups = _by_spaces(groups, ids, first_control)
    _join_punctuation(groups)
    return [Word(text, times[places[0]][0], times[places[-1]][1]) for text, places in groups if text]


Group = tuple[str, list[int]]
"""(text, places of its tokens)"""


def _characters(ids: list[int], decode: Decode) -> list[Group]:
    """The fewest tokens that are whole characters together."""
    whole, groups = decode(ids), list[Group]()
    start = offset = 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        at = offset + text.find(BROKEN)
        if BROKEN not in text or at >= len(whole) or whole[at] == BROKEN:
            groups.append((text, list(range(start, end))))
            start, offset = end, offset + len(text)
    return groups


def _by_spaces(groups: list[Group], ids: Sequence[int], first_control: int) -> list[Group]:
    words: list[Group] = []
    for text, places in groups:
        is_control = ids[places[0]] >= first_control
        if not words or is_control or text.startswith(" ") or text.strip() in PUNCTUATION:
            words.append((text, places))
        else:
            words[-1] = (words[-1][0] + text, words[-1][1] + places)
    return words


def _join_punctuation(words: list[Group]) -> None:
    """Opening marks belong to the word after them, closing ones to that before, in place; what is joined is empty."""
    after = len(words) - 1
    for place in range(len(words) - 2, -1, -1):
        text, places = words[place]
        if text.startswith(" ") and text.strip() in OPENING:
            words[after] = (text + words[after][0], places + words[after][1])
            words[place] = ("", [])
        else:
            after = place
    before = 0
    for place in range(1, len(words)):
        text, places = words[place]
        if not words[before][0].endswith(" ") and text in CLOSING:
            words[before] = (words[before][0] + text, words[before][1] + places)
            words[place] = ("", [])
        else:
            before = place
