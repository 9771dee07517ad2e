"""Where the decoder belongs to look: which rows of the media a word is about, and what it should know then.

Training asks two attention heads to look there (guided attention; Liu et al. 2016): one at the words of
a question that name things, one wherever an answer is about to name a thing; at all of several things alike, evenly.
Without it a decoder of this size takes very long to find out that "the star" in a question is to be looked up among
the rows: it guesses among what it sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dialogs
import numpy as np
from net import Step
from numpy.typing import NDArray
from scenes import Picture
from words import COLOURS, NUMBERS_ZH, ORDINALS, SHAPES, Thing, plural

# Classes of what a token is to tell; 0 is nothing: the side asked about and where the one thing lies of the other, how
# many things it looks at, which picture they are in, which beep it is or how many there are.
# Of a function's words: whether the question says them, and of a line whether it fits.
TOLD = {"side": 5, "beside": 4, "upright": 4, "count": 4, "nth": 4, "beep": 6, "shared": 3, "fits": 3}
Rows = tuple[NDArray[np.int64], ...]  # of every thing, the tokens that show it
NAMED, NEXT = 1, 3  # the layers whose first head looks at what is named, and at what is named next
COPIED = 5  # the layer whose first head looks at what is copied
NUMBERED = 2  # the layer after which rows know which picture, or which beep, they are of
# Of functions. A name is read before it is copied, so that what is copied can know already whether it fits.
MATCHED = 2  # the layer whose first head looks from a function's words to the same ones in the question
GATHERED = 3  # that looks from the sign behind a function's words at those that were found
SPREAD = 4  # that looks from what may be copied to that sign, and from an answer to the sign of the one that fits
# Words are spelt, so what is alike is told by what stands before it: of dialogs about functions, heads that look back.
STEPS = (Step(0, 3, 1), Step(0, 2, 2), Step(1, 3, 2))
CHOICE = 12.0  # one token that chooses stands beside dozens that may be copied
HEAVY = {MATCHED: 2.0, SPREAD: 3.0, COPIED: 3.0}  # weights of what heads look at, 1 elsewhere


@dataclass(frozen=True, slots=True)
class Seen:
    """What one picture's rows show, and which tokens of the prompt they are."""

    shape: NDArray[np.int64]  # [rows], 1 + the shape's number
    colour: NDArray[np.int64]
    thing: NDArray[np.int64]  # another number for each thing
    tokens: NDArray[np.int64]
    turn: int


@dataclass(frozen=True, slots=True)
class Look:
    layer: int
    token: int
    rows: Rows = ()  # to look at; none: anywhere
    told: Mapping[str, int] = field(default_factory=dict)  # what else is to be known then, see TOLD
    weight: float = 1.0  # beside the others of its layer


@dataclass(frozen=True, slots=True)
class _Mention:
    start: int  # in the text
    end: int
    colour: int  # 1 + the colour's number; 0 if none is named
    shape: int
    count: int  # of which it speaks; 0 if it does not say
    words: tuple[int, ...]  # where each of its words starts, of how many first


_COLOUR_NUMBERS = {word: 1 + i for i, pair in enumerate(COLOURS.items()) for word in pair}
_SHAPE_NUMBERS = {word: 1 + i for i, pair in enumerate(SHAPES.items()) for word in (*pair, plural(pair[0]))}


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_COUNTS = {
    word: count
    for words in (("a", "two", "three"), ("an", "两个", "三个"), ("一个",))
    for count, word in enumerate(words, 1)
}
_MENTION = re.compile(
    rf"(?:(?<![a-z])({_any(list(_COUNTS))}) ?)?(?:(?:({_any(list(_COLOUR_NUMBERS))})(?: |的)?)?"
    rf"({_any(list(_SHAPE_NUMBERS))})|({_any(list(_COLOUR_NUMBERS))}))",
    re.IGNORECASE,
)
_SIDE = re.compile("(left|左边)|(right|右边)|(above|上面)|(below|下面)")
_NTH = re.compile(f"({_any(ORDINALS)}) (?:picture|image)|第([{''.join(NUMBERS_ZH[1:4])}])张", re.IGNORECASE)


def _mentions(text: str) -> Iterator[_Mention]:
    for match in _MENTION.finditer(text):
        colour = match[2] or match[4]
        groups = [group for group in (1, 2, 3, 4) if match[group]]
        yield _Mention(
            match.start(),
            match.end(),
            _COLOUR_NUMBERS[colour.lower()] if colour else 0,
            _SHAPE_NUMBERS[match[3].lower()] if match[3] else 0,
            _COUNTS[match[1].lower()] if match[1] else 0,
            tuple(match.start(g) for g in groups),
        )


def _picture_before(text: str, end: int) -> int | None:
    """The number of the picture that the text speaks of at that place, if it says so."""
    found = None
    for match in _NTH.finditer(text, 0, end):
        found = ORDINALS.index(match[1].lower()) if match[1] else NUMBERS_ZH.index(match[2]) - 1
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the characters of a rendered dialog are among the tokens of its prompt."""

    text: str
    starts: NDArray[np.int64]  # where each token of the text starts in it
    places: NDArray[np.int64]  # which token of the prompt it is: there a medium has as many as rows

    def token(self, char: int) -> int:
        return int(self.places[self._index(char)])

    def char(self, token: int) -> int:
        """Where a token of the prompt starts."""
        return int(self.starts[np.searchsorted(self.places, token)])

    def before(self, char: int) -> int:
        """The token from which that of the character follows."""
        return int(self.places[self._index(char) - 1])

    def tokens(self, start: int, end: int) -> list[int]:
        """Those that start within these characters."""
        first, last = (int(np.searchsorted(self.starts, char, side="left")) for char in (start, end))
        return self.places[first:last].tolist()  # type: ignore[no-any-return]

    def _index(self, char: int) -> int:
        return int(np.searchsorted(self.starts, char, side="right")) - 1

    def turns(self, dialog: dialogs.Dialog) -> Iterator[tuple[int, int, dialogs.Turn]]:
        """Where each turn's question and answer start."""
        at = 0
        for turn in dialog:
            question = self.text.index(turn.question, at)
            head = self.text.index("<|im_start|>assistant\n", question + len(turn.question))
            answer = self.text.index(turn.answer, head)
            at = answer + len(turn.answer)
            yield question, answer, turn


def looks_at_pictures(dialog: dialogs.Dialog, layout: Layout, pictures: Sequence[Seen]) -> Iterator[Look]:
    if len(pictures) > 1:
        for number, picture in enumerate(pictures[:3], 1):
            for token in picture.tokens[picture.thing > 0]:
                yield Look(NUMBERED, int(token), (), {"nth": number})
    for number, (question, answer, turn) in enumerate(layout.turns(dialog)):
        if turn.skill in ("text", "unknown", "mixed"):
            continue
        shown = [picture for picture in pictures if (picture.turn == number if turn.media else picture.turn <= number)]
        asked, named = list(_mentions(turn.question)), list(_mentions(turn.answer))
        about = [_nearest(shown, mention, _picture_before(turn.question, mention.start)) for mention in asked]
        for mention, rows in zip(asked, about, strict=True):
            if rows:
                yield Look(NAMED, layout.token(question + mention.end - 1), rows)
        if turn.skill in ("json", "schema"):
            yield from _looks_of_records(turn.answer, answer, named, shown, layout)
            continue
        if not named:
            # Yes, no, how many, where: that of what is asked about first.
            rows = about[0] if about else _rows(shown, 0, 0, None) if turn.skill == "count" else ()
            if rows:
                told = _relation(dialog[: number + 1], asked)
                if turn.skill == "count":
                    told["count"] = len(rows)
                elif turn.answer.startswith(("The ", "第")):
                    told |= _picture_of(shown, rows)
                yield Look(NEXT, layout.before(answer), rows, told)
        for mention in named:
            colour, shape = mention.colour, mention.shape
            if not (colour and shape) and len(asked) == 1:
                colour, shape = colour or asked[0].colour, shape or asked[0].shape
            said = _picture_before(turn.answer, mention.start)
            rows = _rows(
                shown, colour, shape, _picture_before(turn.question, len(turn.question)) if said is None else said
            )
            if rows:
                told = {"count": mention.count} if mention.count == len(rows) else {}
                for word, start in enumerate(mention.words):
                    yield Look(NEXT, layout.before(answer + start), rows, told if word == 0 else {})


def _looks_of_records(
    text: str, answer: int, named: Sequence[_Mention], shown: Sequence[Seen], layout: Layout
) -> Iterator[Look]:
    """Of JSON: a shape and a colour within the same braces are those of one thing, numbers count all."""
    every = _rows(shown, 0, 0, None)
    for match in re.finditer(r"(?<=[: ])\d(?=[,}])", text):
        if every:
            yield Look(NEXT, layout.before(answer + match.start()), every, {"count": len(every)})
    for mention in named:
        colour, shape = mention.colour, mention.shape
        if not (colour and shape):
            start, end = text.rfind("{", 0, mention.start), text.find("}", mention.end)
            close = [one for one in named if start < one.start < end]
            if len(close) == 2 and sum(bool(one.colour) for one in close) == sum(bool(one.shape) for one in close) == 1:
                colour, shape = max(one.colour for one in close), max(one.shape for one in close)
        rows = _rows(shown, colour, shape, None)
        for start in mention.words:
            if rows:
                yield Look(NEXT, layout.before(answer + start), rows)


def looks_at_copies(dialog: dialogs.Dialog, layout: Layout) -> Iterator[Look]:
    """Whatever an answer copies: each of its tokens looks at the one like it, and what follows at what follows. What
    it does not copy looks at the beginning of all."""
    questions = []
    for question, answer, turn in layout.turns(dialog):
        questions.append(question)
        copied: set[int] = set()
        for copy in turn.copies:
            source = questions[-1 - copy.back] + copy.source
            for token in layout.tokens(answer + copy.start, answer + copy.end + 1):
                start = layout.char(token)
                there = layout.token(source + start - answer - copy.start)
                copied.add(token)
                yield Look(COPIED, token - 1, (np.array([there]),))
        if turn.tools or turn.copies:
            for token in layout.tokens(answer, answer + len(turn.answer)):
                if token not in copied:
                    yield Look(COPIED, token - 1, (np.zeros(1, np.int64),), {}, 0.5)


_WORD = re.compile("[^\\W\\d_]+?(?=[A-Z](?<=[a-z][A-Z])|[\\W\\d_]|$)")
_LITTLE = set("a an the in of for to on is it at by from with and or me my i you please what s".split())


def looks_at_functions(dialog: dialogs.Dialog, layout: Layout) -> Iterator[Look]:
    """From every function's words to the question's, from its line's sign to the words that were found there, from what
    stands behind to the sign, and from the answer to that of the function that fits."""
    for question, answer, turn in layout.turns(dialog):
        if not turn.tools:
            continue
        nothing = layout.text.index("<tools>\n", question + len(turn.question))
        at = nothing + len("<tools>\n")
        none = layout.token(nothing)
        asked = {
            match[0].lower(): question + match.start()
            for match in _WORD.finditer(turn.question)
            if match[0].lower() not in _LITTLE
        }
        called = turn.calls[0]["function"]["name"] if turn.calls else None
        fitting = none
        for tool in turn.tools:
            name = tool["function"]["name"]
            end = layout.text.index("\n", at)
            sign = layout.text.index(f"={name}(", at)
            fits, found = name == called, []
            for match in _WORD.finditer(layout.text, at, sign):
                last = layout.token(match.end() - 1)
                source = _same(match[0].lower(), asked)
                if source is not None:
                    found.append(np.array([last]))
                    yield from _letters(layout, match, source)
                elif not fits and match[0].lower() not in _LITTLE:
                    yield Look(MATCHED, last, (np.array([none]),), {"shared": 1})
            told = {"fits": 1 + fits}
            token = layout.token(sign)
            yield Look(GATHERED, token, tuple(found), told)
            for copied in layout.tokens(sign + 1, end):
                yield Look(SPREAD, copied, (np.array([token]),), told)
            if fits:
                fitting = token
            at = end + 1
        told = {"fits": 1 + (called is not None)}
        yield Look(SPREAD, layout.before(answer), (np.array([fitting]),), told, CHOICE)
        if called is not None:
            start = answer + turn.answer.index(called)
            for token in layout.tokens(start, start + len(called)):
                yield Look(SPREAD, token - 1, (np.array([fitting]),), told, 2.0)


def _same(word: str, asked: Mapping[str, int]) -> range | None:
    """Where the question says the word, of one or of several, or one that it begins with, such as "remind" of a
    reminder."""
    like = (one for one in asked if min(len(one), len(word)) > 4 and (one.startswith(word) or word.startswith(one)))
    found = next((one for one in (word, f"{word}s", word.removesuffix("s"), *like) if one in asked), None)
    return None if found is None else range(asked[found], asked[found] + len(found))


def _letters(layout: Layout, match: re.Match[str], source: range) -> Iterator[Look]:
    """Each letter looks at the same one, the first two aside: nothing tells yet which word it will be."""
    for token in dict.fromkeys(layout.token(char) for char in range(match.start(), match.end())):
        following = layout.char(token + 1)
        last = min(following, match.end()) - 1 - match.start()
        whole = last == len(match[0]) - 1
        if last >= 2 or whole:
            there = layout.token(source[min(last, len(source) - 1)])
            yield Look(MATCHED, token, (np.array([there]),), {"shared": 2} if whole else {})


def looks_at_beeps(dialog: dialogs.Dialog, layout: Layout, beeps: Sequence[int]) -> Iterator[Look]:
    """`beeps`: the tokens at which beeps begin. Each knows which one it is, and the answer looks at the last."""
    for number, token in enumerate(beeps, 1):
        yield Look(NUMBERED, token, (), {"beep": number})
    for _, answer, turn in layout.turns(dialog):
        if turn.skill == "beeps":
            yield Look(NEXT, layout.before(answer), (np.array(beeps[-1:]),), {"beep": len(beeps)})


def _picture_of(shown: Sequence[Seen], rows: Rows) -> dict[str, int]:
    """Which picture the rows are of, if it is one."""
    numbers = {number for number, picture in enumerate(shown[:3], 1) for row in rows if row[0] in picture.tokens}
    return {"nth": numbers.pop()} if len(numbers) == 1 else {}


def _relation(dialog: dialogs.Dialog, asked: Sequence[_Mention]) -> dict[str, int]:
    """Of a question whether one thing is on some side of another: which side, and where the one is."""
    side = _SIDE.search(dialog[-1].question)
    if side is None or len(asked) != 2:
        return {}
    objects = [
        placed for turn in dialog for medium in turn.media if isinstance(medium, Picture) for placed in medium.objects
    ]
    found = [[placed for placed in objects if placed.thing == _thing(mention)] for mention in asked]
    if any(len(some) != 1 for some in found):
        return {}
    (one,), (other,) = found
    return {"side": side.lastindex or 0, "beside": _compared(one.x - other.x), "upright": _compared(one.y - other.y)}


def _thing(mention: _Mention) -> Thing | None:
    if not (mention.colour and mention.shape):
        return None
    return Thing(list(COLOURS)[mention.colour - 1], list(SHAPES)[mention.shape - 1])


def _compared(difference: float) -> int:
    return 1 if difference <= -dialogs.NEAR else 3 if difference >= dialogs.NEAR else 2


def _nearest(shown: Sequence[Seen], mention: _Mention, only: int | None) -> Rows:
    """The rows of what is named; if there is no such thing, of what has its shape, or else its colour."""
    for colour, shape in ((mention.colour, mention.shape), (0, mention.shape), (mention.colour, 0)):
        rows = _rows(shown, colour, shape, only) if colour or shape else ()
        if rows:
            return rows
    return ()


def _rows(shown: Sequence[Seen], colour: int, shape: int, only: int | None) -> Rows:
    """Of all things of that colour and shape; 0: of any."""
    pictures = [shown[only]] if only is not None and only < len(shown) else shown
    out = []
    for seen in pictures:
        fit = (seen.thing > 0) & ((seen.colour == colour) | (colour == 0)) & ((seen.shape == shape) | (shape == 0))
        out += [seen.tokens[fit & (seen.thing == thing)] for thing in np.unique(seen.thing[fit])]
    return tuple(out)
