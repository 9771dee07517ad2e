"""Answers in JSON: about pictures and out of texts, asked for in words or written under a grammar."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from functions import KINDS, Copy, made_up
from scenes import Picture
from turns import Source, Turn, varied
from words import Thing, listed, sentence

# What keys of a schema mean, whatever it is about.
SHAPE = ("shape", "form", "kind", "type")
COLOUR = ("color", "colour", "main_color", "shade")
COUNT = ("count", "number", "total", "amount", "n", "how_many", "number_of_objects", "num_shapes", "quantity")
TEXT = ("description", "answer", "text", "caption", "summary", "content", "response", "result", "message")
NAME = ("name", "label", "title", "object")
NOTHING = ("near", "next", "previous", "parent", "other", "error", "extra", "note", "comment", "child")  # that is there
LISTS = ("objects", "items", "things", "elements")
WRAPPERS = ("image", "result", "data", "picture", "output")
IN_WORDS = (
    "Answer in JSON.",
    "Reply in JSON.",
    "Answer as JSON",
    "Give the answer in JSON.",
    "Use JSON.",
    "Return JSON.",
    "Respond with JSON only.",
)


@dataclass
class Writer:
    """Writes JSON and remembers its first brace and the names of its keys, which a grammar would have written.

    All else is learnt, with one space behind colons and commas: a grammar leaves open whether there is any, and a model
    that never chose writes what it likes."""

    text: str = ""
    given: tuple[tuple[int, int], ...] = ((0, 1),)

    def value(self, value: Any) -> None:
        if isinstance(value, dict):
            self._mapping(value)
        elif isinstance(value, list):
            self._sequence(value)
        else:
            self.text += json.dumps(value, ensure_ascii=False)

    def _mapping(self, value: dict[str, Any]) -> None:
        self.text += "{"
        for number, (key, one) in enumerate(value.items()):
            self.text += ', "' if number else '"'
            self.given += ((len(self.text), len(self.text) + len(key)),)
            self.text += f'{key}": '
            self.value(one)
        self.text += "}"

    def _sequence(self, value: Sequence[Any]) -> None:
        self.text += "["
        for number, one in enumerate(value):
            self.text += ", " if number else ""
            self.value(one)
        self.text += "]"


def plain_record(things: Sequence[Thing]) -> dict[str, Any]:
    """What is said of a picture when nobody names keys."""
    if len(set(things)) == 1:
        return {"shape": things[0].shape, "color": things[0].colour, "count": len(things)}
    return {"objects": [{"shape": thing.shape, "color": thing.colour} for thing in things], "count": len(things)}


def json_turn(source: Source, picture: Picture, asks: Sequence[str], *, brings: bool = True) -> Turn:
    """Asked for in words, sometimes with the keys."""
    rng = source.rng
    things = [placed.thing for placed in picture.objects]
    words = rng.choice(IN_WORDS)
    question = rng.choice((f"{rng.choice(list(asks))} {words}", f"{words.rstrip('.')}: {rng.choice(list(asks))}"))
    record = plain_record(things)
    copies: list[Copy] = []
    if rng.random() < (0.35 if source.held else 0.5):
        pairs = [
            _field(rng, things, kind) for kind in rng.sample(("shape", "color", "count", "text"), rng.choice((1, 2, 3)))
        ]
        record = dict(pairs)
        keys = list(record)
        listing = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
        question = f"{rng.choice(list(asks))} {words.rstrip('.')} with the key{'s' * (len(keys) > 1)} {listing}."
    answer = json.dumps(record, ensure_ascii=False)
    if "with the key" in question:
        copies = [Copy(at := answer.index(f'"{key}"') + 1, at + len(key), question.rindex(key)) for key in record]
    return Turn("json", question, answer, (picture,) if brings else (), copies=tuple(copies))


def _field(rng: random.Random, things: Sequence[Thing], kind: str) -> tuple[str, Any]:
    first = things[0]
    whole = sentence(listed(things))
    if kind == "shape":
        return rng.choice((SHAPE[0], rng.choice(SHAPE))), first.shape
    if kind == "color":
        return rng.choice((COLOUR[0], COLOUR[1], rng.choice(COLOUR))), first.colour
    if kind == "count":
        return rng.choice((COUNT[0], rng.choice(COUNT))), len(things)
    if kind == "text":
        return rng.choice(TEXT), whole
    if kind == "name":
        return rng.choice(NAME), f"{first.colour} {first.shape}"
    if kind == "shapes":
        return "shapes", [thing.shape for thing in things]
    if kind == "colors":
        return rng.choice(("colors", "colours")), [thing.colour for thing in things]
    if kind == "names":
        return rng.choice(LISTS), [f"{thing.colour} {thing.shape}" for thing in things]
    if kind == "objects":
        fields = rng.sample((("shape", "shape"), (rng.choice(COLOUR[:2]), "colour")), 2)
        key = rng.choice((*LISTS, "shapes"))
        return key, [{name: getattr(thing, part) for name, part in fields} for thing in things]
    if kind == "flag":
        return rng.choice(("visible", "found", "ok", "has_shapes", made_up(rng))), True
    return made_up(rng), rng.choice((whole, len(things)))


def _nothing(source: Source) -> dict[str, None]:
    """In training sometimes a key that nothing is known of."""
    rng = source.rng
    if source.held or rng.random() > 0.15:
        return {}
    return {rng.choice(NOTHING) if rng.random() < 0.7 else made_up(rng): None}


def schema_of(value: Any) -> dict[str, Any]:
    """A schema that the value fits."""
    if isinstance(value, dict):
        return {
            "type": "object",
            "properties": {key: schema_of(one) for key, one in value.items()},
            "required": list(value),
            "additionalProperties": False,
        }
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])}
    return {"type": {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}[type(value)]}


PICTURE_FIELDS = ("shape", "color", "count", "text", "name", "shapes", "colors", "names", "objects", "flag", "other")
FIELD_WEIGHTS = (4, 4, 3, 3, 1, 2, 2, 1, 3, 0.5, 0.7)


def schema_turn(source: Source, picture: Picture, asks: Sequence[str], *, brings: bool = True) -> Turn:
    """Under a grammar, whose keys the model is not told."""
    rng = source.rng
    things = [placed.thing for placed in picture.objects]
    kinds = dict.fromkeys(rng.choices(PICTURE_FIELDS, FIELD_WEIGHTS, k=rng.choice((1, 2, 2, 3, 4))))
    record: dict[str, Any] = dict(_field(rng, things, kind) for kind in kinds)
    if rng.random() < 0.15:
        record = {rng.choice(WRAPPERS): record}
    if rng.random() < 0.1:
        record = plain_record(things)  # any object
    record |= _nothing(source)
    writer = Writer()
    writer.value(record)
    question = rng.choice(list(asks))
    if rng.random() < 0.3:
        question += " " + rng.choice(IN_WORDS)
    return Turn(
        "schema",
        varied(rng, question),
        writer.text,
        (picture,) if brings else (),
        given=writer.given,
        schema=schema_of(record),
    )


def _age(rng: random.Random, held: bool) -> int:
    return rng.randrange(1, 100)


FACTS: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (  # a text, and by its values the keys that ask for them
    ("{name} is {age} years old.", {"name": ("name", "person", "user"), "age": ("age", "years")}),
    (
        "{name} is {age} years old and lives in {city}.",
        {"name": ("name",), "age": ("age",), "city": ("city", "location")},
    ),
    ("My name is {name} and I am {age}.", {"name": ("name", "user"), "age": ("age",)}),
    ("{name} lives in {city}.", {"name": ("name", "person"), "city": ("city", "place", "town")}),
    (
        "{name} ordered {count} {item}.",
        {"name": ("customer", "name"), "count": ("count", "quantity"), "item": ("item", "product")},
    ),
    ("{name} and {other} meet in {city} on {day}.", {"city": ("city", "place"), "day": ("day", "date")}),
    ("The price of {item} is {count} dollars.", {"item": ("item", "product", "name"), "count": ("price", "amount")}),
    ("Meeting on {day} in {city}", {"day": ("day", "date"), "city": ("city", "location")}),
)
DRAWN: dict[str, Callable[[random.Random, bool], Any]] = {
    "name": KINDS["person"][1],
    "other": KINDS["person"][1],
    "age": _age,
    "city": KINDS["place"][1],
    "count": _age,
    "item": KINDS["word"][1],
    "day": lambda rng, held: rng.choice(("Monday", "Tuesday", "Friday", "Sunday")),
}


def extract_turn(source: Source) -> Turn:
    """Facts out of a text, under a grammar."""
    rng = source.rng
    text, keys = rng.choice(FACTS)
    head = rng.choice(("", "", "Extract: ", "Extract the data: ", "Extract the user: ", "Read this: "))
    question, spans, values = head, {}, {}
    for before, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", text):
        question += before
        if name:
            spans[name], values[name] = len(question), DRAWN[name](rng, source.held)
            question += str(values[name])
    chosen = [name for name in keys if rng.random() < 0.85] or list(keys)[:1]
    if rng.random() < 0.2:
        rng.shuffle(chosen)
    names = {rng.choice(keys[name]): name for name in chosen}
    writer = Writer()
    record = {key: values[name] for key, name in names.items()}
    writer.value(record)
    copies, at = [], 0
    for key, name in names.items():
        at = writer.text.index(f'"{key}"', at) + len(key) + 2
        start = writer.text.index(str(values[name]), at)
        copies.append(Copy(start, start + len(str(values[name])), spans[name]))
    return Turn("extract", question, writer.text, given=writer.given, copies=tuple(copies), schema=schema_of(record))


def answer_turn(source: Source, turn: Turn) -> Turn:
    """A plain answer as the value of a key, under a grammar."""
    writer = Writer()
    key = source.rng.choice(("answer", "text", "response", "content", "message", "result"))
    record = {key: turn.answer, **_nothing(source)}
    writer.value(record)
    return Turn(turn.skill, turn.question, writer.text, given=writer.given, schema=schema_of(record))
