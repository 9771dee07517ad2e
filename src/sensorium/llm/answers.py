"""A generation's deltas -> `RequestOutput`s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress

from sensorium.api.logprobs import ranks
from sensorium.llm.results import CompletionOutput, Logprob, RequestOutput
from sensorium.prompt.formats.base import Delta
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.generation import Choice, Generation, Message
from sensorium.serving.media import MediaTiming
from sensorium.types import TokenLogprob


class Unobserved:
    """Nobody counts."""

    def observe_prompt(self, text_s: float, media: Iterable[MediaTiming] = ()) -> None: ...

    def asked(self, choices: int, max_tokens: int) -> None: ...

    def first_output(self, wait_s: float, queue_s: float, prefill_s: float) -> None: ...

    def generated(self, tokens: int, since_s: float) -> None: ...

    def choice_ended(
        self, reason: str, tokens: int, *, prefill_s: float, decode_s: float, preemptions: int
    ) -> None: ...

    def request_ended(
        self, prompt_tokens: Sequence[int], cached_tokens: int, seconds: float, longest: Sequence[int]
    ) -> None: ...

    def pooled(self, cached_tokens: int, queue_s: float, prefill_s: float) -> None: ...

    def pooling_ended(self, prompt_tokens: Sequence[int], done: int, failure: str, seconds: float) -> None: ...


class _Answer:
    """One choice, as far as it has come."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        self._choice = choice
        self._tokenizer = tokenizer
        self._deltas: list[Delta] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, deltas: Sequence[Delta]) -> None:
        self._deltas += deltas
        self._token_ids += self._choice.take_token_ids()
        self._logprobs += self._choice.take_logprobs()

    def output(self) -> CompletionOutput:
        choice, message = self._choice, Message.of(self._deltas)
        scored = self._logprobs
        return CompletionOutput(
            choice.index,
            message.text,
            list(self._token_ids),
            choice.reason(calls=bool(message.calls)),
            choice.stop_reason,
            [ranked(one, self._tokenizer) for one in scored] or None,
            sum(one.logprob for one in scored) if scored else None,
            message.reasoning,
            message.calls,
        )


class Answers:
    """All choices of one generation. `prompt` is the text that was given, if it was text."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, request_id: str, prompt: str | None) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._request_id = request_id
        self._prompt = prompt
        self._answers = [_Answer(choice, tokenizer) for choice in generation.choices]
        self._changed = asyncio.Event()

    async def whole(self) -> RequestOutput:
        await self._generation.run(self._take)
        return self._output(finished=True)

    async def stream(self) -> AsyncGenerator[RequestOutput, None]:
        """What came between two looks is one output."""
        running = asyncio.ensure_future(self._generation.run(self._take))
        running.add_done_callback(lambda _: self._changed.set())
        try:
            while not running.done():
                await self._changed.wait()
                self._changed.clear()
                if running.done():
                    running.result()
                yield self._output(finished=running.done())
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await running

    async def _take(self, choice: Choice, deltas: Sequence[Delta]) -> None:
        self._answers[choice.index].take(deltas)
        self._changed.set()

    def _output(self, *, finished: bool) -> RequestOutput:
        first = self._generation.choices[0]
        scores = first.prompt_logprobs
        return RequestOutput(
            self._request_id,
            self._prompt,
            first.prompt.token_ids.tolist(),
            [answer.output() for answer in self._answers],
            finished,
            self._generation.cached_tokens,
            [None if one is None else ranked(one, self._tokenizer) for one in scores] or None,
        )


def ranked(token: TokenLogprob, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The chosen token and the alternatives."""
    return {
        one: Logprob(value, rank, tokenizer.token_text(one)[0]) for one, value, rank in ranks(token.token_id, token)
    }
