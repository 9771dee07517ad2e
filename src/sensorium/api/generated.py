"""The way of every request that generates: read, admitted, made into prompts, sent to the engine, answered.

An endpoint says what is its own: how its body becomes a `GenerationRequest`, and how an answer is written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from sensorium.api.context import Context, Entry
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.sampling import SamplingBody
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.frames import Usage as RunningUsage
from sensorium.config import Limits
from sensorium.prompt.formats.base import Delta, Text
from sensorium.serving.generation import Choice, Generation, GenerationRequest, Usage, generate
from sensorium.serving.model import ServedModel
from sensorium.serving.recordings import Observer


class Asker(Protocol):
    """What making a prompt needs to know of who asks, and whom: a request over HTTP, or a Python program."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def name(self) -> str:
        """The model's, for messages."""

    @property
    def limits(self) -> Limits: ...

    @property
    def turn(self) -> bytes:
        """Who takes turns with others."""

    @property
    def observer(self) -> Observer: ...

    def salt(self, own: str | None = None) -> bytes:
        """Whose caches it may use. `own` is the request's `cache_salt`."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request over HTTP on its way, and who does it. An `Asker`."""

    context: Context
    call: Call
    entry: Entry

    @property
    def model(self) -> ServedModel:
        return self.entry.model

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def limits(self) -> Limits:
        return self.context.limits

    @property
    def turn(self) -> bytes:
        return self.call.turn

    @property
    def observer(self) -> Observer:
        return self.entry.metrics

    def salt(self, own: str | None = None) -> bytes:
        return self.context.salts.of(self.call.tenant, own)


class Endpoint(Protocol):
    """A body that was read and checked."""

    @property
    def model_name(self) -> str | None:
        """The model's name as the client wrote it; None for the default."""

    @property
    def num_sequences(self) -> int:
        """What will be computed at a time."""

    async def prepare(self, work: Work) -> GenerationRequest:
        """Make the prompts. What only they need is let go."""

    async def answer(self, work: Work, generation: Generation) -> None:
        """Write the answer, whole or as a stream."""


class CountedEndpoint(Endpoint, Protocol):
    """One whose prompt can be counted alone."""

    async def count(self, work: Asker) -> int:
        """Tokens of the prompt, however many; media are measured, not decoded."""


async def answer_generated(context: Context, call: Call, read: Callable[[PendingBody], Awaitable[Endpoint]]) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        endpoint = await read(pending)
        async with context.acquire(endpoint.model_name, "generate") as entry:
            await generate_answer(Work(context, call, entry), endpoint, pending)


async def generate_answer(work: Work, endpoint: Endpoint, pending: PendingBody) -> None:
    """The same of a body that was read already."""
    call, entry = work.call, work.entry
    entry.need("generate")
    with entry.admission.admit(endpoint.num_sequences) as permit:
        async with work.context.open_request(call):
            request = await endpoint.prepare(work)
            pending.release()
            permit.add_prompt_tokens(request.prompt_tokens)
            request = replace(request, adapter=entry.adapter_number)
            generating = generate(entry.model, request, entry.metrics, started_s=call.started_s, turn=work.turn)
            with generating as generation:
                await endpoint.answer(work, generation)
                call.note = f"{generation.prompt_tokens} + {generation.completion_tokens} tokens"


async def answer_counted(
    context: Context,
    call: Call,
    read: Callable[[PendingBody], Awaitable[CountedEndpoint]],
    answer: Callable[[int], dict[str, Any]],
) -> None:
    """How many tokens a request's prompt has, without computing anything; `answer` makes the body of it."""
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        endpoint = await read(pending)
        async with context.acquire(endpoint.model_name, "generate") as entry:
            entry.need("generate")
            with entry.admission.admit(1):
                async with context.open_request(call):
                    tokens = await endpoint.count(Work(context, call, entry))
                    await call.respond(msgspec.json.encode(answer(tokens)))


def text_of(deltas: Iterable[Delta]) -> str:
    """Where nothing but text is asked for."""
    return "".join([delta.text for delta in deltas if isinstance(delta, Text)])


def prompt_ids(choice: Choice, request: SamplingBody) -> dict[str, Any]:
    """The ids of the prompt, where the request wants ids."""
    return {"prompt_token_ids": choice.prompt.token_ids.tolist()} if request.return_token_ids else {}


def new_ids(choice: Choice, request: SamplingBody) -> dict[str, Any]:
    """The ids of tokens since the last call, where the request wants them."""
    return {"token_ids": choice.take_token_ids()} if request.return_token_ids else {}


def running_usage(generation: Generation) -> RunningUsage:
    """For streams that tell the figures in every event."""
    return lambda unsent: usage_object(generation.usage(), unsent=unsent)


def usage_object(usage: Usage, *, unsent: int = 0, generates: bool = True) -> dict[str, Any]:
    """OpenAI's usage, with what was cached and what was media. `unsent` are tokens that the client does not have yet;
    without `generates` only the prompt counts."""
    completion = usage.completion_tokens - unsent if generates else 0
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "multimodal_tokens": usage.media_tokens or None,
        },
    }
    if usage.reasoning_tokens:
        found["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return found
