"""Where the decoder belongs to look: which rows of the pictures a word is about.

Training asks two attention heads to look there (guided attention; Liu et al. 2016): one at the words of
a question that name things, one wherever an answer is about to name a thing. Without it a decoder of this size takes
very long to find out that "the star" in a question is to be looked up among the rows: it guesses among what it sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dialogs
import numpy as np
from numpy.typing import NDArray
from scenes import Picture
from words import COLOURS, NUMBERS_ZH, ORDINALS, SHAPES, Thing, plural

TOLD = {"side": 5, "beside": 4, "upright": 4}  # classes; 0 is nothing
NOTHING = np.zeros(0, np.int64)
NAMED, NEXT = 1, 3  # the layers whose first head looks at what is named, and at what is named next


@dataclass(frozen=True, slots=True)
class Seen:
    """What one picture's rows show, and which tokens of the prompt they are."""

    shape: NDArray[np.int64]  # [rows], 1 + the shape's number
    colour: NDArray[np.int64]
    tokens: NDArray[np.int64]
    turn: int


@dataclass(frozen=True, slots=True)
class Look:
    layer: int
    token: int
    rows: NDArray[np.int64]  # tokens to look at
    told: Mapping[str, int] = field(default_factory=dict)  # what else is to be known then, see TOLD


@dataclass(frozen=True, slots=True)
class _Mention:
    start: int  # in the text
    end: int
    colour: int  # 1 + the colour's number; 0 if none is named
    shape: int
    words: tuple[int, ...]  # where each of its words starts


_COLOUR_NUMBERS = {word: 1 + i for i, pair in enumerate(COLOURS.items()) for word in pair}
_SHAPE_NUMBERS = {word: 1 + i for i, pair in enumerate(SHAPES.items()) for word in (*pair, plural(pair[0]))}


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_MENTION = re.compile(rf"(?:({_any(list(_COLOUR_NUMBERS))})(?: |的)?)?({_any(list(_SHAPE_NUMBERS))})"
                      rf"|({_any(list(_COLOUR_NUMBERS))})", re.IGNORECASE)
_SIDE = re.compile("(left|左边)|(right|右边)|(above|上面)|(below|下面)")
_NTH = re.compile(f"({_any(ORDINALS)}) (?:picture|image)|第([{''.join(NUMBERS_ZH[1:4])}])张", re.IGNORECASE)


def _mentions(text: str) -> Iterator[_Mention]:
    for match in _MENTION.finditer(text):
        colour = match[1] or match[3]
        groups = [group for group in (1, 2, 3) if match[group]]
        yield _Mention(match.start(), match.end(), _COLOUR_NUMBERS[colour.lower()] if colour else 0,
                       _SHAPE_NUMBERS[match[2].lower()] if match[2] else 0, tuple(match.start(g) for g in groups))


def _picture_before(text: str, end: int) -> int | None:
    """The number of the picture that the text speaks of at that place, if it says so."""
    found = None
    for match in _NTH.finditer(text, 0, end):
        found = ORDINALS.index(match[1].lower()) if match[1] else NUMBERS_ZH.index(match[2]) - 1
    return found


def looks_of(dialog: dialogs.Dialog, text: str, offsets: Sequence[tuple[int, int]], places: NDArray[np.int64],
             pictures: Sequence[Seen]) -> Iterator[Look]:
    """`offsets`: where each token of the rendered `text` starts and ends in it; `places`: which token of the prompt it
    is, where a picture has as many tokens as rows."""
    starts = np.array([start for start, _ in offsets])
    at = 0
    for number, turn in enumerate(dialog):
        question = text.index(turn.question, at)
        answer = text.index(turn.answer, question + len(turn.question))
        at = answer + len(turn.answer)
        shown = [picture for picture in pictures if picture.turn <= number]
        if turn.skill in ("text", "unknown"):
            continue

        def token_of(char: int) -> int:
            return int(np.searchsorted(starts, char, side="right")) - 1

        asked, named = list(_mentions(turn.question)), list(_mentions(turn.answer))
        about = [_nearest(shown, mention, _picture_before(turn.question, mention.start)) for mention in asked]
        for mention, rows in zip(asked, about, strict=True):
            if len(rows):
                yield Look(NAMED, int(places[token_of(question + mention.end - 1)]), rows)
        if not named:  # yes, no, how many, where: that of what is asked about first
            rows = about[0] if about else _rows(shown, 0, 0, None) if turn.skill == "count" else NOTHING
            if len(rows):
                yield Look(NEXT, int(places[token_of(answer) - 1]), rows, _relation(dialog[: number + 1], asked))
        for mention in named:
            colour, shape = mention.colour, mention.shape
            if not (colour and shape) and len(asked) == 1:
                colour, shape = colour or asked[0].colour, shape or asked[0].shape
            said = _picture_before(turn.answer, mention.start)
            rows = _rows(shown, colour, shape, _picture_before(turn.question, len(turn.question))
                         if said is None else said)
            if len(rows):
                for start in mention.words:
                    yield Look(NEXT, int(places[token_of(answer + start) - 1]), rows)


def _relation(dialog: dialogs.Dialog, asked: Sequence[_Mention]) -> dict[str, int]:
    """Of a question whether one thing is on some side of another: which side, and where the one is."""
    side = _SIDE.search(dialog[-1].question)
    if side is None or len(asked) != 2:
        return {}
    objects = [placed for turn in dialog for medium in turn.media if isinstance(medium, Picture)
               for placed in medium.objects]
    found = [[placed for placed in objects if placed.thing == _thing(mention)] for mention in asked]
    if any(len(some) != 1 for some in found):
        return {}
    (one,), (other,) = found
    return {"side": side.lastindex or 0, "beside": _compared(one.x - other.x),
            "upright": _compared(one.y - other.y)}


def _thing(mention: _Mention) -> Thing | None:
    if not (mention.colour and mention.shape):
        return None
    return Thing(list(COLOURS)[mention.colour - 1], list(SHAPES)[mention.shape - 1])


def _compared(difference: float) -> int:
    return 1 if difference <= -dialogs.NEAR else 3 if difference >= dialogs.NEAR else 2


def _nearest(shown: Sequence[Seen], mention: _Mention, only: int | None) -> NDArray[np.int64]:
    """The rows of what is named; if there is no such thing, of what has its shape, or else its colour."""
    for colour, shape in ((mention.colour, mention.shape), (0, mention.shape), (mention.colour, 0)):
        rows = _rows(shown, colour, shape, only) if colour or shape else NOTHING
        if len(rows):
            return rows
    return NOTHING


def _rows(shown: Sequence[Seen], colour: int, shape: int, only: int | None) -> NDArray[np.int64]:
    pictures = [shown[only]] if only is not None and only < len(shown) else shown
    return np.concatenate([NOTHING, *(
        seen.tokens[(seen.shape > 0) & (seen.colour > 0) & ((seen.colour == colour) | (colour == 0))
                    & ((seen.shape == shape) | (shape == 0))] for seen in pictures)])
