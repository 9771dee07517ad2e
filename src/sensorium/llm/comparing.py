"""Scores of pairs for a Python program: a `Comparer` without a server around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sensorium.errors import RequestError
from sensorium.prompt.encode import Truncation
from sensorium.serving.comparing import Item, Side
from sensorium.serving.model import ServedModel
from sensorium.serving.pooled import Chat, Pooled, Pooling
from sensorium.types import PoolingParams, Prompt

Compared = str | Sequence[Mapping[str, Any]]
"""A text, or a user's content: OpenAI's parts, media as the program has them."""


class _Unlimited:
    def add_prompt_tokens(self, count: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ProgramComparison:
    """`need` raises for what the model does not do."""

    model: ServedModel
    name: str
    pooling: Pooling
    params: PoolingParams
    instruction: str | None
    truncation: Truncation | None
    check: Callable[[str], object]
    frames_texts: bool = True

    def need(self, task: str, *, doing: str) -> None:
        self.check(task)

    @contextmanager
    def admit(self, count: int) -> Iterator[_Unlimited]:
        yield _Unlimited()

    async def run(self, prompts: Sequence[Prompt], params: PoolingParams | Sequence[PoolingParams]) -> Pooled:
        return await self.pooling.run(prompts, params)


def side_of(given: Compared | Sequence[Compared], name: str, chat: Callable[[Any], Chat]) -> Side:
    """`chat` makes a conversation of a user's content."""
    is_one = isinstance(given, str) or (bool(given) and isinstance(given[0], Mapping))
    items: list[Any] = [given] if is_one else list(given)
    if not items or not all(items):
        raise RequestError(f"`{name}` must not be empty.", param=name)
    made = [Item(one) if isinstance(one, str) else Item(_text(one), partial(chat, one)) for one in items]
    return Side(made, name, 0, is_list=not is_one)


def _text(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """Of content without media."""
    if any(part.get("type") != "text" for part in parts):
        return None
    return "".join(str(part.get("text", "")) for part in parts)
