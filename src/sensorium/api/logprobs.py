"""Log-probabilities in the two forms that OpenAI's endpoints have for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}]}"""
    content = [{**_entry(tokenizer, token.token_id, token.logprob),
                "top_logprobs": [_entry(tokenizer, top, value) for top, value in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = tokenizer.token_text(token_id)
    return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


class CompletionLogprobs:
    """Four parallel lists; offsets go on counting over a stream's pieces. `num_top` is the request's `logprobs`."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def piece(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        return self._lists((token.token_id, token) for token in tokens)

    def prompt(self, token_ids: Iterable[int], tokens: Iterable[TokenLogprob | None]) -> dict[str, Any]:
        """The prompt's; its first token has none."""
        return self._lists(zip(token_ids, tokens, strict=False))

    def _lists(self, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        lists: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, token in tokens:
            text = self._tokenizer.token_text(int(token_id))[0]
            lists["text_offset"].append(self._offset)
            lists["token_logprobs"].append(None if token is None else max(token.logprob, MIN_LOGPROB))
            lists["tokens"].append(text)
            lists["top_logprobs"].append(None if token is None else self._top(token, text))
            self._offset += len(text)
        return lists

    def _top(self, token: TokenLogprob, text: str) -> dict[str, float]:
        top = {self._tokenizer.token_text(other)[0]: max(value, MIN_LOGPROB)
               for other, value in token.top[:self._num_top]}
        top.setdefault(text, max(token.logprob, MIN_LOGPROB))
        return top


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two pieces as one."""
    return {name: first[name] + second[name] for name in first}
