"""POST /pooling and /classify."""

from __future__ import annotations

import msgspec

from sensorium.api.context import Context, Entry
from sensorium.api.pooled import chosen_prompt, opened, pool_inputs, usage_object
from sensorium.api.protocol.pooling import ClassifyRequest, PoolingRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import Kind, envelope, respond_vectors, written_in_time
from sensorium.serving.pooled import Pooled
from sensorium.types import PoolingParams, PoolingTask

MAX_NUMBERS = 2**23
"""Of one answer that has a vector for every token: 32 MiB, about 170 MB as JSON."""


_POOLING = Kind("pooling", "pooling", "data")


async def pooling(context: Context, call: Call) -> None:
    async with opened(context, call, PoolingRequest) as job:
        request, entry = job.request, job.entry
        task = request.task or entry.model.default_pooling_task or "embed"
        entry.need(task, param="task" if request.task else "model")
        pooled = await pool_inputs(
            job, _params(task, request), max_tokens=max_tokens_of(entry, task), prompt=chosen_prompt(job, task)
        )
        await respond_vectors(call, pooled, _POOLING, job.model_name, request)


def _params(task: PoolingTask, request: PoolingRequest) -> PoolingParams:
    """An embedding's activation is its normalisation."""
    if task in ("embed", "token_embed"):
        return PoolingParams(task, normalize=request.use_activation)
    return PoolingParams(task, activation=request.use_activation)


def max_tokens_of(entry: Entry, task: PoolingTask) -> int | None:
    """Of one request, where every token has a vector; None where the usual limit counts."""
    if task not in ("token_embed", "token_classify"):
        return None
    ready = entry.model.client.ready
    embedding_size = ready.embedding_size if ready is not None else 1
    return MAX_NUMBERS // max(1, embedding_size if task == "token_embed" else len(entry.model.labels))


async def classify(context: Context, call: Call) -> None:
    async with opened(context, call, ClassifyRequest) as job:
        job.entry.need("classify")
        pooled = await pool_inputs(job, job.request.params())
        data = await written_in_time(lambda: _classes(job.entry, pooled), pooled.vectors)
        await call.respond(envelope(call, "classify", job.model_name, data, usage_object(pooled)))


def _classes(entry: Entry, pooled: Pooled) -> bytes:
    labels = entry.model.labels
    rows = []
    for index, vector in enumerate(pooled.vectors):
        best = int(vector.argmax())
        rows.append(
            {
                "index": index,
                "label": labels[best] if best < len(labels) else None,
                "probs": vector.tolist(),
                "num_classes": len(vector),
            }
        )
    return msgspec.json.encode(rows)
