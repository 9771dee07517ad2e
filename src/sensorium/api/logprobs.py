"""Log-probabilities in the two forms that OpenAI's endpoints have for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sensorium.prompt.offsets import TextOffsets
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.generation import Choice
from sensorium.types import TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


TokenNames = Callable[[int], tuple[str, bytes]]
"""What a token is called in an answer, and its bytes."""


def token_names(tokenizer: Tokenizer, *, as_ids: bool | None = False) -> TokenNames:
    """By their text; or, since several tokens may have one text, as `token_id:7`."""
    if not as_ids:
        return tokenizer.token_text
    return lambda token_id: (f"token_id:{token_id}", tokenizer.token_text(token_id)[1])


def chat_logprobs(names: TokenNames, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}]}"""
    content = [
        {
            **_entry(names, token.token_id, token.logprob),
            "top_logprobs": [_entry(names, top, value) for top, value in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = names(token_id)
    return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


def prompt_logprobs(tokenizer: Tokenizer, choice: Choice, num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's form: {token id: {logprob, rank, decoded_token}} of each token of a choice's prompt and its `num_top`
    alternatives (-1: all that there are), null for the first. The rank of a token that is none of the likeliest is
    null."""
    return [
        None if token is None else _ranked(tokenizer, int(token_id), _narrowed(token, num_top))
        for token_id, token in zip(choice.prompt.token_ids, choice.prompt_logprobs, strict=False)
    ]


def _narrowed(token: TokenLogprob, num_top: int) -> TokenLogprob:
    return token if num_top < 0 else replace(token, top=token.top[:num_top])


def _ranked(tokenizer: Tokenizer, token_id: int, token: TokenLogprob) -> dict[str, Any]:
    return {
        str(one): {"logprob": max(value, MIN_LOGPROB), "rank": rank, "decoded_token": tokenizer.token_text(one)[0]}
        for one, value, rank in ranks(token_id, token)
    }


def ranks(token_id: int, token: TokenLogprob) -> Iterator[tuple[int, float, int | None]]:
    """(id, log-probability, rank from 1) of a token and its alternatives; it has no rank if it is none of these."""
    places = {top: place + 1 for place, (top, _) in enumerate(token.top)}
    for one, value in {token_id: token.logprob, **dict(token.top)}.items():
        yield one, value, places.get(one)


class CompletionLogprobs:
    """Four parallel lists, with the offsets of tokens in the choice's text: the prompt if echoed, then the answer.

    A token goes out with the first piece of text that it begins in, so that offsets never point beyond the text that
    the client has, whatever a stop string takes back. `num_top` is the request's `logprobs`, `echoed` the characters
    that stand before the model's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_top: int,
        *,
        skip_special_tokens: bool,
        echoed: int,
        names: TokenNames | None = None,
    ) -> None:
        self._names = names or token_names(tokenizer)
        self._num_top = num_top
        self._offsets = TextOffsets(tokenizer, skip_special_tokens=skip_special_tokens, keep_leading_space=True)
        self._echoed = echoed
        self._sent = 0  # characters of the model's
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()

    def piece(self, tokens: Iterable[TokenLogprob], text: str, *, is_last: bool) -> dict[str, Any]:
        """What goes with a new piece of the model's text. `tokens` are those that have come since the last one."""
        self._sent += len(text)
        self._waiting.extend((self._offsets.begin(token.token_id), token) for token in tokens)
        lists = _empty_lists()
        while self._waiting and (is_last or self._waiting[0][0] < self._sent):
            offset, token = self._waiting.popleft()
            self._add(lists, self._echoed + min(offset, self._sent), token.token_id, token)
        return lists

    def prompt(
        self, token_ids: Iterable[int], tokens: Iterable[TokenLogprob | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """The echoed prompt's; its first token has none."""
        lists = _empty_lists()
        for token_id, token, offset in zip(token_ids, tokens, offsets, strict=False):
            self._add(lists, offset, int(token_id), token and _narrowed(token, self._num_top))
        return lists

    def _add(self, lists: dict[str, Any], offset: int, token_id: int, token: TokenLogprob | None) -> None:
        text = self._names(token_id)[0]
        lists["text_offset"].append(offset)
        lists["token_logprobs"].append(None if token is None else max(token.logprob, MIN_LOGPROB))
        lists["tokens"].append(text)
        lists["top_logprobs"].append(None if token is None else self._top(token, text))

    def _top(self, token: TokenLogprob, text: str) -> dict[str, float]:
        top = {self._names(other)[0]: max(value, MIN_LOGPROB) for other, value in token.top}
        top.setdefault(text, max(token.logprob, MIN_LOGPROB))
        return top


def _empty_lists() -> dict[str, Any]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces as one."""
    return {name: first[name] + second[name] for name in first}
