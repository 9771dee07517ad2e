"""The demo model's world in words, English and Chinese: colours, shapes, numbers, capitals and ways of asking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Language = Literal["en", "zh"]


class Thing(NamedTuple):
    """What a drawn object is."""

    colour: str
    shape: str


COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "white": "白色",
}
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "cross": "十字",
    "diamond": "菱形",
}
PLURALS = {"cross": "crosses"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS_ZH = ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九")
ORDINALS = ("first", "second", "third")

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Austria": "Vienna",
    "Switzerland": "Bern",
    "Belgium": "Brussels",
    "the Netherlands": "Amsterdam",
    "Denmark": "Copenhagen",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Croatia": "Zagreb",
    "Serbia": "Belgrade",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Morocco": "Rabat",
    "Nigeria": "Abuja",
    "Ethiopia": "Addis Ababa",
    "China": "Beijing",
    "Japan": "Tokyo",
    "South Korea": "Seoul",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Israel": "Jerusalem",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Colombia": "Bogota",
    "Australia": "Canberra",
    "the United States": "Washington",
}
CAPITALS_ZH = {
    "法国": "巴黎",
    "德国": "柏林",
    "意大利": "罗马",
    "中国": "北京",
    "日本": "东京",
    "英国": "伦敦",
    "俄罗斯": "莫斯科",
    "美国": "华盛顿",
}

UNKNOWN = {"en": "I don't know.", "zh": "我不知道。"}


def a(thing: Thing, language: Language = "en") -> str:
    if language == "zh":
        return f"一个{COLOURS[thing.colour]}的{SHAPES[thing.shape]}"
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def the(thing: Thing, language: Language = "en") -> str:
    if language == "zh":
        return f"{COLOURS[thing.colour]}的{SHAPES[thing.shape]}"
    return f"the {thing.colour} {thing.shape}"


def plural(shape: str) -> str:
    return PLURALS.get(shape, f"{shape}s")


def count_zh(count: int) -> str:
    return "两" if count == 2 else NUMBERS_ZH[count]


def joined(parts: Sequence[str], language: Language = "en") -> str:
    """ "a, b and c" """
    if len(parts) == 1:
        return parts[0]
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return comma.join(parts[:-1]) + last + parts[-1]


def listed(things: Iterable[Thing], language: Language = "en") -> str:
    """Things in their order, equal ones counted: "a red circle and two blue stars"."""
    parts = []
    for thing, count in Counter(things).items():
        if count == 1:
            parts.append(a(thing, language))
        elif language == "zh":
            parts.append(f"{count_zh(count)}个{the(thing, 'zh')}")
        else:
            parts.append(f"{NUMBERS[count]} {thing.colour} {plural(thing.shape)}")
    return joined(parts, language)


def sentence(text: str, language: Language = "en") -> str:
    return text + "。" if language == "zh" else text[0].upper() + text[1:] + "."
