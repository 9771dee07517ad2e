"""What a conversation is made of: turns, with their media, functions and calls, and where they come from."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from functions import Copy
from scenes import Clip, Picture
from sounds import Sound, Speech
from words import Language

Medium = Picture | Clip | Sound


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with the media that come with it, and its answer.

    A question of the role "tool" is what a called function gave back. `given` are the parts of an answer that a
    grammar writes (from, to): they are not learnt. `copies` are those that stand in the question.
    """

    skill: str
    question: str
    answer: str
    media: tuple[Medium, ...] = ()
    role: str = "user"
    tools: tuple[dict[str, Any], ...] = ()
    calls: tuple[dict[str, Any], ...] = ()  # the answer again, as requests have it
    copies: tuple[Copy, ...] = ()
    given: tuple[tuple[int, int], ...] = ()
    schema: dict[str, Any] | None = None  # that the answer fits
    shown: str = ""  # what the chat template puts behind the question


Dialog = list[Turn]


@dataclass(frozen=True, slots=True)
class Source:
    rng: random.Random
    speech: Speech
    chinese: float = 0.25  # share of the questions
    wide: float = 0.0  # share of media beyond the examination's ranges of sizes, ways and lengths
    held: bool = False  # functions, phrases, names and places that only the examination has

    def is_wide(self) -> bool:
        return self.rng.random() < self.wide

    def language(self) -> Language:
        return "zh" if self.rng.random() < self.chinese else "en"


def varied(rng: random.Random, question: str) -> str:
    """As people type: without a capital, without a mark at the end."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.!？。！")
    return question
