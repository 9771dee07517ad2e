"""A body of a pooling endpoint on its way: read, checked, admitted, and given to `serving/pooled.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sensorium.api.context import Context, Entry
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.pooling import PoolingBody, SequencesBody
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.checkpoint.prompts import role_of
from sensorium.errors import RequestError
from sensorium.prompt.encode import Truncation
from sensorium.serving.late import LatePrompts
from sensorium.serving.model import ServedModel
from sensorium.serving.pooled import Pooled, PooledInput, Pooling, PoolingOptions
from sensorium.types import PoolingParams, PoolingTask, Prompt

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
    context: Context, call: Call, body: type[Request_co], *, any_type: bool = False
) -> AsyncIterator[Job[Request_co]]:
    """The request, read and checked, and its model. `any_type`: the body is JSON, whatever it is called."""
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        request = await read_request(call, body, context.limits, context.unknown, pending, any_type=any_type)
        request.check(context.limits, context.server)
        async with context.acquire(request.model) as entry, context.open_request(call):
            yield Job(context, call, request, entry, _pooling(context, call, request, entry, pending))


def _pooling(context: Context, call: Call, request: PoolingBody, entry: Entry, pending: PendingBody) -> Pooling:
    options = PoolingOptions(
        call.turn,
        context.salts.of(call.tenant, request.cache_salt),
        request.priority or 0,
        request.add_special_tokens,
        request.template_options(),
    )
    return Pooling(
        entry.model, context.limits, options, entry.metrics, started_s=call.started_s, on_prompts=pending.release
    )


def chosen_prompt(job: Job[SequencesBody], *tasks: PoolingTask) -> str:
    """What is to stand before the request's texts: the prompt that it chooses, else the model's default."""
    request, param = job.request, job.request.chooses
    if job.model.late is not None and tasks == ("token_embed",) and param in (None, "input_type"):
        return ""  # its texts are written as queries or documents
    if not {"embed", "token_embed", "sparse"} & set(tasks):
        if param is not None:
            raise RequestError(f"`{param}` goes with embeddings; the task here is {' and '.join(tasks)}.", param=param)
        return ""
    try:
        prompt = job.model.instructions.chosen(request.name_of_prompt, request.type_of_texts)
    except RequestError as error:
        if param == "task":
            error.param = param
        raise
    if request.has_texts:
        return prompt
    if param is not None and prompt:
        raise RequestError(
            f"`{param}` puts a prompt before texts, but the request has token ids or messages.", param=param
        )
    return ""


async def pool_inputs(
    job: Job[SequencesBody], params: PoolingParams, *, max_tokens: int | None = None, prompt: str = ""
) -> Pooled:
    """Everything between a body and its vectors. `prompt` stands before every text."""
    request, pooling = job.request, job.pooling
    pooling.check_count(request.count, request.field)
    inputs = request.inputs(job.model.processor.modalities, job.context.limits)
    if prompt:
        inputs = [prompt + text if isinstance(text, str) else text for text in inputs]
        add = request.add_special_tokens is not False
        params = replace(params, prompt_tokens=job.model.prompts.unpooled_tokens(prompt, add_special_tokens=add))
    places = [request.place(index) for index in range(len(inputs))]
    if job.model.late is not None and params.tasks == ("token_embed",):
        return await _pool_tokens(job, job.model.late, inputs, places, params, max_tokens)
    with job.entry.pooling_admission.admit(len(inputs)) as permit:
        adapter = job.model.instructions.adapter(request.name_of_prompt, request.type_of_texts)
        prompts = await pooling.make_prompts(
            inputs, places, job.truncation(), chunked=params.tasks == ("embed",), adapter=adapter
        )
        permit.add_prompt_tokens(pooling.count_tokens(prompts, max_tokens))
        return await job.run(prompts, params)


async def _pool_tokens(
    job: Job[SequencesBody],
    late: LatePrompts,
    inputs: Sequence[PooledInput],
    places: Sequence[str],
    params: PoolingParams,
    max_tokens: int | None,
) -> Pooled:
    """Vectors as they are compared: of queries if the request says so by its type, else of documents."""
    wanted = job.request.type_of_texts
    role = "document" if wanted is None else role_of(wanted)
    if role is None:
        raise RequestError(f"This model reads queries and documents; {wanted!r} is neither.", param=job.request.chooses)
    with job.entry.pooling_admission.admit(len(inputs)) as permit:
        asked = await job.pooling.late_prompts(late, inputs, places, job.truncation(), role)
        prompts = [prompt for prompt, _ in asked]
        permit.add_prompt_tokens(job.pooling.count_tokens(prompts, max_tokens))
        pooled = await job.run(prompts, [replace(own, normalize=params.normalize) for _, own in asked])
    kept = [
        late.counted(vectors, prompt, role) if isinstance(given, str) else vectors
        for vectors, prompt, given in zip(pooled.vectors, prompts, inputs, strict=True)
    ]
    return replace(pooled, vectors=kept)


def usage_object(pooled: Pooled) -> dict[str, object]:
    return {
        "prompt_tokens": pooled.prompt_tokens,
        "total_tokens": pooled.prompt_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
