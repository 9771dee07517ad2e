"""POST /score and /rerank: bodies of two sides, which `serving/comparing.py` compares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import msgspec

from sensorium.api.context import Context
from sensorium.api.pooled import Job, opened, usage_object
from sensorium.api.protocol.score import ComparingBody, RerankRequest, ScoreRequest, is_plain, plain_text
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import envelope
from sensorium.prompt.encode import Truncation
from sensorium.serving.comparing import Item, Permit, Side, compare
from sensorium.serving.model import ServedModel
from sensorium.serving.pooled import Pooled, Pooling
from sensorium.types import PoolingParams, Prompt


def side_of(job: Job[Any], items: Sequence[Any], name: str, max_tokens: int, *, is_list: bool = True) -> Side:
    """`items` are texts, or contents of text and media; `name` is where they stand in the request."""

    def item(index: int, given: Any) -> Item:
        place = f"{name}[{index}]" if is_list else name
        if is_plain(given):
            return Item(plain_text(given) or "")
        takes = job.model.processor.modalities
        return Item(plain_text(given), lambda: given.conversation(place, takes, job.context.limits))

    return Side([item(index, given) for index, given in enumerate(items)], name, max_tokens, is_list)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A `Comparer` over HTTP."""

    job: Job[ComparingBody]

    @property
    def model(self) -> ServedModel:
        return self.job.model

    @property
    def name(self) -> str:
        return self.job.entry.name

    @property
    def pooling(self) -> Pooling:
        return self.job.pooling

    @property
    def params(self) -> PoolingParams:
        return self.job.request.params()

    @property
    def instruction(self) -> str | None:
        return self.job.request.instruction

    @property
    def truncation(self) -> Truncation | None:
        return self.job.truncation()

    @property
    def frames_texts(self) -> bool:
        return self.job.request.add_special_tokens is not False

    def need(self, task: str, *, doing: str) -> None:
        self.job.entry.need(task, doing=doing)

    def admit(self, count: int) -> AbstractContextManager[Permit]:
        return self.job.entry.pooling_admission.admit(count)

    async def run(self, prompts: Sequence[Prompt], params: PoolingParams | Sequence[PoolingParams]) -> Pooled:
        return await self.job.run(prompts, params)


async def score(context: Context, call: Call) -> None:
    async with opened(context, call, ScoreRequest) as job:
        request, names, (left, right) = job.request, job.request.names, job.request.sides
        pooled = await compare(
            Comparison(job),
            *(
                side_of(job, items, name, most or 0, is_list=isinstance(getattr(request, name), list))
                for items, name, most in (
                    (left, names[0], request.max_tokens_per_query),
                    (right, names[1], request.max_tokens_per_doc),
                )
            ),
        )
        rows = [
            {"index": index, "object": "score", "score": float(vector[0])}
            for index, vector in enumerate(pooled.vectors)
        ]
        await call.respond(envelope(call, "score", job.model_name, msgspec.json.encode(rows), usage_object(pooled)))


async def rerank(context: Context, call: Call) -> None:
    async with opened(context, call, RerankRequest) as job:
        request = job.request
        pooled = await compare(
            Comparison(job),
            side_of(job, [request.query], "query", request.max_tokens_per_query or 0, is_list=False),
            side_of(job, request.items, request.items_name, request.max_tokens_per_doc or 0),
        )
        scores = [float(vector[0]) for vector in pooled.vectors]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n or len(scores)]
        answer = _ranking(job, pooled, scores, best) if request.texts is None else _ranked_texts(request, scores, best)
        await call.respond(msgspec.json.encode(answer))


def _ranking(job: Job[RerankRequest], pooled: Pooled, scores: list[float], best: list[int]) -> dict[str, Any]:
    """vLLM's, Jina's and Cohere's form; Cohere's second version has `meta`."""
    request, call = job.request, job.call
    shown = request.return_documents is not False
    rows = [
        {
            "index": index,
            **({"document": _document(request.items[index])} if shown else {}),
            "relevance_score": scores[index],
        }
        for index in best
    ]
    usage = {"prompt_tokens": pooled.prompt_tokens, "total_tokens": pooled.prompt_tokens}
    meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return {
        "id": call.answer_id("rerank-"),
        "model": job.model_name,
        "usage": usage,
        "results": rows,
        **({"meta": meta} if call.path == "/v2/rerank" else {}),
    }


def _ranked_texts(request: RerankRequest, scores: list[float], best: list[int]) -> list[dict[str, Any]]:
    """The form of text-embeddings-inference."""
    rows = [{"index": index, "score": scores[index]} for index in best]
    if not request.return_text:
        return rows
    return [{**row, "text": plain_text(request.items[index])} for row, index in zip(rows, best, strict=True)]


def _document(item: Any) -> dict[str, Any]:
    if is_plain(item):
        return {"text": plain_text(item), "multi_modal": None}
    return {"text": None, "multi_modal": item.model_dump(mode="json", exclude_none=True)}
