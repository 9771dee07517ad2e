"""A body of a pooling endpoint on its way: read, checked, admitted, and given to `serving/pooled.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from sensorium.api.context import Context, Entry
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.pooling import PoolingBody, SequencesBody
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.errors import PromptTooLongError
from sensorium.prompt.encode import Truncation
from sensorium.serving.model import ServedModel
from sensorium.serving.pooled import Pooled, Pooling, PoolingOptions
from sensorium.serving.sequences import PromptChoice, Sequences, pool
from sensorium.types import PoolingParams, Prompt

Request_co = TypeVar("Request_co", bound=PoolingBody, covariant=True)


@dataclass(frozen=True, slots=True)
class Job(Generic[Request_co]):
    """One request with what it needs for as long as it is worked on."""

    context: Context
    call: Call
    request: Request_co
    entry: Entry
    pooling: Pooling

    @property
    def model(self) -> ServedModel:
        return self.entry.model

    @property
    def model_name(self) -> str:
        """As the client called it."""
        return self.request.model or self.entry.name

    def truncation(self) -> Truncation | None:
        request, wanted = self.request, self.request.most_tokens
        if request.is_clipped and wanted is not None:
            wanted = -1 if wanted > self.model.max_model_len else wanted
        return self.model.truncation(wanted, request.cut_side)

    async def run(self, prompts: Sequence[Prompt], params: PoolingParams | Sequence[PoolingParams]) -> Pooled:
        """The prompts' vectors, and a word of it in the log."""
        pooled = await self.pooling.run(prompts, params)
        self.call.note = f"{len(prompts)} inputs, {pooled.prompt_tokens} tokens"
        return pooled


@asynccontextmanager
async def opened(
    context: Context, call: Call, body: type[Request_co], *tasks: str, any_type: bool = False
) -> AsyncIterator[Job[Request_co]]:
    """The request, read and checked, and its model; if it names none, one that does the first of `tasks` that any does.
    `any_type`: the body is JSON, whatever it is called."""
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, body, context.limits, context.unknown, pending, any_type=any_type)
        request.check(context.limits, context.server)
        async with context.acquire(request.model, *tasks) as entry, context.open_request(call):
            try:
                yield Job(context, call, request, entry, _pooling(context, call, request, entry, pending))
            except PromptTooLongError as error:
                if request.most_tokens is None:
                    error.message += f" {request.cut_by} has longer prompts cut."
                raise


def _pooling(context: Context, call: Call, request: PoolingBody, entry: Entry, pending: PendingBody) -> Pooling:
    options = PoolingOptions(
        call.turn,
        context.salts.of(call.tenant, request.cache_salt),
        request.priority or 0,
        request.add_special_tokens,
        entry.adapter_number,
        request.template_options(),
    )
    return Pooling(
        entry.model, context.limits, options, entry.metrics, started_s=call.started_s, on_prompts=pending.release
    )


async def pool_inputs(job: Job[SequencesBody], params: PoolingParams, *, max_tokens: int | None = None) -> Pooled:
    """Everything between a body and its vectors."""
    request, entry = job.request, job.entry
    job.pooling.check_count(request.count, request.field)
    inputs = request.inputs(job.model.processor.modalities, job.context.limits)
    pooled, _ = await pool(
        Sequences(
            job.pooling,
            inputs,
            [request.place(index) for index in range(len(inputs))],
            params,
            PromptChoice(request.name_of_prompt, request.type_of_texts, request.chooses),
            job.truncation(),
            entry.pooling_admission.admit,
            job.run,
            max_tokens,
        )
    )
    return pooled


def usage_object(pooled: Pooled) -> dict[str, object]:
    return {
        "prompt_tokens": pooled.prompt_tokens,
        "total_tokens": pooled.prompt_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
