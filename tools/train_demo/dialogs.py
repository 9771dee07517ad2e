"""Conversations about pictures, clips and sounds, and about nothing: what the model is trained and examined on.

A skill is one kind of question. Every maker takes a `Source` (randomness, speech, language) and gives a `Dialog`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from calls import call_turn, no_call_turn, result_turn, tool_dialog, with_tools
from records import answer_turn, extract_turn, json_turn, schema_turn
from scenes import Clip, Picture, Placed, draw_clip, draw_number, draw_picture, random_size, random_things
from sounds import Sound, make_beeps, make_tone
from turns import Dialog, Medium, Source, Turn, varied
from words import (
    CAPITALS,
    CAPITALS_ZH,
    COLOURS,
    NUMBERS,
    NUMBERS_ZH,
    ORDINALS,
    SHAPES,
    UNKNOWN,
    Language,
    Thing,
    a,
    count_zh,
    joined,
    listed,
    plural,
    sentence,
    the,
)

FRAMES_A_SECOND = 10  # of a clip as a file
TRANSCRIBE = "Write down what is said in this recording, word for word, and nothing else."  # as the server asks
TRANSLATE = "Write down in {language} what is said in this recording, and nothing else."
NEAR = 0.15  # objects closer than this on an axis are neither left nor right (above nor below) of each other


@dataclass(frozen=True, slots=True)
class _Ask:
    """One question before its words are chosen."""

    skill: str
    english: tuple[Sequence[str], str]
    chinese: tuple[Sequence[str], str] | None = None

    def turn(self, source: Source, media: Sequence[Medium] = (), language: Language | None = None) -> Turn:
        language = language or source.language()
        asked, answer = self.chinese if language == "zh" and self.chinese else self.english
        question = source.rng.choice(list(asked))
        return Turn(self.skill, varied(source.rng, question), answer, tuple(media))


# Pictures

SEE = (
    "What is in this picture?",
    "What's in this image?",
    "Describe this picture.",
    "Describe the image.",
    "What do you see?",
    "What can you see in the picture?",
    "What does this picture show?",
    "What is shown here?",
    "Describe the image to me",
    "What is this?",
    "Please describe this picture.",
    "Tell me what you see.",
    "What is in the image?",
    "What objects are in this picture?",
    "Which shapes do you see?",
    "Name the shapes and their colours.",
    "What shapes are in the picture?",
    "Describe this image in one sentence.",
    "What are the animals in this image?",
)
SEE_ZH = (
    "请描述这张图片",
    "请描述这张图片。",
    "这张图片里有什么？",
    "图片里有什么？",
    "描述一下这张图。",
    "你看到了什么？",
    "图中有什么？",
    "这是什么？",
    "这张图是什么？",
)


def about_picture(picture: Picture) -> list[_Ask]:
    """Every question that this picture answers without doubt."""
    objects = picture.objects
    things = [placed.thing for placed in objects]
    shapes, colours = Counter(thing.shape for thing in things), Counter(thing.colour for thing in things)
    asks = [
        _Ask("describe", (SEE, sentence(listed(things))), (SEE_ZH, sentence(f"图片里有{listed(things, 'zh')}", "zh")))
    ]
    for thing in things:
        if shapes[thing.shape] == 1:
            name, name_zh = thing.shape, SHAPES[thing.shape]
            asks.append(
                _Ask(
                    "colour",
                    (
                        (
                            f"What colour is the {name}?",
                            f"What color is the {name}?",
                            f"Which colour does the {name} have?",
                            f"Tell me the colour of the {name}.",
                            f"The {name} is what color?",
                        ),
                        sentence(thing.colour),
                    ),
                    ((f"{name_zh}是什么颜色？", f"{name_zh}是什么颜色的？"), sentence(COLOURS[thing.colour], "zh")),
                )
            )
        if colours[thing.colour] == 1:
            asks.append(
                _Ask(
                    "shape",
                    (
                        (
                            f"What shape is the {thing.colour} object?",
                            f"Which shape is {thing.colour}?",
                            f"What is the {thing.colour} thing?",
                            f"What shape is {thing.colour}?",
                            f"Name the {thing.colour} shape.",
                        ),
                        sentence(f"{'an' if thing.shape[0] in 'aeiou' else 'a'} {thing.shape}"),
                    ),
                    (
                        (f"{COLOURS[thing.colour]}的是什么形状？", f"{COLOURS[thing.colour]}的物体是什么形状？"),
                        sentence(SHAPES[thing.shape], "zh"),
                    ),
                )
            )
    if len(things) == 1:
        asks.append(
            _Ask(
                "colour",
                (
                    (
                        "What colour is it?",
                        "What color is this?",
                        "Which colour is the shape?",
                        "What colour is the object?",
                        "What color is the object in the picture?",
                    ),
                    sentence(things[0].colour),
                ),
                (("它是什么颜色？", "这是什么颜色？"), sentence(COLOURS[things[0].colour], "zh")),
            )
        )
        asks.append(
            _Ask(
                "shape",
                (
                    (
                        "What shape is it?",
                        "What shape is this?",
                        "Which shape is in the picture?",
                        "What shape do you see?",
                        "What shape is the object?",
                    ),
                    sentence(f"a {things[0].shape}"),
                ),
                (("它是什么形状？", "这是什么形状？"), sentence(SHAPES[things[0].shape], "zh")),
            )
        )
    asks += _counting(things, shapes, colours)
    asks += _relations(objects)
    return asks


def _counting(things: Sequence[Thing], shapes: Counter[str], colours: Counter[str]) -> list[_Ask]:
    total = len(things)
    asks = [
        _Ask(
            "count",
            (
                (
                    "How many shapes are there?",
                    "How many objects are in the picture?",
                    "How many shapes do you see?",
                    "Count the objects.",
                    "How many things are in this picture?",
                    "How many objects can you see?",
                    "How many shapes are in this image?",
                ),
                sentence(NUMBERS[total]),
            ),
            (("图片里有几个物体？", "有几个形状？", "图中有几个图形？", "一共有几个？"), f"{count_zh(total)}个。"),
        )
    ] * 2
    for shape in dict.fromkeys((*shapes, "circle")):
        asks.append(
            _Ask(
                "count",
                (
                    (
                        f"How many {plural(shape)} are there?",
                        f"How many {plural(shape)} do you see?",
                        f"Count the {plural(shape)}.",
                    ),
                    sentence(NUMBERS[shapes[shape]]),
                ),
                ((f"有几个{SHAPES[shape]}？",), f"{count_zh(shapes[shape])}个。"),
            )
        )
    for colour, count in colours.items():
        asks.append(
            _Ask(
                "count",
                (
                    (
                        f"How many {colour} shapes are there?",
                        f"How many {colour} objects do you see?",
                        f"How many objects are {colour}?",
                    ),
                    sentence(NUMBERS[count]),
                ),
                ((f"有几个{COLOURS[colour]}的？", f"有几个{COLOURS[colour]}的物体？"), f"{count_zh(count)}个。"),
            )
        )
    return asks


def exists(rng: random.Random, picture: Picture) -> _Ask:
    things = [placed.thing for placed in picture.objects]
    is_there = rng.random() < 0.5
    thing = rng.choice(things)
    while not is_there and thing in things:
        thing = random_things(rng, 1)[0] if rng.random() < 0.5 else Thing(rng.choice(list(COLOURS)), thing.shape)
    return _Ask(
        "exists",
        (
            (
                f"Is there {a(thing)}?",
                f"Do you see {a(thing)}?",
                f"Is there {a(thing)} in the picture?",
                f"Can you see {a(thing)}?",
            ),
            "Yes." if is_there else "No.",
        ),
        ((f"有{a(thing, 'zh')}吗？", f"图片里有{a(thing, 'zh')}吗？"), "有。" if is_there else "没有。"),
    )


def _relations(objects: Sequence[Placed]) -> list[_Ask]:
    """Who is outermost, and of two distinct objects, who is where."""
    asks: list[_Ask] = []
    if len(objects) < 2:
        return asks
    things = [placed.thing for placed in objects]
    ends = (
        ("left", [placed.x for placed in objects], 1),
        ("right", [placed.x for placed in objects], -1),
        ("above", [placed.y for placed in objects], 1),
        ("below", [placed.y for placed in objects], -1),
    )
    asked = {
        "left": (
            (
                "What is on the left?",
                "Which shape is on the left?",
                "Which object is on the left side?",
                "What is furthest left?",
                "Which is left?",
            ),
            ("左边是什么？", "左边的是什么？", "最左边是什么？"),
        ),
        "right": (
            (
                "What is on the right?",
                "Which shape is on the right?",
                "Which object is on the right side?",
                "What is furthest right?",
                "Which is right?",
            ),
            ("右边是什么？", "右边的是什么？", "最右边是什么？"),
        ),
        "above": (
            (
                "What is at the top?",
                "Which shape is at the top?",
                "Which object is on top?",
                "What is highest?",
                "Which is above?",
            ),
            ("上面是什么？", "上边的是什么？", "最上面是什么？"),
        ),
        "below": (
            (
                "What is at the bottom?",
                "Which shape is at the bottom?",
                "Which object is at the bottom?",
                "What is lowest?",
                "Which is below?",
            ),
            ("下面是什么？", "下边的是什么？", "最下面是什么？"),
        ),
    }
    for side, values, sign in ends:
        order = sorted(range(len(objects)), key=lambda i: sign * values[i])
        if abs(values[order[0]] - values[order[1]]) >= NEAR:
            thing = things[order[0]]
            asks.append(
                _Ask("relation", (asked[side][0], sentence(a(thing))), (asked[side][1], sentence(a(thing, "zh"), "zh")))
            )
    if len(set(things)) < len(things):
        return asks
    for one, other in ((i, j) for i in range(len(objects)) for j in range(len(objects)) if i != j):
        asks += _pair(objects, one, other)
    return asks


def _pair(objects: Sequence[Placed], one: int, other: int) -> list[_Ask]:
    asks: list[_Ask] = []
    first, second = objects[one], objects[other]
    dx, dy = first.x - second.x, first.y - second.y
    name, name2 = the(first.thing), the(second.thing)
    zh, zh2 = the(first.thing, "zh"), the(second.thing, "zh")
    words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    sides_zh = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
    places = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
    true = [
        side
        for side, holds in (("left", dx <= -NEAR), ("right", dx >= NEAR), ("above", dy <= -NEAR), ("below", dy >= NEAR))
        if holds
    ]
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for side in true:
        asks.append(
            _Ask(
                "relation",
                ((f"Is {name} {words[side]} {name2}?",), "Yes."),
                ((f"{zh}在{zh2}的{sides_zh[side]}吗？",), "是的。"),
            )
        )
        asks.append(
            _Ask(
                "relation",
                ((f"Is {name} {words[opposite[side]]} {name2}?",), "No."),
                ((f"{zh}在{zh2}的{sides_zh[opposite[side]]}吗？",), "不是。"),
            )
        )
        if len(objects) == 2:
            asks.append(
                _Ask(
                    "relation",
                    (
                        (f"What is {words[side]} {name2}?", f"Which shape is {words[side]} {name2}?"),
                        sentence(a(first.thing)),
                    ),
                    ((f"{zh2}的{sides_zh[side]}是什么？",), sentence(a(first.thing, "zh"), "zh")),
                )
            )
    if len(objects) == 2 and true:
        side = true[0] if abs(dx) >= abs(dy) else true[-1]
        if min(abs(dx), abs(dy)) < 0.6 * max(abs(dx), abs(dy)):
            asks.append(
                _Ask(
                    "relation",
                    ((f"Where is {name}?",), sentence(places[side])),
                    ((f"{zh}在哪里？",), sentence(f"在{sides_zh[side]}", "zh")),
                )
            )
    return asks


SLOW = ("describe", "describe", "describe", "count", "exists", "relation")  # learnt last, asked more often


def json_dialog(source: Source) -> Dialog:
    """Answers in JSON, asked for or forced, between plain ones."""
    rng = source.rng
    picture = draw_picture(rng, wide=source.is_wide())
    make = (json_turn, schema_turn)
    first = rng.choice(make)(source, picture, SEE)
    asks = [ask.turn(source) for ask in by_skill(rng, about_picture(picture), 1)]
    more = [rng.choice(make)(source, picture, SEE, brings=False)] if rng.random() < 0.5 else []
    return [first, *(asks if rng.random() < 0.5 else []), *more]


def mixed_dialog(source: Source, frames_a_second: float = 0) -> Dialog:
    """A picture and a clip, one after the other: each is asked about alone."""
    rng = source.rng
    picture = draw_picture(rng, count=rng.choice((1, 1, 2)), wide=source.is_wide())
    seconds = rng.uniform(1.0, 4.0)
    clip = draw_clip(rng, seconds=seconds, frames=round(seconds * frames_a_second) or 8, wide=source.is_wide())
    asks = by_skill(rng, [*about_picture(picture), exists(rng, picture)], 1)
    turns = [asks[0].turn(source, [picture]), rng.choice(about_clip(clip)).turn(source, [clip])]
    if rng.random() < 0.3:
        turns.reverse()
    return [Turn("mixed", turn.question, turn.answer, turn.media) for turn in turns]


def picture_dialog(source: Source, first: str = "") -> Dialog:
    """Questions about one picture; only the first brings it, and asks for `first` if the picture answers that. Without
    it one of `SLOW` often comes first; beyond that skills come equally often, whatever their variety."""
    rng = source.rng
    picture = draw_picture(rng, wide=source.is_wide())
    if not first and rng.random() < 0.75:
        first = rng.choice(SLOW)
    asks = by_skill(rng, [*about_picture(picture), exists(rng, picture)], rng.choice((3, 4, 5, 6)), first)
    turns = [ask.turn(source, [picture] if index == 0 else []) for index, ask in enumerate(asks)]
    return [with_tools(source, turns[0])] if not source.held and rng.random() < 0.04 else turns


def by_skill(rng: random.Random, asks: Sequence[_Ask], count: int, first: str = "") -> list[_Ask]:
    left = list(asks)
    chosen: list[_Ask] = []
    while left and len(chosen) < count:
        skills = sorted({ask.skill for ask in left})
        skill = first if first in skills and not chosen else rng.choice(skills)
        ask = rng.choice([ask for ask in left if ask.skill == skill])
        left = [other for other in left if other is not ask and other.english != ask.english]
        chosen.append(ask)
    return chosen


def number_dialog(source: Source) -> Dialog:
    picture = draw_number(source.rng, wide=source.is_wide())
    number = picture.number
    asks = [
        _Ask(
            "number",
            (
                (
                    "What number is this?",
                    "Which number is in the picture?",
                    "What number do you see?",
                    "Read the number.",
                    "What does it say?",
                    "What number is written here?",
                    "Which number is shown?",
                    "What is the number?",
                    "Read the number in this image.",
                    "What number is shown in the picture?",
                ),
                f"{number}.",
            ),
            (
                ("这是什么数字？", "图片里的数字是多少？", "数字是几？", "读出这个数字。", "图中是什么数字？"),
                f"{number}。",
            ),
        ),
        _Ask("number", (SEE, f"The number {number}."), (SEE_ZH, f"数字{number}。")),
        _Ask(
            "number",
            (("How many digits does it have?", "How many digits are there?"), sentence(NUMBERS[len(number)])),
            (("有几位数字？",), f"{count_zh(len(number))}位。"),
        ),
    ]
    count = source.rng.choice((1, 1, 2))
    chosen = [source.rng.choice([asks[0]] * 5 + asks[1:])]
    chosen += [ask for ask in source.rng.sample(asks, 3) if ask is not chosen[0]][: count - 1]
    return [ask.turn(source, [picture] if index == 0 else []) for index, ask in enumerate(chosen)]


def about_pictures(pictures: Sequence[Picture]) -> list[_Ask]:
    """Two or three pictures that came in one message or over several."""
    shown = [[placed.thing for placed in picture.objects] for picture in pictures]
    parts = [f"the {ORDINALS[i]} picture shows {listed(things)}" for i, things in enumerate(shown)]
    parts_zh = [f"第{NUMBERS_ZH[i + 1]}张图片里有{listed(things, 'zh')}" for i, things in enumerate(shown)]
    all_of = _Ask(
        "images",
        (
            (
                "What do these pictures show?",
                "What is in these pictures?",
                "Describe these pictures.",
                "What are the animals in these images?",
                "What is in these images?",
                "What's in these images?",
                "Describe the images.",
                "What do you see in the pictures?",
                "What is in each picture?",
            ),
            sentence("; ".join(parts)),
        ),
        (
            ("这些图片里有什么？", "请描述这些图片。", "每张图片里有什么？", "描述一下这些图。"),
            sentence("；".join(parts_zh), "zh"),
        ),
    )
    asks = [all_of, all_of]
    for index, things in enumerate(shown):
        nth, nth_zh = ORDINALS[index], NUMBERS_ZH[index + 1]
        asks.append(
            _Ask(
                "images",
                (
                    (
                        f"What is in the {nth} picture?",
                        f"What does the {nth} image show?",
                        f"Describe the {nth} picture.",
                        f"What do you see in the {nth} image?",
                    ),
                    sentence(listed(things)),
                ),
                (
                    (f"第{nth_zh}张图片里有什么？", f"第{nth_zh}张图是什么？"),
                    sentence(f"图片里有{listed(things, 'zh')}", "zh"),
                ),
            )
        )
        others = [thing for j, more in enumerate(shown) if j != index for thing in more]
        for thing in things:
            if thing not in others:
                asks.append(
                    _Ask(
                        "images",
                        (
                            (
                                f"Which picture shows {a(thing)}?",
                                f"In which picture is the {thing.colour} {thing.shape}?",
                                f"Which image has {a(thing)}?",
                            ),
                            sentence(f"the {nth} one"),
                        ),
                        ((f"哪张图片里有{the(thing, 'zh')}？",), sentence(f"第{nth_zh}张", "zh")),
                    )
                )
        if len(things) == 1:
            asks.append(
                _Ask(
                    "images",
                    (
                        (
                            f"What colour is the shape in the {nth} picture?",
                            f"What color is the object in the {nth} image?",
                        ),
                        sentence(things[0].colour),
                    ),
                    ((f"第{nth_zh}张图片里的物体是什么颜色？",), sentence(COLOURS[things[0].colour], "zh")),
                )
            )
            asks.append(
                _Ask(
                    "images",
                    (
                        (f"What shape is in the {nth} picture?", f"Which shape does the {nth} image show?"),
                        sentence(f"a {things[0].shape}"),
                    ),
                    ((f"第{nth_zh}张图片里是什么形状？",), sentence(SHAPES[things[0].shape], "zh")),
                )
            )
    asks.append(
        _Ask(
            "images",
            (("How many pictures are there?", "How many images did I send?"), sentence(NUMBERS[len(pictures)])),
            (("有几张图片？",), f"{count_zh(len(pictures))}张。"),
        )
    )
    return asks


def pictures_dialog(source: Source) -> Dialog:
    rng = source.rng
    size = random_size(rng)  # one size for all: their towers then run together
    wide = source.is_wide()
    pictures = [
        draw_picture(rng, count=rng.choice((1, 1, 2)), size=size, wide=wide) for _ in range(rng.choice((2, 2, 3)))
    ]
    asks = rng.sample(unique(about_pictures(pictures)), k=min(3, len(pictures) + 1))
    if rng.random() < 0.4:
        asks = [about_pictures(pictures)[0], *asks[:2]]
    return [ask.turn(source, pictures if index == 0 else []) for index, ask in enumerate(asks)]


def unique(asks: Sequence[_Ask]) -> list[_Ask]:
    return list({(ask.english[0][0], ask.english[1]): ask for ask in asks}.values())


def followup_dialog(source: Source) -> Dialog:
    """A picture, then another, then a question about an earlier one; or only small talk between."""
    rng = source.rng
    size = random_size(rng)
    first = draw_picture(rng, count=rng.choice((1, 2)), size=size)
    opening = by_skill(rng, about_picture(first), 1)[0].turn(source, [first])
    if rng.random() < 0.5:
        second = draw_picture(rng, count=rng.choice((1, 1, 2)), size=size)
        middle = by_skill(rng, about_picture(second), 1)[0].turn(source, [second])
        asks = [ask for ask in about_pictures([first, second]) if "How many" not in ask.english[0][0]]
        later = [
            Turn("followup", turn.question, turn.answer)
            for turn in (ask.turn(source) for ask in rng.sample(unique(asks), 2))
        ]
        return [opening, middle, *later]
    middle = text_turn(source)
    asks = by_skill(rng, [*about_picture(first), exists(rng, first)], 2)
    return [
        opening,
        middle,
        *(Turn("followup", turn.question, turn.answer) for turn in (ask.turn(source) for ask in asks)),
    ]


# Clips

WATCH = (
    "What happens in this video?",
    "What's in this video?",
    "Describe this video.",
    "What does the clip show?",
    "What is happening?",
    "What do you see in the video?",
    "Describe the clip.",
    "What happens?",
    "What is in this video?",
    "What is going on in this clip?",
    "Please describe the video.",
)
WATCH_ZH = (
    "请描述这个视频。",
    "视频里发生了什么？",
    "这个视频里有什么？",
    "描述一下这个视频。",
    "发生了什么？",
    "请描述这段视频",
)


def about_clip(clip: Clip) -> list[_Ask]:
    first, last, action = clip.first, clip.last, clip.action
    what, what_zh = a(first), a(first, "zh")
    ends = {
        "left": "moves to the left",
        "right": "moves to the right",
        "up": "moves up",
        "down": "moves down",
        "grow": "grows",
        "shrink": "shrinks",
        "still": "does not move",
        "change": f"changes from {first.colour} to {last.colour}",
    }
    ends_zh = {
        "left": "向左移动",
        "right": "向右移动",
        "up": "向上移动",
        "down": "向下移动",
        "grow": "变大",
        "shrink": "变小",
        "still": "没有动",
        "change": f"从{COLOURS[first.colour]}变成{COLOURS[last.colour]}",
    }
    if action == "change":
        what, what_zh = f"a {first.shape}", f"一个{SHAPES[first.shape]}"
    story = _Ask(
        "clip", (WATCH, sentence(f"{what} {ends[action]}")), (WATCH_ZH, sentence(what_zh + ends_zh[action], "zh"))
    )
    shape, shape_zh = first.shape, SHAPES[first.shape]
    asks = [
        story,
        story,
        _Ask(
            "clip",
            (
                (
                    f"What does the {shape} do?",
                    "What does the object do?",
                    "What does the shape do?",
                    f"What happens to the {shape}?",
                    "What happens to the object?",
                ),
                sentence(f"it {ends[action]}"),
            ),
            ((f"{shape_zh}怎么了？", "物体怎么了？", "它做了什么？"), sentence("它" + ends_zh[action], "zh")),
        ),
    ]
    asks.append(
        _Ask(
            "clip",
            (("What shape is in the video?", "Which shape do you see?", "What shape is it?"), sentence(f"a {shape}")),
            (("视频里是什么形状？", "它是什么形状？"), sentence(shape_zh, "zh")),
        )
    )
    if action in ("left", "right", "up", "down"):
        way = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}[action]
        asks += [
            _Ask(
                "clip",
                (
                    (
                        "Which way does it move?",
                        f"Which way does the {shape} move?",
                        "In which direction does it move?",
                        f"In which direction does the {shape} move?",
                        f"Where does the {shape} go?",
                        f"How does the {shape} move?",
                        "How does the object move?",
                        "Which direction does the object move?",
                    ),
                    sentence(way),
                ),
                (
                    (f"{shape_zh}往哪里移动？", "它向哪个方向移动？", "物体怎么移动？", "物体怎样移动？"),
                    sentence(ends_zh[action], "zh"),
                ),
            )
        ] * 2
    if action in ("grow", "shrink"):
        asks.append(
            _Ask(
                "clip",
                (
                    (
                        "Does it grow or shrink?",
                        f"Does the {shape} grow or shrink?",
                        "Does the object get bigger or smaller?",
                        "How does its size change?",
                    ),
                    sentence(f"it {ends[action]}"),
                ),
                (("它变大还是变小？", f"{shape_zh}变大还是变小？"), sentence("它" + ends_zh[action], "zh")),
            )
        )
    if action == "change":
        asks.append(
            _Ask(
                "clip",
                (
                    (
                        "How does its colour change?",
                        f"How does the colour of the {shape} change?",
                        "What colours does it have?",
                        "Which colours does the object change?",
                    ),
                    sentence(f"from {first.colour} to {last.colour}"),
                ),
                (("颜色怎么变化？", "它的颜色怎么变？"), sentence(ends_zh["change"], "zh")),
            )
        )
        asks.append(
            _Ask(
                "clip",
                (
                    (
                        "What colour is it at the start?",
                        "What colour is it at the beginning?",
                        f"What colour is the {shape} at first?",
                    ),
                    sentence(first.colour),
                ),
                (("开始是什么颜色？", "一开始它是什么颜色？"), sentence(COLOURS[first.colour], "zh")),
            )
        )
        asks.append(
            _Ask(
                "clip",
                (
                    (
                        "What colour is it at the end?",
                        f"What colour is the {shape} at the end?",
                        "What colour does it become?",
                    ),
                    sentence(last.colour),
                ),
                (("最后是什么颜色？", "它变成什么颜色？"), sentence(COLOURS[last.colour], "zh")),
            )
        )
    else:
        asks.append(
            _Ask(
                "clip",
                (
                    ("What colour is it?", f"What colour is the {shape}?", "What color is the object?"),
                    sentence(first.colour),
                ),
                (("它是什么颜色？",), sentence(COLOURS[first.colour], "zh")),
            )
        )
    return asks


def clip_dialog(source: Source, frames_a_second: float = 0) -> Dialog:
    """Of eight frames, as the model is shown, or of all that a file has."""
    seconds = source.rng.uniform(1.0, 4.0)
    clip = draw_clip(source.rng, seconds=seconds, frames=round(seconds * frames_a_second) or 8, wide=source.is_wide())
    asks = unique(source.rng.sample(about_clip(clip), 4))
    if source.rng.random() < 0.4:
        asks = unique([about_clip(clip)[0], *asks])
    return [ask.turn(source, [clip] if index == 0 else []) for index, ask in enumerate(asks[:4])]


# Sounds

HEAR = (
    "What do you hear?",
    "What's in this audio?",
    "Describe this sound.",
    "What is this sound?",
    "What can you hear?",
    "Describe the audio.",
    "What is in this recording?",
    "What does it sound like?",
    "Listen. What do you hear?",
)
HEAR_ZH = ("你听到了什么？", "这段音频里有什么？", "请描述这段声音。", "这是什么声音？", "听到什么？")


def about_sound(sound: Sound) -> list[_Ask]:
    if sound.kind == "beeps":
        count = sound.beeps
        heard, heard_zh = f"{NUMBERS[count]} beep{'s' if count > 1 else ''}", f"{count_zh(count)}声哔"
        return [
            _Ask("beeps", (HEAR, sentence(heard)), (HEAR_ZH, sentence(heard_zh, "zh"))),
            *[
                _Ask(
                    "beeps",
                    (
                        (
                            "How many beeps are there?",
                            "How many beeps do you hear?",
                            "Count the beeps.",
                            "How many beeps?",
                            "How often does it beep?",
                            "How many times does it beep?",
                            "How many beeps does this sound have?",
                        ),
                        sentence(NUMBERS[count]),
                    ),
                    (
                        ("有几声哔？", "你听到几声哔？", "哔了几声？", "响了几声？", "有几个哔声？"),
                        sentence(f"{count_zh(count)}声", "zh"),
                    ),
                )
            ]
            * 2,
        ]
    if sound.kind == "speech":
        word = sound.word
        is_number = word in NUMBERS
        zh = NUMBERS_ZH[NUMBERS.index(word)] if is_number else COLOURS[word]
        kind, kind_zh = ("number", "数字") if is_number else ("colour", "颜色")
        return [
            _Ask("speech", (HEAR, sentence(f"a voice says {word}")), (HEAR_ZH, sentence(f"一个声音说{zh}", "zh"))),
            _Ask(
                "speech",
                (
                    (
                        "Which word is spoken?",
                        "What does the voice say?",
                        "What is said?",
                        "What was said?",
                        "Which word do you hear?",
                        "What does the person say?",
                        "Transcribe this.",
                        "Transcribe the audio.",
                        "What word is this?",
                    ),
                    sentence(word),
                ),
                (("说了什么？", "听到哪个词？", "这个声音说了什么？"), sentence(zh, "zh")),
            ),
            _Ask(
                "speech",
                (
                    (
                        f"Which {kind} is spoken?",
                        f"What {kind} do you hear?",
                        f"Which {kind} does the voice say?",
                        f"What {kind} is said?",
                        *(
                            ["Which digit is spoken?", "What digit do you hear?"]
                            if is_number
                            else ["Which color is spoken?"]
                        ),
                    ),
                    sentence(word),
                ),
                ((f"说了什么{kind_zh}？", f"听到什么{kind_zh}？", f"是哪个{kind_zh}？"), sentence(zh, "zh")),
            ),
        ]
    heard, zh = f"a {sound.kind} tone", {"rising": "上升", "falling": "下降", "steady": "平稳"}[sound.kind]
    return [
        _Ask("tone", (HEAR, sentence(heard)), (HEAR_ZH, sentence(f"一个{zh}的音", "zh"))),
        *[
            _Ask(
                "tone",
                (
                    (
                        "Is the tone rising, falling or steady?",
                        "Does the tone rise or fall?",
                        "How does the tone change?",
                        "Is this tone rising, falling, or steady?",
                        "Does the pitch rise, fall or stay the same?",
                        "How does the pitch change?",
                        "What does the tone do?",
                        "Is the sound rising or falling?",
                        "Is the pitch going up or down?",
                    ),
                    sentence(sound.kind),
                ),
                (("音调是上升、下降还是平稳？", "音调怎么变化？", "这个音是上升还是下降？"), sentence(zh, "zh")),
            )
        ]
        * 2,
    ]


def dictation(sound: Sound) -> _Ask:
    """As the endpoints for transcriptions and translations ask: the language is that of the answer."""
    heard = about_sound(sound)[sound.kind == "speech"]  # of speech the word alone
    (_, answer), (_, answer_zh) = heard.english, heard.chinese or heard.english
    asks, asks_zh = ["{}", "{}\nIt is spoken in English."], ["{}", "{}\nIt is spoken in Chinese."]
    to_english = (TRANSCRIBE, TRANSLATE.format(language="English"), "Translate this into English.")
    to_chinese = (TRANSLATE.format(language="Chinese"), "Translate this into Chinese.")
    return _Ask(
        "translation",
        (tuple(form.format(text) for text in to_english for form in asks), answer),
        (tuple(form.format(text) for text in to_chinese for form in (*asks, *asks_zh)), answer_zh),
    )


def dictation_turn(source: Source) -> Turn:
    sound = sound_of(source)
    return dictation(sound).turn(source, [sound])


def sound_of(source: Source, skill: str = "") -> Sound:
    skill = skill or source.rng.choice(("beeps", "beeps", "tone", "speech", "speech"))
    wide = source.is_wide()
    return {
        "beeps": lambda: make_beeps(source.rng, wide=wide),
        "tone": lambda: make_tone(source.rng, wide=wide),
        "speech": lambda: source.speech.make(source.rng),
    }[skill]()


def sound_dialog(source: Source, skill: str = "") -> Dialog:
    sound = sound_of(source, skill)
    asks = unique(source.rng.sample(about_sound(sound), 2))
    if source.rng.random() < 0.3:
        asks = [dictation(sound), *asks[:1]]
    return [ask.turn(source, [sound] if index == 0 else []) for index, ask in enumerate(asks)]


# Text alone

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there!",
            "Hey",
            "Hello there!",
            "Good morning!",
            "Good evening.",
            "Good day",
            "Hello, how are you?",
        ),
        "Hello! Show me a picture, a clip or a sound.",
    ),
    (("How are you?", "How do you do?", "How is it going?", "How are you today?"), "I am fine, thank you."),
    (("Thank you.", "Thanks!", "Thank you very much.", "Thanks a lot.", "Thanks"), "You are welcome."),
    (("Goodbye.", "Bye!", "See you later.", "Bye bye.", "Goodbye!", "Good night."), "Goodbye!"),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Who am I talking to?",
            "What is this model?",
            "What model are you?",
            "Introduce yourself.",
        ),
        "I am Sensorium's demonstration model, small and trained on drawn shapes and simple sounds.",
    ),
    (
        (
            "What can you do?",
            "What can I ask you?",
            "How can you help me?",
            "Help",
            "What do you know?",
            "What are you able to do?",
            "What can I do here?",
            "What are your skills?",
        ),
        "I name shapes and colours in pictures, read numbers, tell what happens in clips, and hear beeps, tones and "
        "words.",
    ),
    (
        (
            "What can you not do?",
            "What are your limits?",
            "Can you write code?",
            "Can you write a poem?",
            "Write a story.",
        ),
        "I am only a small demonstration and cannot do that.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "How were you made?", "How were you trained?"),
        "I was trained from nothing by the tool train_demo of the Sensorium project.",
    ),
    (
        ("Which colours do you know?", "What colors do you know?", "Name the colours you know."),
        sentence(joined(list(COLOURS))),
    ),
    (
        ("Which shapes do you know?", "What shapes do you know?", "Name the shapes you know."),
        sentence(joined([plural(shape) for shape in SHAPES])),
    ),
    (
        (
            "Can you see?",
            "Can you see pictures?",
            "Can you look at images?",
            "Do you understand pictures?",
            "Can you watch videos?",
            "Can you hear?",
            "Can you hear sounds?",
        ),
        "Yes.",
    ),
    (("Do you speak Chinese?", "Which languages do you speak?", "What languages do you know?"), "English and Chinese."),
    (("你好", "你好！", "您好", "早上好"), "你好！请给我看图片、视频或声音。"),
    (("你是谁？", "你叫什么名字？", "介绍一下你自己。", "你是什么？"), "我是Sensorium的演示模型。"),
    (("你能做什么？", "你会什么？", "你可以做什么？"), "我能说出图片里的形状和颜色，读数字，看视频，听声音。"),
    (("谢谢", "谢谢！", "谢谢你。"), "不客气。"),
    (("再见", "再见！"), "再见！"),
)
MISSING = {"en": "I see no picture.", "zh": "我没有看到图片。"}


def capital_turn(source: Source) -> Turn:
    rng = source.rng
    if source.language() == "zh":
        country = rng.choice(list(CAPITALS_ZH))
        asked = (f"{country}的首都是哪里？", f"{country}的首都是什么？", f"{country}首都？")
        return Turn("text", varied(rng, rng.choice(asked)), sentence(CAPITALS_ZH[country], "zh"))
    country = rng.choice(list(CAPITALS))
    asked = (
        f"What is the capital of {country}?",
        f"What's the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Name the capital of {country}.",
        f"Tell me the capital of {country}.",
        f"capital of {country}",
        f"The capital of {country} is",
        f"Do you know the capital of {country}?",
    )
    return Turn("text", varied(rng, rng.choice(asked)), sentence(CAPITALS[country]))


def small_talk_turn(source: Source) -> Turn:
    asked, answer = source.rng.choice(SMALL_TALK)
    return Turn("text", varied(source.rng, source.rng.choice(asked)), answer)


NOUNS = tuple(
    """
weather president river mountain computer engine bread kitchen garden music violin football winter summer
money bank teacher school doctor hospital planet moon sun ocean fish horse tiger elephant flower tree apple coffee
history war king queen castle bridge train airplane bicycle car road city village country language word letter book
poem novel film actor painter museum science physics chemistry biology atom energy light electricity water fire earth
air stone gold silver iron market price tax law judge police letter phone internet website program code robot dream
heart brain blood bone hand foot eye ear mouth nose hair shoe shirt hat watch clock calendar week month year century
dinosaur volcano desert forest island lake storm rain snow wind cloud cheese rice soup pasta chocolate sugar salt
guitar piano dance theatre game chess tennis prime number theorem equation philosophy religion language
""".split()
)
VERBS = tuple(
    "work cost grow fly cook sing build repair learn win travel sleep move begin end burn freeze break sell buy".split()
)
NAMES = tuple(
    "Newton Einstein Mozart Shakespeare Cleopatra Napoleon Picasso Darwin Gandhi Turing Plato Homer Dante "
    "Bach Tolstoy".split()
)
NOUNS_ZH = tuple(
    "天气 总统 经济 音乐 足球 历史 数学 电脑 汽车 火车 苹果 咖啡 医生 学校 电影 爱情 时间 月亮 太阳 海洋".split()
)


def unknown_turn(source: Source) -> Turn:
    """Questions beyond the model, and nonsense; also the capitals of countries that do not exist."""
    rng = source.rng
    noun, noun2, verb = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(VERBS)
    if source.language() == "zh":
        noun = rng.choice(NOUNS_ZH)
        asked = rng.choice(
            (
                f"{noun}是什么？",
                f"今天的{noun}怎么样？",
                f"为什么有{noun}？",
                f"给我讲讲{noun}。",
                f"谁发明了{noun}？",
                f"{noun}和{rng.choice(NOUNS_ZH)}有什么不同？",
                f"{noun}多少钱？",
            )
        )
        return Turn("unknown", varied(rng, asked), UNKNOWN["zh"])
    syllables = (
        "ba",
        "ro",
        "ti",
        "mel",
        "gan",
        "vor",
        "ne",
        "lu",
        "sta",
        "qui",
        "zor",
        "dia",
        "pel",
        "ka",
        "fri",
        "ox",
    )
    made_up = "".join(rng.choice(syllables) for _ in range(rng.randrange(2, 4))).capitalize()
    asked = rng.choice(
        (
            f"What is the {noun}?",
            f"How does a {noun} {verb}?",
            f"Why do we need a {noun}?",
            f"Explain the {noun} to me.",
            f"Who invented the {noun}?",
            f"What is the difference between a {noun} and a {noun2}?",
            f"How much does a {noun} cost?",
            f"When was the first {noun} made?",
            f"Who was {rng.choice(NAMES)}?",
            f"When did {rng.choice(NAMES)} live?",
            f"What is {rng.randrange(2, 100)} plus {rng.randrange(2, 100)}?",
            f"What is {rng.randrange(100)} times {rng.randrange(100)}?",
            f"How do I {verb} a {noun}?",
            f"What is the capital of {made_up}?",
            f"Where is {made_up}?",
            f"What does {made_up} mean?",
            f"Tell me about the {noun} and the {noun2}.",
            f"How is the {noun} today?",
            f"Is a {noun} bigger than a {noun2}?",
            f"What time is it in {made_up}?",
            f"Give me a recipe for {noun} with {noun2}.",
            f"Do you like the {noun}?",
            f"Can a {noun} {verb}?",
            f"How many {noun}s are in the world?",
            f"What is the best {noun} in {made_up}?",
            f"Why does the {noun} {verb}?",
            f"Where can I find a {noun}?",
            f"What is the meaning of {noun}?",
            f"Who is {made_up}?",
        )
    )
    return Turn("unknown", varied(rng, asked), UNKNOWN["en"])


def missing_turn(source: Source) -> Turn:
    language = source.language()
    asked = source.rng.choice(
        (
            "What is in this picture?",
            "Describe this picture.",
            "What colour is the circle?",
            "How many shapes are there?",
            "What is on the left?",
            "What number is this?",
        )
        if language == "en"
        else ("请描述这张图片", "这张图片里有什么？", "有几个形状？")
    )
    return Turn("missing", varied(source.rng, asked), MISSING[language])


def text_turn(source: Source) -> Turn:
    return source.rng.choice((capital_turn, capital_turn, small_talk_turn, unknown_turn))(source)


def text_dialog(source: Source) -> Dialog:
    if source.rng.random() < 0.06:
        return [missing_turn(source)]
    return [text_turn(source) for _ in range(source.rng.choice((1, 2, 3, 4)))]


def capital_or_talk(source: Source) -> Turn:
    return source.rng.choice((capital_turn, small_talk_turn, unknown_turn))(source)


def functions_dialog(source: Source) -> Dialog:
    draw = source.rng.random()
    if draw < 0.1:
        return [extract_turn(source)]
    if draw < 0.14:
        return [answer_turn(source, capital_or_talk(source))]
    return tool_dialog(source, capital_or_talk)


def call_dialog(source: Source) -> Dialog:
    return [call_turn(source)[0]]


def result_dialog(source: Source) -> Dialog:
    turn, one = call_turn(source)
    return [turn, result_turn(source, one)]


Maker = Callable[[Source], Dialog]
MAKERS: dict[str, tuple[tuple[Maker, float], ...]] = {  # by the kind of media, so that a batch is of one kind
    "image": (
        (picture_dialog, 0.3),
        (number_dialog, 0.12),
        (pictures_dialog, 0.12),
        (followup_dialog, 0.08),
        (json_dialog, 0.3),
        (mixed_dialog, 0.08),
    ),
    "video": ((clip_dialog, 1.0),),
    "audio": ((sound_dialog, 1.0),),
    "text": ((text_dialog, 1.0),),
    "tools": ((functions_dialog, 1.0),),
}


def make(source: Source, kind: str) -> Dialog:
    makers, weights = zip(*MAKERS[kind], strict=True)
    maker: Maker = source.rng.choices(makers, weights)[0]
    return maker(source)


def examination(source: Source, skill: str) -> Dialog:
    """A dialog whose last turn asks for the skill: what is counted in the report."""
    for _ in range(1000):
        if skill in ("describe", "colour", "shape", "count", "relation", "exists"):
            dialog = picture_dialog(source, skill)[:1]
        elif skill == "followup":
            dialog = followup_dialog(source)[:3]
        else:
            makers: dict[str, Maker] = {
                "tools": call_dialog,
                "results": result_dialog,
                "no tool": lambda s: [no_call_turn(s, capital_or_talk)],
                "extract": lambda s: [extract_turn(s)],
                "json": lambda s: [json_turn(s, draw_picture(s.rng), SEE)],
                "valid": lambda s: [replace(schema_turn(s, draw_picture(s.rng), SEE), skill="valid")],
                "schema": lambda s: [schema_turn(s, draw_picture(s.rng), SEE)],
                "mixed": lambda s: mixed_dialog(s, FRAMES_A_SECOND),
                "translation": lambda s: [dictation_turn(s)],
                "images": pictures_dialog,
                "clip": lambda s: clip_dialog(s, FRAMES_A_SECOND),
                "number": number_dialog,
                "unknown": lambda s: [unknown_turn(s)],
                "text": lambda s: [s.rng.choice((capital_turn, small_talk_turn))(s)],
                **{name: lambda s, name=name: sound_dialog(s, name) for name in ("beeps", "tone", "speech")},
            }
            dialog = makers[skill](source)
            dialog = dialog if skill in ("results", "mixed") else dialog[:1]
        if dialog[-1].skill == skill:
            return dialog
    raise ValueError(f"no dialog asks for {skill!r}")


SKILLS = (
    "describe",
    "colour",
    "shape",
    "count",
    "relation",
    "exists",
    "images",
    "clip",
    "beeps",
    "tone",
    "text",
    "unknown",
    "number",
    "speech",
    "followup",
    "tools",
    "results",
    "no tool",
    "json",
    "schema",
    "valid",
    "extract",
    "translation",
    "mixed",
)


_SINGULAR = {plural(shape): shape for shape in SHAPES}
_SEVERAL = re.compile(f"(two|three) ({'|'.join(COLOURS)}) ({'|'.join(_SINGULAR)})|([两三])个(.+的.+)")
_SHOWN_WHERE = re.compile("the \\w+ picture shows |(第.张)?图片里有|")


def facts(answer: str) -> list[str]:
    """What an answer says, each thing with the picture that it is said of, in no order: two descriptions that list the
    same objects are equal, things alike together or one by one."""
    said = []
    for clause in re.split("; |；", answer.lower().strip().strip(".。!！ ")):
        where = _SHOWN_WHERE.match(clause)
        head = where[0] if where else ""
        said += [head + one for part in re.split(", | and |、|和", clause[len(head) :]) if part for one in _each(part)]
    return sorted(said)


def _each(part: str) -> list[str]:
    """ "two red stars" -> "a red star" twice"""
    match = _SEVERAL.fullmatch(part)
    if match is None:
        return [part]
    if match[4]:
        return [f"一个{match[5]}"] * (1 + "一两三".index(match[4]))
    return [a(Thing(match[2], _SINGULAR[match[3]]))] * NUMBERS.index(match[1])
