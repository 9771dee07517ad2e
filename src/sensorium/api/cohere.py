"""Cohere's POST /v2/embed and /v1/embed."""

from __future__ import annotations

from typing import Any

import msgspec

from sensorium.api.context import Context
from sensorium.api.embeddings import check_dimensions
from sensorium.api.pooled import opened, pool_inputs
from sensorium.api.protocol.cohere import CohereEmbedRequest
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import Form, vector_json, written_in_time
from sensorium.serving.pooled import Pooled


async def cohere_embed(context: Context, call: Call) -> None:
    async with opened(context, call, CohereEmbedRequest, "embed") as job:
        request = job.request
        job.entry.need("embed")
        check_dimensions(job.entry, request.output_dimension, param="output_dimension")
        pooled = await pool_inputs(job, request.params())
        by_type = bool(request.embedding_types) or call.path == "/v2/embed"
        forms: list[Form] = list(dict.fromkeys(request.embedding_types or [])) or ["float"]
        embeddings = await written_in_time(lambda: _embeddings(pooled, forms, by_type=by_type), pooled.vectors)
        answer: dict[str, Any] = {
            "id": call.answer_id("embd-"),
            "texts": request.texts or [],
            "embeddings": msgspec.Raw(embeddings),
            "meta": _meta(pooled, version=call.path[2:3]),
            "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
        }
        await call.respond(msgspec.json.encode(answer))


def _embeddings(pooled: Pooled, forms: list[Form], *, by_type: bool) -> bytes:
    """{type: vectors}, or the vectors of the one type alone."""
    lists = [b"[" + b",".join(vector_json(vector, form) for vector in pooled.vectors) + b"]" for form in forms]
    if not by_type:
        return lists[0]
    return b"{" + b",".join(b'"%b":%b' % (form.encode(), rows) for form, rows in zip(forms, lists, strict=True)) + b"}"


def _meta(pooled: Pooled, *, version: str) -> dict[str, Any]:
    units = {"input_tokens": pooled.prompt_tokens - pooled.media_tokens}
    if pooled.media_tokens:
        units["image_tokens"] = pooled.media_tokens
    return {"api_version": {"version": version}, "billed_units": units}
