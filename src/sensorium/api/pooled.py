"""A pooling request on its way: inputs -> prompts -> one engine request each, all at once -> vectors in their order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sensorium.api.context import Entry, Service
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.content import Conversation
from sensorium.api.protocol.pooling import InputBody, PooledInput, PoolingBody, PromptedBody
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.errors import ContextLengthError, EngineError, RequestError, SensoriumError, UnavailableError
from sensorium.prompt.encode import Truncation
from sensorium.serving.concurrency import all_in_order
from sensorium.serving.model import ServedModel
from sensorium.types import EngineRequest, PoolingParams, PoolingTask, Prompt

if TYPE_CHECKING:
    from sensorium.ipc.client import OutputStream

Request_co = TypeVar("Request_co", bound=PoolingBody, covariant=True)
Vector = NDArray[np.float32]

CHATS_AT_ONCE = 8
"""Conversations whose media are fetched and decoded at the same time."""
SUBMITTED_AT_ONCE = 256
"""Requests that are sent before others have their turn."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Request_co]):
    """One request with what it needs for as long as it is worked on."""

    service: Service
    call: Call
    request: Request_co
    entry: Entry
    pending: PendingBody

    @property
    def model(self) -> ServedModel:
        return self.entry.model

    @property
    def model_name(self) -> str:
        """As the client called it."""
        return self.request.model or self.entry.name

    @property
    def salt(self) -> bytes:
        return self.service.salts.of(self.call.tenant, self.request.cache_salt)

    def truncation(self) -> Truncation | None:
        return self.model.truncation(self.request.truncate_prompt_tokens, self.request.truncation_side)


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vectors of all prompts: [dim] each, or [tokens, dim] for tasks that look at tokens."""

    vectors: list[Vector]
    prompt_tokens: int

    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }


@asynccontextmanager
async def opened(service: Service, call: Call, body: type[Request_co]) -> AsyncIterator[Job[Request_co]]:
    """The request, read and checked, and its model."""
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        request = await read_request(call, body, service.limits, service.unknown, pending)
        request.check(service.limits, service.server)
        entry = service.entry(request.model)
        async with service.flight(call):
            yield Job(service, call, request, entry, pending)


def chosen_prompt(job: Job[PromptedBody], task: PoolingTask) -> str:
    """What is to stand before the request's texts: the prompt that it chooses, else the model's default."""
    request, param = job.request, job.request.chooses
    if task not in ("embed", "token_embed"):
        if param is not None:
            raise RequestError(f"`{param}` goes with embeddings; the task here is {task}.", param=param)
        return ""
    prompt = job.model.instructions.chosen(request.prompt_name, request.input_type)
    if request.has_texts:
        return prompt
    if param is not None and prompt:
        raise RequestError(
            f"`{param}` puts a prompt before texts, but the request has token ids or messages.", param=param
        )
    return ""


async def pool_inputs(
    job: Job[InputBody], params: PoolingParams, *, max_tokens: int | None = None, prompt: str = ""
) -> Pooled:
    """Everything between a body of `input` or `messages` and its vectors. `prompt` stands before every text."""
    request, limits = job.request, job.service.limits
    check_count(job, request.count, "messages" if request.input is None else "input")
    inputs = request.inputs(job.model.processor.modalities, limits)
    if prompt:
        inputs = [prompt + text if isinstance(text, str) else text for text in inputs]
        params = replace(
            params,
            prompt_tokens=job.model.prompts.unpooled_tokens(
                prompt, add_special_tokens=request.add_special_tokens is not False
            ),
        )
    is_list = isinstance(request.input, list) and not isinstance(request.input[0], int)
    places = [f"input[{index}]" if is_list else "input" for index in range(len(inputs))]
    with job.entry.pooling_admission.admit(len(inputs)) as permit:
        prompts = await make_prompts(job, inputs, places, job.truncation())
        permit.add_prompt_tokens(count_tokens(job, prompts, max_tokens))
        return await run(job, prompts, params)


def check_count(job: Job[PoolingBody], count: int, param: str) -> None:
    most = job.service.limits.max_embedding_inputs
    if count > most:
        raise RequestError(
            f"One request may have at most {most} inputs; this has {count}.", param=param, code="too_many_inputs"
        )


def count_tokens(job: Job[PoolingBody], prompts: Sequence[Prompt], max_tokens: int | None = None) -> int:
    """Tokens of all prompts together, within the limit."""
    total = sum(len(prompt.token_ids) for prompt in prompts)
    limit = job.service.limits.max_embedding_tokens
    most = limit if max_tokens is None else min(max_tokens, limit)
    if total > most:
        raise ContextLengthError(
            f"The inputs have {total} tokens together; one request may have {most}. Send them in several requests.",
            param="input",
        )
    return total


async def make_prompts(
    job: Job[PoolingBody], inputs: Sequence[PooledInput], places: Sequence[str], truncation: Truncation | None
) -> list[Prompt]:
    """A prompt of each input. `places` says where it stands in the request."""
    texts = {index: given for index, given in enumerate(inputs) if not isinstance(given, Conversation)}
    chats = {index: given for index, given in enumerate(inputs) if isinstance(given, Conversation)}
    made: dict[int, Prompt] = {}
    if texts:
        start_s = time.perf_counter()
        prompts = await job.model.prompts.text_prompts(
            list(texts.values()),
            add_special_tokens=job.request.add_special_tokens is not False,
            truncation=truncation,
            params=[places[index] for index in texts],
            tenant=job.call.turn,
        )
        made = dict(zip(texts, prompts, strict=True))
        job.entry.metrics.observe_prompt(time.perf_counter() - start_s)
    _check_media(job, list(chats.values()))
    places_of_chats = list(chats)
    for start in range(0, len(chats), CHATS_AT_ONCE):
        group = places_of_chats[start : start + CHATS_AT_ONCE]
        prompts = await all_in_order(_chat_prompt(job, chats[index], truncation) for index in group)
        made.update(zip(group, prompts, strict=True))
        count_tokens(job, list(made.values()))
    job.pending.release()
    return [made[index] for index in range(len(inputs))]


def _check_media(job: Job[PoolingBody], chats: Sequence[Conversation]) -> None:
    count, most = sum(len(chat.media) for chat in chats), job.service.limits.max_embedding_media
    if len(chats) > 1 and count > most:
        raise RequestError(
            f"The inputs have {count} media together; one request may have {most}.",
            param="messages",
            code="too_many_media",
        )


async def _chat_prompt(job: Job[PoolingBody], chat: Conversation, truncation: Truncation | None) -> Prompt:
    prepared = await job.model.prompts.prepare_chat(
        chat.messages,
        chat.media,
        add_special_tokens=bool(job.request.add_special_tokens),
        pooled=True,
        truncation=truncation,
        tenant=job.call.turn,
        salt=job.salt,
        **job.request.template_options(),
    )
    job.entry.metrics.observe_prompt(prepared.text_s, prepared.media)
    return prepared.prompt


async def run(
    job: Job[PoolingBody], prompts: Sequence[Prompt], params: PoolingParams | Sequence[PoolingParams]
) -> Pooled:
    """Have the engine compute the prompts, with the same params or each with its own. If one fails, the request
    fails; leaving early ends them all."""
    client, priority = job.model.client, job.request.priority or 0
    salt = job.salt
    streams: list[OutputStream] = []
    vectors: list[Vector] = []
    failure = "abort"
    each = [params] * len(prompts) if isinstance(params, PoolingParams) else params
    try:
        for prompt, own in zip(prompts, each, strict=True):
            streams.append(
                client.submit(EngineRequest(client.next_id(), prompt, pooling=own, priority=priority, salt=salt))
            )
            if len(streams) % SUBMITTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        for stream in streams:
            vectors.append(await _vector(job.entry, stream))
    except SensoriumError:
        failure = "error"
        raise
    finally:
        for stream in streams:
            stream.abort()
        tokens = _count(job, prompts, len(vectors), failure)
    job.call.note = f"{len(prompts)} inputs, {tokens} tokens"
    return Pooled(vectors, tokens)


async def _vector(entry: Entry, stream: OutputStream) -> Vector:
    async for output in stream:
        if output.finish_reason == "error":
            raise EngineError(output.error) if output.error else EngineError()
        if output.finish_reason == "abort":
            raise UnavailableError("The request was ended by the server.")
        if output.vector is not None:
            entry.metrics.cached_tokens += output.cached_tokens
            if not np.isfinite(output.vector).all():
                raise EngineError("The model's output for this request is not a number.")
            return output.vector
    raise EngineError


def _count(job: Job[PoolingBody], prompts: Sequence[Prompt], num_done: int, failure: str) -> int:
    metrics = job.entry.metrics
    metrics.finished["stop"] += num_done
    metrics.finished[failure] += len(prompts) - num_done
    for prompt in prompts:
        metrics.request_prompt_tokens.observe(len(prompt.token_ids))
    metrics.request_s.observe(time.perf_counter() - job.call.started_s)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    metrics.prompt_tokens += tokens
    return tokens
