"""POST /score and /rerank: bodies of two sides, which `serving/comparing.py` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from sensorium.api.context import Context
from sensorium.api.pooled import Job, opened, usage_object
from sensorium.api.protocol.score import ComparingBody, RerankRequest, ScoreRequest, is_plain, plain_text
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import envelope
from sensorium.serving.comparing import Comparison, Item, Side, compare
from sensorium.serving.pooled import Chat, Pooled

COMPARING = ("score", "token_embed", "embed")
"""Tasks of models that compare, the most apt first."""


def side_of(
    items: Sequence[Any], name: str, max_tokens: int, chat: Callable[[Any, str], Chat], *, is_list: bool = True
) -> Side:
    """`items` are texts, or contents of text and media; `name` is where they stand in the request. `chat` makes a
    conversation of a content and its place."""

    def item(index: int, given: Any) -> Item:
        if is_plain(given):
            return Item(plain_text(given) or "")
        place = f"{name}[{index}]" if is_list else name
        return Item(plain_text(given), lambda: chat(given, place))

    return Side([item(index, given) for index, given in enumerate(items)], name, max_tokens, is_list)


def sides_of(request: ScoreRequest, chat: Callable[[Any, str], Chat]) -> tuple[Side, Side]:
    left, right = (
        side_of(items, name, most or 0, chat, is_list=isinstance(getattr(request, name), list))
        for items, name, most in zip(
            request.sides, request.names, (request.max_tokens_per_query, request.max_tokens_per_doc), strict=True
        )
    )
    return left, right


def chat_of(job: Job[Any]) -> Callable[[Any, str], Chat]:
    def chat(item: Any, place: str) -> Chat:
        made: Chat = item.conversation(place, job.model.processor.modalities, job.context.limits)
        return made

    return chat


def comparison_of(job: Job[ComparingBody]) -> Comparison:
    request, entry = job.request, job.entry
    return Comparison(
        job.model,
        entry.name,
        job.pooling,
        request.params(),
        request.instruction,
        job.truncation(),
        request.add_special_tokens is not False,
        entry.need,
        entry.pooling_admission.admit,
        job.run,
    )


def best_first(scores: Sequence[float], count: int | None) -> list[int]:
    """Where the best stand, `count` of them at the most; None or 0 for all."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[: count or len(scores)]


async def score(context: Context, call: Call) -> None:
    async with opened(context, call, ScoreRequest, *COMPARING) as job:
        pooled = await compare(comparison_of(job), *sides_of(job.request, chat_of(job)))
        rows = [
            {"index": index, "object": "score", "score": float(vector[0])}
            for index, vector in enumerate(pooled.vectors)
        ]
        await call.respond(envelope(call, "score", job.model_name, msgspec.json.encode(rows), usage_object(pooled)))


async def rerank(context: Context, call: Call) -> None:
    async with opened(context, call, RerankRequest, *COMPARING) as job:
        request, chat = job.request, chat_of(job)
        pooled = await compare(
            comparison_of(job),
            side_of([request.query], "query", request.max_tokens_per_query or 0, chat, is_list=False),
            side_of(request.items, request.items_name, request.max_tokens_per_doc or 0, chat),
        )
        scores = [float(vector[0]) for vector in pooled.vectors]
        best = best_first(scores, request.top_n)
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
