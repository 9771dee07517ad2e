"""POST /score and /rerank: a cross-encoder reads both texts together; of an embedder the two vectors are compared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from sensorium.api.context import Context
from sensorium.api.pooled import Job, opened, usage_object
from sensorium.api.protocol.content import Conversation
from sensorium.api.protocol.score import ComparingBody, RerankRequest, ScoreRequest, is_plain, plain_text
from sensorium.api.transport.asgi import Call
from sensorium.api.vectors import envelope
from sensorium.checkpoint.prompts import Role
from sensorium.errors import RequestError
from sensorium.prompt.encode import PairLimits, Truncation
from sensorium.serving.late import LatePrompts
from sensorium.serving.pairs import PairSide, Said
from sensorium.serving.pooled import Pooled, PooledInput, Vector
from sensorium.types import PoolingParams, Prompt


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison, and where it stands in the request."""

    items: Sequence[Any]
    name: str
    max_tokens: int  # of each item; 0 for all
    is_list: bool = True

    def place(self, index: int) -> str:
        return f"{self.name}[{index}]" if self.is_list else self.name


async def score(context: Context, call: Call) -> None:
    async with opened(context, call, ScoreRequest) as job:
        request, names, (left, right) = job.request, job.request.names, job.request.sides
        pooled = await compare(
            job,
            *(
                Side(items, name, most or 0, isinstance(getattr(request, name), list))
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
            job,
            Side([request.query], "query", request.max_tokens_per_query or 0, is_list=False),
            Side(request.items, request.items_name, request.max_tokens_per_doc or 0),
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


async def compare(job: Job[ComparingBody], left: Side, right: Side) -> Pooled:
    """A score, as a vector of one number, for every pair."""
    model = job.model
    if "score" in model.tasks:
        job.pooling.check_count(max(len(left.items), len(right.items)), right.name)
        return await _cross_encoded(job, left, right)
    if "classify" in model.all_tasks:
        raise RequestError(
            f"Scores need a classifier with one label; the model {job.entry.name!r} has "
            f"{len(model.labels)}. Use /classify.",
            param="model",
            code="unsupported_task",
        )
    if job.model.late is not None:
        job.pooling.check_count(len(left.items) + len(right.items), right.name)
        return await _by_tokens(job, job.model.late, left, right)
    job.entry.need("embed", doing="score")
    if not model.is_embedder:
        raise RequestError(
            f"The model {job.entry.name!r} generates text, and nothing in its files makes it an embedder or a "
            "reranker: angles between its states are no scores. If it is an embedder, start it with --task embed or "
            "--pooling last; a reranker that answers yes or no (as Qwen3-Reranker does) with --hf-overrides "
            """'{"classifier_from_token": ["no", "yes"]}' and the --chat-template of its pairs (say qwen3_reranker).""",
            param="model",
            code="unsupported_task",
        )
    job.pooling.check_count(len(left.items) + len(right.items), right.name)
    return await _by_angle(job, left, right)


# Cross-encoders


async def _cross_encoded(job: Job[ComparingBody], left: Side, right: Side) -> Pooled:
    queries, documents = ([_said(job, side, index) for index in range(len(side.items))] for side in (left, right))
    pairs = list(zip(_repeated(queries, len(documents)), documents, strict=True))
    places = [right.place(index) for index in range(len(documents))]
    truncation = job.truncation()
    limits = PairLimits(left.max_tokens, right.max_tokens, truncation.max_tokens if truncation is not None else None)
    with job.entry.pooling_admission.admit(len(pairs)) as permit:
        prompts = await job.pooling.pair_prompts(pairs, limits, places, job.request.instruction)
        permit.add_prompt_tokens(job.pooling.count_tokens(prompts))
        return await job.run(prompts, job.request.params())


def _repeated(items: list[Any], count: int) -> list[Any]:
    """One query stands against every document."""
    return items * count if len(items) == 1 else items


def _said(job: Job[ComparingBody], side: Side, index: int) -> PairSide:
    """A text, or what has media too where the model takes these and its template says where they stand."""
    item, place, takes = side.items[index], side.place(index), job.model.processor.modalities
    text = plain_text(item)
    if text is not None:
        return text
    if not takes or not job.model.has_pair_template:
        raise RequestError("This model compares texts only.", param=place, code="unsupported_modality")
    conversation: Conversation = item.conversation(place, takes, job.context.limits)
    return Said(conversation.messages[0].content, conversation.media)


# Embedders


async def _by_angle(job: Job[ComparingBody], left: Side, right: Side) -> Pooled:
    prompts, wanted = job.model.instructions, job.request.instruction
    before = prompts.of("query") if wanted is None else prompts.instructed(wanted), prompts.of("document")
    inputs = [
        [_input(job, side, index, prompt) for index in range(len(side.items))]
        for side, prompt in zip((left, right), before, strict=True)
    ]
    with job.entry.pooling_admission.admit(len(left.items) + len(right.items)) as permit:
        made = []
        adapters = prompts.adapter_of("query"), prompts.adapter_of("document")
        for side, given, adapter in zip((left, right), inputs, adapters, strict=True):
            places = [side.place(index) for index in range(len(given))]
            truncation = _narrower(job.truncation(), side.max_tokens)
            made += await job.pooling.make_prompts(given, places, truncation, adapter=adapter)
        permit.add_prompt_tokens(job.pooling.count_tokens(made))
        params = [_params(job, one, prompt) for given, prompt in zip(inputs, before, strict=True) for one in given]
        pooled = await job.run(made, params)
    queries, documents = pooled.vectors[: len(left.items)], pooled.vectors[len(left.items) :]
    pairs = zip(_repeated(queries, len(documents)), documents, strict=True)
    return replace(pooled, vectors=[cosine(query, document) for query, document in pairs])


# Late interaction


async def _by_tokens(job: Job[ComparingBody], late: LatePrompts, left: Side, right: Side) -> Pooled:
    job.entry.need("token_embed", doing="score")
    if job.request.instruction is not None:
        raise RequestError(
            "`instruction`: this model's queries have no place for one. Leave it out.",
            param="instruction",
            code="unsupported_field",
        )
    sides: tuple[tuple[Side, Role], ...] = ((left, "query"), (right, "document"))
    asked: list[tuple[Prompt, PoolingParams]] = []
    with job.entry.pooling_admission.admit(len(left.items) + len(right.items)) as permit:
        for side, role in sides:
            inputs = [_input(job, side, index, "") for index in range(len(side.items))]
            places = [side.place(index) for index in range(len(inputs))]
            truncation = _narrower(job.truncation(), side.max_tokens)
            asked += await job.pooling.late_prompts(late, inputs, places, truncation, role)
        prompts, params = [prompt for prompt, _ in asked], [params for _, params in asked]
        permit.add_prompt_tokens(job.pooling.count_tokens(prompts))
        pooled = await job.run(prompts, params)
    roles = [role for side, role in sides for _ in side.items]
    rows = [late.counted(*one) for one in zip(pooled.vectors, prompts, roles, strict=True)]
    queries, documents = rows[: len(left.items)], rows[len(left.items) :]
    pairs = list(zip(_repeated(queries, len(documents)), documents, strict=True))
    scores = await asyncio.to_thread(lambda: [late.score(*pair) for pair in pairs])
    return replace(pooled, vectors=[np.array([score], np.float32) for score in scores], others=())


def _params(job: Job[ComparingBody], given: PooledInput, prompt: str) -> PoolingParams:
    if not isinstance(given, str):
        return PoolingParams("embed")
    add = job.request.add_special_tokens is not False
    return PoolingParams("embed", prompt_tokens=job.model.prompts.unpooled_tokens(prompt, add_special_tokens=add))


def _input(job: Job[ComparingBody], side: Side, index: int, prompt: str) -> PooledInput:
    """`prompt` stands before texts."""
    item = side.items[index]
    if is_plain(item):
        return prompt + (plain_text(item) or "")
    conversation: Conversation = item.conversation(
        side.place(index), job.model.processor.modalities, job.context.limits
    )
    return conversation


def _narrower(truncation: Truncation | None, max_tokens: int) -> Truncation | None:
    if not max_tokens:
        return truncation
    return Truncation(max_tokens if truncation is None else min(max_tokens, truncation.max_tokens))


def cosine(one: Vector, other: Vector) -> Vector:
    """As a vector of one number. A vector of zeros is like nothing."""
    wide, other_wide = one.astype(np.float64), other.astype(np.float64)
    length = float(np.linalg.norm(wide) * np.linalg.norm(other_wide))
    return np.array([float(wide @ other_wide) / length if length else 0.0], np.float32)
