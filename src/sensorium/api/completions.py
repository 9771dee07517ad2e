"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from sensorium.api.context import Context, Entry
from sensorium.api.generated import Work, answer_generated, new_ids, prompt_ids, text_of, usage_object
from sensorium.api.guards.admission import PendingBody
from sensorium.api.logprobs import CompletionLogprobs, joined, prompt_logprobs, token_names
from sensorium.api.protocol.completion import DEFAULT_MAX_TOKENS, CompletionRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.frames import StreamHead, completion_frames
from sensorium.api.transport.sse import EventStream
from sensorium.prompt.formats.base import Delta
from sensorium.prompt.offsets import prompt_offsets
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.generation import Choice, Generation, GenerationRequest
from sensorium.types import Prompt


async def completions(context: Context, call: Call) -> None:
    async def read(pending: PendingBody) -> _Completion:
        request = await read_request(call, CompletionRequest, context.limits, context.unknown, pending)
        request.check(context.limits)
        return _Completion(request)

    await answer_generated(context, call, read)


class _Completion:
    """One request of this endpoint."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request

    @property
    def model_name(self) -> str | None:
        return self._request.model

    @property
    def num_sequences(self) -> int:
        return len(self._request.prompts) * self._request.choices

    async def prepare(self, work: Work) -> GenerationRequest:
        request, model = self._request, work.entry.model
        grammar = await model.grammars.held(request.form(), work.call.turn)
        start_s = time.perf_counter()
        special = request.add_special_tokens is not False
        truncation = model.truncation(
            request.truncate_prompt_tokens, request.truncation_side, completion=request.length or DEFAULT_MAX_TOKENS
        )
        prompts = [
            await model.prompts.text_prompt(
                prompt, add_special_tokens=special, truncation=truncation, tenant=work.call.turn
            )
            for prompt in request.prompts
        ]
        work.entry.metrics.observe_prompt(time.perf_counter() - start_s)
        defaults = model.defaults
        params = [replace(request.sampling(defaults, len(prompt.token_ids)), grammar=grammar) for prompt in prompts]
        asked = tuple(zip(prompts, params, strict=True))
        return request.generation(asked, work.salt(request.cache_salt), continues=True)

    async def answer(self, work: Work, generation: Generation) -> None:
        request, entry = self._request, work.entry
        head = StreamHead(work.call.answer_id("cmpl-"), int(time.time()), request.model or entry.name)
        echoes = await _echoes(entry, request, [prompt for prompt, _ in generation.request.prompts])
        writers = [
            _ChoiceWriter(entry, request, choice, echoes[choice.index // request.choices])
            for choice in generation.choices
        ]
        if request.stream:
            await _stream(work, request, generation, head, writers)
            return
        messages = await generation.collect()
        body = {
            "id": head.id,
            "object": "text_completion",
            "created": head.created,
            "model": head.model,
            "choices": [writer.whole(message.text) for writer, message in zip(writers, messages, strict=True)],
            "usage": _usage(request, generation),
            "system_fingerprint": None,
        }
        await work.call.respond(msgspec.json.encode(body))


@dataclass(frozen=True, slots=True)
class _Echo:
    """The text before the answers to a prompt; with log-probabilities, also where its tokens begin in it."""

    text: str = ""
    offsets: Sequence[int] = ()


async def _echoes(entry: Entry, request: CompletionRequest, prompts: Sequence[Prompt]) -> list[_Echo]:
    """Of each prompt, if `echo` asks for it."""
    if not request.echo:
        return [_Echo()] * len(prompts)
    return [
        await asyncio.to_thread(
            _echo,
            entry.model.tokenizer,
            given if isinstance(given, str) and request.truncate_prompt_tokens is None else None,
            prompt.token_ids.tolist(),
            has_offsets=request.logprobs is not None,
        )
        for given, prompt in zip(request.prompts, prompts, strict=True)
    ]


def _echo(tokenizer: Tokenizer, text: str | None, token_ids: list[int], *, has_offsets: bool) -> _Echo:
    """Of a prompt that came as text, or as ids."""
    if text is None:
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return _Echo(text, prompt_offsets(tokenizer, token_ids, text) if has_offsets else ())


def _usage(request: CompletionRequest, generation: Generation) -> dict[str, Any]:
    return usage_object(generation.usage(), generates=request.generates)


class _ChoiceWriter:
    """One choice's pieces: the echoed prompt once, then what the model adds, with log-probabilities in step."""

    def __init__(self, entry: Entry, request: CompletionRequest, choice: Choice, echo: _Echo) -> None:
        self._choice = choice
        self._request = request
        self._generates = request.generates
        self._ids_due = True
        self._echo = echo
        self._echo_due = bool(request.echo)
        self._tokenizer = entry.model.tokenizer
        self._num_scores = request.prompt_logprobs  # alternatives to each token of the prompt
        self._logprobs: CompletionLogprobs | None = None
        if request.logprobs is not None:
            self._logprobs = CompletionLogprobs(
                entry.model.tokenizer,
                request.logprobs,
                skip_special_tokens=not request.keeps_special_tokens,
                echoed=len(echo.text),
                names=token_names(entry.model.tokenizer, as_ids=request.return_tokens_as_token_ids),
            )

    def piece(self, text: str) -> tuple[str, dict[str, Any] | None]:
        """What to send for new text."""
        tokens = self._choice.take_logprobs()
        if not self._generates:  # the engine always makes one token; nobody asked for it
            text, tokens = "", []
        lists = self._logprobs
        own = lists.piece(tokens, text, is_last=self._choice.finish_reason is not None) if lists is not None else None
        if not self._echo_due:
            return text, own
        self._echo_due = False
        if lists is not None and own is not None:
            own = joined(
                lists.prompt(self._choice.prompt.token_ids, self._choice.prompt_logprobs, self._echo.offsets), own
            )
        return self._echo.text + text, own

    def whole(self, text: str) -> dict[str, Any]:
        text, logprobs = self.piece(text)
        return {
            "index": self._choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self._choice.stop_reason,
            "prompt_logprobs": None
            if self._num_scores is None
            else prompt_logprobs(self._tokenizer, self._choice, self._num_scores),
            **self.ids(),
        }

    def ids(self) -> dict[str, Any]:
        """Those of new tokens, if they are wanted; with the first, the prompt's."""
        is_first, self._ids_due = self._ids_due, False
        prompt = prompt_ids(self._choice, self._request) if is_first else {}
        return prompt | new_ids(self._choice, self._request)

    @property
    def finish_reason(self) -> str | None:
        return self._choice.finish_reason if self._generates or self._choice.finish_reason is None else "length"

    @property
    def due(self) -> bool:
        """Is there something to say even without new text?"""
        return self._echo_due


async def _stream(
    work: Work, request: CompletionRequest, generation: Generation, head: StreamHead, writers: Sequence[_ChoiceWriter]
) -> None:
    frames = completion_frames(
        head,
        include_usage=request.includes_usage,
        running_usage=(lambda _: _usage(request, generation)) if request.runs_usage else None,
    )
    async with EventStream(work.call, work.context.limits.keep_alive_comment_s) as events:

        async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
            writer, text = writers[choice.index], text_of(deltas)
            if choice.finish_reason is None and not text and not writer.due:
                return
            text, logprobs = writer.piece(text)
            more = writer.ids()
            if choice.finish_reason is None:
                await events.write(frames.text(choice.index, text, logprobs, more=more))
                return
            reason, stop = writer.finish_reason or "length", choice.stop_reason
            await events.write(frames.finish(choice.index, text, logprobs, reason, stop, more=more))

        await generation.run(emit)
        await events.end(frames.usage(_usage(request, generation)) if request.includes_usage else b"")
