"""POST /pooling and /classify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec

from sensorium.api.context import Context, Entry
from sensorium.api.pooled import Job, opened, pool_inputs, usage_object
from sensorium.api.protocol.pooling import ClassifyRequest, PoolingRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import Kind, envelope, respond_vectors, vector_json, written_in_time
from sensorium.serving.pooled import Pooled, Vector
from sensorium.types import PoolingParams, PoolingTask

MAX_NUMBERS = 2**23
"""Of one answer that has a vector for every token: 32 MiB, about 170 MB as JSON."""


_POOLING = Kind("pooling", "pooling", "data")


async def pooling(context: Context, call: Call) -> None:
    async with opened(context, call, PoolingRequest) as job:
        request, entry = job.request, job.entry
        tasks = _tasks(job)
        for task in tasks:
            entry.need(task, param="task" if request.task else "model")
        params = _params(tasks, request)
        most = min((most for task in tasks if (most := max_tokens_of(entry, task)) is not None), default=None)
        pooled = await pool_inputs(job, params, max_tokens=most)
        if len(tasks) == 1 and tasks[0] != "sparse":
            await respond_vectors(call, pooled, _POOLING, job.model_name, request)
            return
        data = await written_in_time(lambda: _outputs(tasks, pooled), pooled.vectors)
        await call.respond(envelope(call, _POOLING.prefix, job.model_name, data, usage_object(pooled)))


def _params(tasks: tuple[PoolingTask, ...], request: PoolingRequest) -> PoolingParams:
    """An embedding's activation is its normalisation."""
    on = request.use_activation
    normalize = on if {"embed", "token_embed"} & set(tasks) else None
    activation = on if {"classify", "token_classify"} & set(tasks) else None
    return PoolingParams(tasks[0], normalize=normalize, activation=activation, also=tasks[1:])


def _tasks(job: Job[PoolingRequest]) -> tuple[PoolingTask, ...]:
    known: dict[str, PoolingTask] = {task: task for task in get_args(PoolingTask)}
    return tuple(known[task] for task in job.request.tasks) or (job.model.default_pooling_task or "embed",)


def _outputs(tasks: Sequence[PoolingTask], pooled: Pooled) -> bytes:
    """The list of a task whose vectors are sparse, or of several tasks: then an object with each task's result."""
    rows = []
    for index, (vector, others) in enumerate(zip(pooled.vectors, pooled.others, strict=True)):
        made = {task: task_json(task, one) for task, one in zip(tasks, (vector, *others), strict=True)}
        data = made[tasks[0]] if len(tasks) == 1 else made
        rows.append({"index": index, "object": _POOLING.name, _POOLING.key: data})
    return msgspec.json.encode(rows)


def task_json(task: PoolingTask, vector: Vector) -> msgspec.Raw:
    """One result. A sparse vector is a list of {"index": token id, "value": weight}, as text-embeddings-inference has
    it."""
    if task != "sparse":
        return msgspec.Raw(vector_json(vector, "float"))
    return msgspec.Raw(msgspec.json.encode([{"index": int(index), "value": value} for index, value in vector.tolist()]))


def max_tokens_of(entry: Entry, task: PoolingTask) -> int | None:
    """Of one request, where every token has a vector; None where the usual limit counts."""
    if task not in ("token_embed", "token_classify"):
        return None
    ready = entry.model.client.ready
    size = ready.token_size or ready.embedding_size if ready is not None else 1
    return MAX_NUMBERS // max(1, size if task == "token_embed" else len(entry.model.labels))


async def classify(context: Context, call: Call) -> None:
    async with opened(context, call, ClassifyRequest, "classify") as job:
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
