"""Texts, token ids and chats of one request -> what the model makes of their states, over HTTP and from Python."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from sensorium.checkpoint.prompts import Role, role_of
from sensorium.errors import RequestError
from sensorium.prompt.encode import Truncation
from sensorium.serving.late import LatePrompts
from sensorium.serving.pooled import Permit, Pooled, PooledInput, Pooling
from sensorium.types import PoolingParams, Prompt

_PROMPTED = frozenset({"embed", "token_embed", "sparse"})
"""Tasks of texts before which one of the model's prompts may stand."""


@dataclass(frozen=True, slots=True)
class PromptChoice:
    """How a request chooses the prompt before its texts: by name, or by what the texts are. `param` is the field that
    does it, None where none does."""

    prompt_name: str | None = None
    input_type: str | None = None
    param: str | None = None

    def __post_init__(self) -> None:
        """RequestError if both are given."""
        if self.prompt_name is not None and self.input_type is not None:
            raise RequestError(
                "`prompt_name` and `input_type` both choose a prompt; give one of them.", param="input_type"
            )


@dataclass(frozen=True, slots=True)
class Sequences:
    """What is asked for. `places` says where each input stands in the request; `max_tokens` bounds all of them
    together, None for the usual limit.

    `admit` lets so many prompts in, `run` computes them.
    """

    pooling: Pooling
    inputs: Sequence[PooledInput]
    places: Sequence[str]
    params: PoolingParams
    choice: PromptChoice
    truncation: Truncation | None
    admit: Callable[[int], AbstractContextManager[Permit]]
    run: Callable[[Sequence[Prompt], PoolingParams | Sequence[PoolingParams]], Awaitable[Pooled]]
    max_tokens: int | None = None

    @property
    def late(self) -> LatePrompts | None:
        """Where texts are written as queries or documents that are compared token by token."""
        return self.pooling.model.late if self.params.tasks == ("token_embed",) else None


async def pool(job: Sequences) -> tuple[Pooled, list[Prompt]]:
    """Vectors of all inputs, in their order, and their prompts. RequestError for a choice that the model or the task
    does not have."""
    if job.late is not None:
        return await _pool_tokens(job, job.late)
    prompt = _chosen_prompt(job)
    inputs, params, model = job.inputs, job.params, job.pooling.model
    if prompt:
        inputs = [prompt + text if isinstance(text, str) else text for text in inputs]
        unpooled = model.prompts.unpooled_tokens(prompt, add_special_tokens=job.pooling.frames_texts)
        params = replace(params, prompt_tokens=unpooled)
    with job.admit(len(inputs)) as permit:
        prompts = await job.pooling.make_prompts(
            inputs,
            job.places,
            job.truncation,
            embedded=params.tasks == ("embed",),
            adapter=model.instructions.adapter(job.choice.prompt_name, job.choice.input_type),
        )
        permit.add_prompt_tokens(job.pooling.count_tokens(prompts, job.max_tokens))
        return await job.run(prompts, params), prompts


def _chosen_prompt(job: Sequences) -> str:
    """What is to stand before the texts: the prompt that is chosen, else the model's default."""
    choice, tasks = job.choice, job.params.tasks
    if not _PROMPTED & set(tasks):
        if choice.param is not None:
            raise RequestError(
                f"`{choice.param}` goes with embeddings; the task here is {' and '.join(tasks)}.", param=choice.param
            )
        return ""
    try:
        prompt = job.pooling.model.instructions.chosen(choice.prompt_name, choice.input_type)
    except RequestError as error:
        if choice.param == "task":
            error.param = choice.param
        raise
    if any(isinstance(given, str) for given in job.inputs):
        return prompt
    if choice.param is not None and prompt:
        raise RequestError(
            f"`{choice.param}` puts a prompt before texts, but the request has token ids or messages.",
            param=choice.param,
        )
    return ""


async def _pool_tokens(job: Sequences, late: LatePrompts) -> tuple[Pooled, list[Prompt]]:
    """Vectors as they are compared: of queries if the request says so by its type, else of documents."""
    role = _role(job.choice)
    with job.admit(len(job.inputs)) as permit:
        asked = await job.pooling.late_prompts(late, job.inputs, job.places, job.truncation, role)
        prompts = [prompt for prompt, _ in asked]
        permit.add_prompt_tokens(job.pooling.count_tokens(prompts, job.max_tokens))
        pooled = await job.run(prompts, [replace(own, normalize=job.params.normalize) for _, own in asked])
    kept = [
        late.counted(vectors, prompt, role) if isinstance(given, str) else vectors
        for vectors, prompt, given in zip(pooled.vectors, prompts, job.inputs, strict=True)
    ]
    return replace(pooled, vectors=kept), prompts


def _role(choice: PromptChoice) -> Role:
    wanted = choice.prompt_name or choice.input_type
    role = "document" if wanted is None else role_of(wanted)
    if role is None:
        raise RequestError(f"This model reads queries and documents; {wanted!r} is neither.", param=choice.param)
    return role
