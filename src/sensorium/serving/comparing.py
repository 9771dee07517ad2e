"""Two sides compared, pair by pair: a cross-encoder reads both together; of embedders the vectors are compared."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from sensorium.checkpoint.prompts import Role
from sensorium.errors import RequestError
from sensorium.prompt.encode import PairLimits, Truncation
from sensorium.serving.late import LatePrompts
from sensorium.serving.model import ServedModel
from sensorium.serving.pairs import PairSide, Said
from sensorium.serving.pooled import Chat, Permit, Pooled, PooledInput, Pooling, Vector
from sensorium.types import PoolingParams, Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One of a side. `text` is None for what has media; `chat` makes a conversation of it, and is None for a text that
    stands before the model as it is. It raises RequestError for what the model does not take."""

    text: str | None
    chat: Callable[[], Chat] | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison, and where it stands in the request."""

    items: Sequence[Item]
    name: str
    max_tokens: int  # of each item; 0 for all
    is_list: bool = True

    def place(self, index: int) -> str:
        return f"{self.name}[{index}]" if self.is_list else self.name


@dataclass(frozen=True, slots=True)
class Comparison:
    """Who asks, and what all pairs share. `name` is the model's, for messages; `params` are those of a cross-encoder's
    scores; `frames_texts`: texts have special tokens around them.

    `need(task, doing=)` raises RequestError unless the model does the task, `admit` lets so many prompts in, `run`
    computes them.
    """

    model: ServedModel
    name: str
    pooling: Pooling
    params: PoolingParams
    instruction: str | None
    truncation: Truncation | None
    frames_texts: bool
    need: Callable[..., object]
    admit: Callable[[int], AbstractContextManager[Permit]]
    run: Callable[[Sequence[Prompt], PoolingParams | Sequence[PoolingParams]], Awaitable[Pooled]]


async def compare(job: Comparison, left: Side, right: Side) -> Pooled:
    """A score, as a vector of one number, for every pair."""
    model = job.model
    if "score" in model.tasks:
        job.pooling.check_count(max(len(left.items), len(right.items)), right.name)
        return await _cross_encoded(job, left, right)
    if "classify" in model.all_tasks:
        raise RequestError(
            f"Scores need a classifier with one label; the model {job.name!r} has {len(model.labels)}. Use /classify.",
            param="model",
            code="unsupported_task",
        )
    if job.model.late is not None:
        job.pooling.check_count(len(left.items) + len(right.items), right.name)
        return await _by_tokens(job, job.model.late, left, right)
    job.need("embed", doing="score")
    if not model.is_embedder:
        raise RequestError(
            f"The model {job.name!r} generates text, and nothing in its files makes it an embedder or a "
            "reranker: angles between its states are no scores. If it is an embedder, start it with --task embed or "
            "--pooling last; a reranker that answers yes or no (as Qwen3-Reranker does) with --hf-overrides "
            """'{"classifier_from_token": ["no", "yes"]}' and the --chat-template of its pairs (say qwen3_reranker).""",
            param="model",
            code="unsupported_task",
        )
    job.pooling.check_count(len(left.items) + len(right.items), right.name)
    return await _by_angle(job, left, right)


# Cross-encoders


async def _cross_encoded(job: Comparison, left: Side, right: Side) -> Pooled:
    queries, documents = ([_said(job, side, index) for index in range(len(side.items))] for side in (left, right))
    pairs = list(zip(_repeated(queries, len(documents)), documents, strict=True))
    places = [right.place(index) for index in range(len(documents))]
    truncation = job.truncation
    limits = PairLimits(left.max_tokens, right.max_tokens, truncation.max_tokens if truncation is not None else None)
    with job.admit(len(pairs)) as permit:
        prompts = await job.pooling.pair_prompts(pairs, limits, places, job.instruction)
        permit.add_prompt_tokens(job.pooling.count_tokens(prompts))
        return await job.run(prompts, job.params)


def _repeated(items: list[T], count: int) -> list[T]:
    """One query stands against every document."""
    return items * count if len(items) == 1 else items


def _said(job: Comparison, side: Side, index: int) -> PairSide:
    """A text, or what has media too where the model takes these and its template says where they stand."""
    item = side.items[index]
    if item.text is not None:
        return item.text
    if item.chat is None or not job.model.processor.modalities or not job.model.has_pair_template:
        raise RequestError("This model compares texts only.", param=side.place(index), code="unsupported_modality")
    chat = item.chat()
    return Said(chat.messages[0].content, chat.media)


# Embedders


async def _by_angle(job: Comparison, left: Side, right: Side) -> Pooled:
    prompts, wanted = job.model.instructions, job.instruction
    before = prompts.of("query") if wanted is None else prompts.instructed(wanted), prompts.of("document")
    inputs = [[_input(item, prompt) for item in side.items] for side, prompt in zip((left, right), before, strict=True)]
    with job.admit(len(left.items) + len(right.items)) as permit:
        made = []
        adapters = prompts.adapter_of("query"), prompts.adapter_of("document")
        for side, given, adapter in zip((left, right), inputs, adapters, strict=True):
            places = [side.place(index) for index in range(len(given))]
            truncation = _narrower(job.truncation, side.max_tokens)
            made += await job.pooling.make_prompts(given, places, truncation, adapter=adapter)
        permit.add_prompt_tokens(job.pooling.count_tokens(made))
        params = [_params(job, one, prompt) for given, prompt in zip(inputs, before, strict=True) for one in given]
        pooled = await job.run(made, params)
    queries, documents = pooled.vectors[: len(left.items)], pooled.vectors[len(left.items) :]
    pairs = zip(_repeated(queries, len(documents)), documents, strict=True)
    return replace(pooled, vectors=[cosine(query, document) for query, document in pairs])


# Late interaction


async def _by_tokens(job: Comparison, late: LatePrompts, left: Side, right: Side) -> Pooled:
    job.need("token_embed", doing="score")
    if job.instruction is not None:
        raise RequestError(
            "`instruction`: this model's queries have no place for one. Leave it out.",
            param="instruction",
            code="unsupported_field",
        )
    sides: tuple[tuple[Side, Role], ...] = ((left, "query"), (right, "document"))
    asked: list[tuple[Prompt, PoolingParams]] = []
    with job.admit(len(left.items) + len(right.items)) as permit:
        for side, role in sides:
            inputs = [_input(item, "") for item in side.items]
            places = [side.place(index) for index in range(len(inputs))]
            truncation = _narrower(job.truncation, side.max_tokens)
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


def _params(job: Comparison, given: PooledInput, prompt: str) -> PoolingParams:
    if not isinstance(given, str):
        return PoolingParams("embed")
    unpooled = job.model.prompts.unpooled_tokens(prompt, add_special_tokens=job.frames_texts)
    return PoolingParams("embed", prompt_tokens=unpooled)


def _input(item: Item, prompt: str) -> PooledInput:
    """`prompt` stands before texts."""
    return prompt + (item.text or "") if item.chat is None else item.chat()


def _narrower(truncation: Truncation | None, max_tokens: int) -> Truncation | None:
    if not max_tokens:
        return truncation
    return Truncation(max_tokens if truncation is None else min(max_tokens, truncation.max_tokens))


def cosine(one: Vector, other: Vector) -> Vector:
    """As a vector of one number. A vector of zeros is like nothing."""
    wide, other_wide = one.astype(np.float64), other.astype(np.float64)
    length = float(np.linalg.norm(wide) * np.linalg.norm(other_wide))
    return np.array([float(wide @ other_wide) / length if length else 0.0], np.float32)
