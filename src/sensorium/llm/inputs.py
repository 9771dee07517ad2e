"""The forms in which a program gives prompts and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from sensorium.errors import RequestError
from sensorium.llm.media import source_of
from sensorium.media.source import MediaSource
from sensorium.types import Modality

Chat = Sequence[Mapping[str, Any]]
PromptInput = str | Sequence[int] | Mapping[str, Any]
"""Text in which special tokens are tokens, token ids, or {"prompt": text, "multi_modal_data": {"image": ...}} or
{"prompt_token_ids": [...]}. The text has the model's placeholders where media belong."""
PooledInput = str | Sequence[int] | Chat
"""Text, token ids or a chat."""
Compared = str | Sequence[Mapping[str, Any]]
"""A text, or a user's content: OpenAI's parts, media as the program has them."""


def is_chat(given: Any) -> TypeGuard[Chat]:
    return bool(given) and isinstance(given[0], Mapping)


def many(inputs: Sequence[PooledInput] | PooledInput) -> list[PooledInput]:
    """One input or a list of them, as a list: a text, token ids and a chat are one."""
    one: Any = inputs
    if isinstance(one, str) or is_chat(one) or (one and isinstance(one[0], int)):
        return [one]
    return list(one)


def many_chats(messages: Chat | Sequence[Chat]) -> list[Chat]:
    given: Any = messages
    return [given] if is_chat(given) else list(given)


def many_prompts(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    given: Any = prompts
    is_one = isinstance(given, str | Mapping) or (given and isinstance(given[0], int))
    return [given] if is_one else list(given)


def parts_of(prompt: PromptInput) -> tuple[str | list[int], list[MediaSource]]:
    """A prompt's text or ids, and its media."""
    if isinstance(prompt, str):
        return prompt, []
    if not isinstance(prompt, Mapping):
        return list(prompt), []
    ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
    data = prompt.get("multi_modal_data") or {}
    if (ids is None) == (text is None) or (ids is not None and data):
        raise RequestError("A prompt has either `prompt_token_ids`, or `prompt` with its media.", param="prompt")
    media = [
        source_of(kind, item, f"multi_modal_data.{kind}[{index}]")
        for kind, given in _by_kind(data)
        for index, item in enumerate(given if isinstance(given, list) else [given])
    ]
    return (str(text) if ids is None else list(ids)), media


def _by_kind(data: Mapping[str, Any]) -> list[tuple[Modality, Any]]:
    kinds: tuple[Modality, ...] = ("image", "video", "audio")
    for name in data:
        if name not in kinds:
            raise RequestError("`multi_modal_data` has image, video and audio.", param=f"multi_modal_data.{name}")
    return [(kind, data[kind]) for kind in kinds if kind in data]
