"""Dialogs in which functions can be called: a call, what to say with its result, and questions that none is for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from functions import Asked, Copy, Function, asked, block, made_up
from turns import Dialog, Source, Turn, varied

WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy", "warm", "cold", "dry", "wet")
KEYS = ("price", "result", "status", "total", "answer", "value", "time", "date", "name", "score", "number", "distance")


def call_turn(source: Source) -> tuple[Turn, Asked]:
    rng = source.rng
    one = asked(rng, source.held, lambda question: _typed(rng, question))
    written = {"name": one.function.name, "arguments": json.dumps(one.arguments, ensure_ascii=False)}
    call = {"id": "call_0", "type": "function", "function": written}
    tools = tuple(function.tool for function in one.functions)
    return Turn(
        "tools", one.question, one.answer, tools=tools, calls=(call,), copies=one.copies, shown=block(one.functions)
    ), one


def _typed(rng: random.Random, question: str) -> str:
    """`varied`, but a name that comes first keeps its capital."""
    return varied(rng, question) if question.split(" ", maxsplit=1)[0].istitle() or question[0].islower() else question


def result_turn(source: Source, one: Asked) -> Turn:
    """What the function gave back, and the sentence for it."""
    rng = source.rng
    cities = [name for name, slot in one.function.slots.items() if slot.kind == "place" and name in one.arguments]
    if len(cities) == 1 and (rng.random() < 0.3 or any("eather" in text for text in _said(one.function))):
        return _weather(rng, one, cities[0])
    draw = rng.random()
    if draw < 0.25:  # a sentence already
        said = rng.choice(("It is", "There are", "Done:", "Sent to", "You have", "The answer is", "Booked for"))
        result = f"{said} {_something(rng)} {_something(rng)}."
        return Turn("results", result, result, role="tool", copies=(Copy(0, len(result), 0),))
    if draw < 0.5:
        result, head = _something(rng), "The result is "
        answer = f"{head}{result}."
        return Turn("results", result, answer, role="tool", copies=(Copy(len(head), len(answer) - 1, 0),))
    return _record(rng)


def _said(function: Function) -> tuple[str, str]:
    return function.name, function.about


def _weather(rng: random.Random, one: Asked, city: str) -> Turn:
    """ "It is sunny, 21 degrees in Paris." """
    sky = rng.choice(WEATHER) if rng.random() < 0.7 else made_up(rng)
    degrees = str(rng.randrange(-15, 41))
    place = str(one.arguments[city])
    keys = (rng.choice(("condition", "weather", "sky", "conditions")), rng.choice(("temperature", "temp", "degrees")))
    values = {keys[0]: sky, keys[1]: int(degrees)}
    if rng.random() < 0.5:
        values = dict(reversed(values.items()))
    if rng.random() < 0.3:
        values = {rng.choice(("city", "location")): place, **values}
    forms = (f"{sky}, {degrees} degrees", f"{sky}, {degrees}°C", f"{degrees} degrees, {sky}", f"{sky} {degrees}")
    result = json.dumps(values, ensure_ascii=False) if rng.random() < 0.6 else rng.choice(forms)
    answer = f"It is {sky}, {degrees} degrees in {place}."
    at = answer.index(degrees, 6 + len(sky))
    copies = [
        Copy(6, 6 + len(sky), result.index(sky)),
        Copy(at, at + len(degrees), result.index(degrees)),
        Copy(len(answer) - 1 - len(place), len(answer) - 1, one.spans[city][0], 1),
    ]
    return Turn("results", result, answer, role="tool", copies=tuple(copies))


def _record(rng: random.Random) -> Turn:
    """ "The price is 12 and the status is open." """
    keys = rng.sample(KEYS, rng.choice((1, 1, 1, 2, 2, 3)))
    if rng.random() < 0.3:
        keys[0] = made_up(rng)
    result, answer, copies = "{", "", []
    for number, key in enumerate(keys):
        value = _something(rng)
        answer += (" and the " if number == len(keys) - 1 else ", the ") if number else "The "
        result += ', "' if number else '"'
        copies.append(Copy(len(answer), len(answer) + len(key), len(result)))
        mark = "" if value.replace(".", "").isdigit() else '"'
        result, answer = f'{result}{key}": {mark}', f"{answer}{key} is "
        copies.append(Copy(len(answer), len(answer) + len(value), len(result)))
        result, answer = result + value + mark, answer + value
    return Turn("results", result + "}", answer + ".", role="tool", copies=tuple(copies))


def _something(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.4:
        return str(rng.randrange(1, rng.choice((10, 100, 1000, 10_000))))
    if draw < 0.5:
        return f"{rng.uniform(0, 300):.2f}"
    if draw < 0.6:
        return f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    word = made_up(rng)
    if draw < 0.7:
        return f"{word} {made_up(rng)}"
    return word if draw < 0.85 else word.capitalize()


def with_tools(source: Source, turn: Turn) -> Turn:
    """The turn with functions that are of no use to it."""
    one = asked(source.rng, source.held, lambda question: question)
    return Turn(turn.skill, turn.question, turn.answer, turn.media, tools=tuple(f.tool for f in one.functions))


def no_call_turn(source: Source, other: Callable[[Source], Turn]) -> Turn:
    """Small talk or a question beyond the model beside functions, or one whose function is not there."""
    rng = source.rng
    if rng.random() < 0.6:
        turn = with_tools(source, other(source))
        return Turn("no tool", turn.question, turn.answer, tools=turn.tools)
    one = asked(rng, source.held, lambda question: varied(rng, question))
    left = tuple(function.tool for function in one.functions if function is not one.function)
    return Turn("no tool", one.question, "I don't know.", tools=left)


def tool_dialog(source: Source, other: Callable[[Source], Turn]) -> Dialog:
    """Mostly a call; some go on with its result, some follow another turn."""
    rng = source.rng
    before = [other(source)] if rng.random() < 0.1 else []
    draw = rng.random()
    if draw < 0.04:
        return [*before, no_call_turn(source, other)]
    turn, one = call_turn(source)
    if draw < 0.18:
        return [*before, turn, result_turn(source, one)]
    return [*before, turn]
