"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from sensorium.api.answer import Answer, Answers, ask
from sensorium.api.context import Entry, Service
from sensorium.api.logprobs import CompletionLogprobs, joined
from sensorium.api.protocol.completion import CompletionRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.frames import StreamHead, completion_frames
from sensorium.api.transport.sse import EventStream
from sensorium.prompt.offsets import prompt_offsets
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Prompt


async def completions(service: Service, call: Call) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, CompletionRequest, service.limits, service.unknown, pending)
        request.check(service.limits)
        entry = service.entry(request.model)
        entry.need("generate")
        with entry.admission.admit(len(request.prompts) * request.choices) as permit:
            async with service.flight(call):
                prompts = await _prompts(entry, request, call.turn)
                pending.release()
                permit.add_prompt_tokens(sum(len(prompt.token_ids) for prompt in prompts))
                defaults = entry.model.defaults
                asked = [(prompt, request.sampling(defaults, len(prompt.token_ids))) for prompt in prompts]
                salt = service.salts.of(call.tenant, request.cache_salt)
                answers = ask(entry, request, asked, salt, started_s=call.started_s, continues=True)
                with answers:
                    await _answer(service, call, entry, request, answers)
                    call.note = f"{answers.prompt_tokens} + {answers.completion_tokens} tokens"


async def _prompts(entry: Entry, request: CompletionRequest, tenant: bytes) -> list[Prompt]:
    start_s = time.perf_counter()
    special = request.add_special_tokens is not False
    prompts = [
        await entry.model.prompts.text_prompt(prompt, add_special_tokens=special, tenant=tenant)
        for prompt in request.prompts
    ]
    entry.metrics.observe_prompt(time.perf_counter() - start_s)
    return prompts


async def _answer(service: Service, call: Call, entry: Entry, request: CompletionRequest, answers: Answers) -> None:
    head = StreamHead("cmpl-" + secrets.token_hex(12), int(time.time()), request.model or entry.name)
    echoes = await _echoes(entry, request, answers.prompts)
    writers = [
        _ChoiceWriter(entry, request, answer, answers.prompts[place], echoes[place])
        for place, answer in ((answer.index // request.choices, answer) for answer in answers.answers)
    ]
    if request.stream:
        await _stream(service, call, request, answers, head, writers)
        return
    texts = await answers.collect()
    choices = [writer.whole(text) for writer, text in zip(writers, texts, strict=True)]
    await call.respond(
        msgspec.json.encode(
            {
                "id": head.id,
                "object": "text_completion",
                "created": head.created,
                "model": head.model,
                "choices": choices,
                "usage": _usage(request, answers),
                "system_fingerprint": None,
            }
        )
    )


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
            given if isinstance(given, str) else None,
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


def _usage(request: CompletionRequest, answers: Answers) -> dict[str, object]:
    return answers.usage() if request.generates else answers.usage(completion_tokens=0)


class _ChoiceWriter:
    """One choice's pieces: the echoed prompt once, then what the model adds, with log-probabilities in step."""

    def __init__(self, entry: Entry, request: CompletionRequest, answer: Answer, prompt: Prompt, echo: _Echo) -> None:
        self._answer = answer
        self._prompt = prompt
        self._generates = request.generates
        self._echo = echo
        self._echo_due = bool(request.echo)
        self._logprobs: CompletionLogprobs | None = None
        if request.logprobs is not None:
            self._logprobs = CompletionLogprobs(
                entry.model.tokenizer,
                request.logprobs,
                skip_special_tokens=not request.keeps_special_tokens,
                echoed=len(echo.text),
            )

    def piece(self, text: str) -> tuple[str, dict[str, Any] | None]:
        """What to send for new text."""
        tokens = self._answer.take_logprobs()
        if not self._generates:  # the engine always makes one token; nobody asked for it
            text, tokens = "", []
        lists = self._logprobs
        own = lists.piece(tokens, text, is_last=self._answer.finish_reason is not None) if lists is not None else None
        if not self._echo_due:
            return text, own
        self._echo_due = False
        if lists is not None and own is not None:
            own = joined(lists.prompt(self._prompt.token_ids, self._answer.prompt_logprobs, self._echo.offsets), own)
        return self._echo.text + text, own

    def whole(self, text: str) -> dict[str, Any]:
        text, logprobs = self.piece(text)
        return {
            "index": self._answer.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self._answer.stop_reason,
        }

    @property
    def finish_reason(self) -> str | None:
        return self._answer.finish_reason if self._generates or self._answer.finish_reason is None else "length"

    @property
    def due(self) -> bool:
        """Is there something to say even without new text?"""
        return self._echo_due


async def _stream(
    service: Service,
    call: Call,
    request: CompletionRequest,
    answers: Answers,
    head: StreamHead,
    writers: Sequence[_ChoiceWriter],
) -> None:
    frames = completion_frames(
        head,
        include_usage=request.includes_usage,
        running_usage=(lambda _: _usage(request, answers)) if request.runs_usage else None,
    )
    async with EventStream(call, service.limits.keep_alive_comment_s) as events:

        async def emit(answer: Answer, text: str) -> None:
            writer = writers[answer.index]
            if answer.finish_reason is not None:
                text, logprobs = writer.piece(text)
                await events.write(
                    frames.finish(answer.index, text, logprobs, writer.finish_reason or "length", answer.stop_reason)
                )
            elif text or writer.due:
                text, logprobs = writer.piece(text)
                await events.write(frames.text(answer.index, text, logprobs))

        await answers.run(emit)
        await events.end(frames.usage(_usage(request, answers)) if request.includes_usage else b"")
