"""The routes of text-embeddings-inference: POST /embed, /embed_all, /predict, /similarity and GET /info."""

from __future__ import annotations

from typing import Any

import msgspec

from sensorium import __version__
from sensorium.api.context import POOLING_REQUESTS, Context, Entry
from sensorium.api.embeddings import check_dimensions
from sensorium.api.pooled import Job, opened, pool_inputs
from sensorium.api.pooling import max_tokens_of, task_json
from sensorium.api.protocol.tei import EmbedRequest, PredictRequest, SimilarityRequest
from sensorium.api.score import chat_of, comparison_of, side_of
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import vector_json, written_in_time
from sensorium.errors import RequestError
from sensorium.prompt.encode import PairLimits
from sensorium.serving.comparing import compare
from sensorium.serving.pooled import Pooled, Vector
from sensorium.types import PoolingParams


async def embed(context: Context, call: Call) -> None:
    async with opened(context, call, EmbedRequest, "embed") as job:
        job.entry.need("embed")
        check_dimensions(job.entry, job.request.dimensions)
        await _respond(call, await pool_inputs(job, job.request.params()))


async def embed_all(context: Context, call: Call) -> None:
    """A vector for every token."""
    async with opened(context, call, EmbedRequest, "token_embed") as job:
        job.entry.need("token_embed")
        if job.request.dimensions is not None:
            raise RequestError("`dimensions` goes with /embed.", param="dimensions", code="unsupported_field")
        params = PoolingParams("token_embed", normalize=job.request.normalize)
        await _respond(call, await pool_inputs(job, params, max_tokens=max_tokens_of(job.entry, "token_embed")))


async def embed_sparse(context: Context, call: Call) -> None:
    """Token ids with weights."""
    async with opened(context, call, EmbedRequest, "sparse") as job:
        job.entry.need("sparse")
        for name in ("dimensions", "normalize"):
            if getattr(job.request, name) is not None:
                raise RequestError(f"`{name}` goes with /embed.", param=name, code="unsupported_field")
        pooled = await pool_inputs(job, PoolingParams("sparse"))
        await call.respond(msgspec.json.encode([task_json("sparse", vector) for vector in pooled.vectors]))


async def predict(context: Context, call: Call) -> None:
    """Classes of texts or of pairs, the likeliest first."""
    async with opened(context, call, PredictRequest, "classify") as job:
        job.entry.need("classify")
        request, labels = job.request, job.model.labels
        pooled = await _predicted(job)
        rows = [_classes(labels, vector) for vector in pooled.vectors]
        await call.respond(msgspec.json.encode(rows if request.is_batch else rows[0]))


def _classes(labels: list[str], vector: Vector) -> list[dict[str, Any]]:
    scores = [{"score": score, "label": label} for score, label in zip(vector.tolist(), labels, strict=False)]
    return sorted(scores, key=lambda row: -row["score"])


async def _predicted(job: Job[PredictRequest]) -> Pooled:
    request, pooling = job.request, job.pooling
    sequences = request.sequences
    pooling.check_count(len(sequences), "inputs")
    places = [f"inputs[{index}]" if request.is_batch else "inputs" for index in range(len(sequences))]
    truncation = job.truncation()
    with job.entry.pooling_admission.admit(len(sequences)) as permit:
        if len(sequences[0]) == 2:
            limits = PairLimits(total=truncation.max_tokens if truncation is not None else None)
            prompts = await pooling.pair_prompts([(one, other) for one, other in sequences], limits, places)
        else:
            prompts = await pooling.make_prompts([text for [text] in sequences], places, truncation)
        permit.add_prompt_tokens(pooling.count_tokens(prompts))
        return await job.run(prompts, request.params())


async def similarity(context: Context, call: Call) -> None:
    async with opened(context, call, SimilarityRequest, "embed") as job:
        given, chat = job.request.inputs, chat_of(job)
        pooled = await compare(
            comparison_of(job),
            side_of([given.source_sentence], "inputs.source_sentence", 0, chat, is_list=False),
            side_of(given.sentences, "inputs.sentences", 0, chat),
        )
        await call.respond(msgspec.json.encode([float(vector[0]) for vector in pooled.vectors]))


async def info(context: Context, call: Call) -> None:
    """Of the first model that such a server would have."""
    async with context.acquire(None, "embed", "score", "classify") as entry:
        ready, limits = entry.model.client.ready, context.limits
        found = {
            "model_id": entry.name,
            "model_sha": None,
            "model_dtype": ready.dtype if ready is not None else None,
            "model_type": _model_type(entry),
            "max_concurrent_requests": POOLING_REQUESTS * limits.max_embedding_inputs,
            "max_input_length": entry.model.max_model_len,
            "max_batch_tokens": limits.max_embedding_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": limits.max_embedding_inputs,
            "auto_truncate": False,
            "tokenization_workers": context.server.media_workers,
            "version": __version__,
        }
    await call.respond(msgspec.json.encode(found))


def _model_type(entry: Entry) -> dict[str, Any]:
    """As the server that has this route tells it; a model that only generates is none of its kinds."""
    tasks, labels = entry.model.tasks, entry.model.labels
    names = {
        "id2label": {str(index): name for index, name in enumerate(labels)},
        "label2id": {name: index for index, name in enumerate(labels)},
    }
    if "score" in tasks:
        return {"reranker": names}
    if "classify" in tasks:
        return {"classifier": names}
    return {"embedding": {"pooling": "/".join(entry.model.pooling_kinds)}} if "embed" in tasks else {}


async def _respond(call: Call, pooled: Pooled) -> None:
    def rows() -> bytes:
        return b"[" + b",".join(vector_json(vector, "float") for vector in pooled.vectors) + b"]"

    await call.respond(await written_in_time(rows, pooled.vectors))
