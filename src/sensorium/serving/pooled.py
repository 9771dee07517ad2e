"""Many inputs in, vectors out in their order: what every endpoint that pools shares. Knows no JSON.

All prompts of a request are sent to the engine at once. A text longer than the context is embedded in chunks where the
operator allows it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.prompts import Role
from sensorium.config import Limits
from sensorium.errors import (
    ContextLengthError,
    EngineError,
    RequestError,
    SensoriumError,
    UnavailableError,
    engine_failure,
)
from sensorium.media.source import MediaSource
from sensorium.prompt.encode import PairLimits, Truncation
from sensorium.prompt.messages import Message, TextPart
from sensorium.serving.concurrency import all_in_order
from sensorium.serving.late import LatePrompts
from sensorium.serving.media import MediaTiming
from sensorium.serving.model import ServedModel
from sensorium.serving.pairs import PairOptions, PairSide, Said
from sensorium.types import EngineRequest, PoolingParams, Prompt

if TYPE_CHECKING:
    from sensorium.ipc.client import OutputStream

Vector = NDArray[np.float32]

CHATS_AT_ONCE = 8
"""Conversations whose media are fetched and decoded at the same time."""
SUBMITTED_AT_ONCE = 256
"""Requests that are sent before others have their turn."""


class Chat(Protocol):
    """A conversation as an input: media stand in the order of their places in the messages."""

    @property
    def messages(self) -> tuple[Message, ...]: ...

    @property
    def media(self) -> tuple[MediaSource, ...]: ...


@dataclass(frozen=True, slots=True)
class TextChat:
    """A text as all that a user says."""

    text: str
    media: tuple[MediaSource, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        return (Message("user", (TextPart(self.text),)),)


PooledInput = str | Sequence[int] | Chat
"""One sequence that is asked for: text, token ids or a chat."""


class PoolingObserver(Protocol):
    """Who counts."""

    def observe_prompt(self, text_s: float, media: Iterable[MediaTiming] = ()) -> None:
        """Making a prompt (or all texts' prompts) took so long."""

    def pooled(self, cached_tokens: int, queue_s: float, prefill_s: float) -> None:
        """A vector came; so many tokens of its prompt were cached, so long it waited in the engine and was computed."""

    def pooling_ended(self, prompt_tokens: Sequence[int], done: int, failure: str, seconds: float) -> None:
        """With the length of each prompt and how many of them have their vector; the others ended by `failure`, which
        is abort or error. `seconds` since the request came."""


class Permit(Protocol):
    """Room for a request's prompts, whose tokens are told when they are known."""

    def add_prompt_tokens(self, count: int) -> None: ...


@dataclass(frozen=True, slots=True)
class PoolingOptions:
    """What all inputs of a request share. `template` are options of `PromptBuilder.prepare_chat`; `add_special_tokens`
    None adds them to texts and not to chats."""

    tenant: bytes = b""
    salt: bytes = b""
    priority: int = 0
    add_special_tokens: bool | None = None
    adapter: int = 0
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frames_texts(self) -> bool:
        return self.add_special_tokens is not False


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vectors of all prompts: [dim] each, or [tokens, dim] for tasks that look at tokens."""

    vectors: list[Vector]
    prompt_tokens: int
    media_tokens: int = 0  # of those
    others: tuple[tuple[Vector, ...], ...] = ()  # of each prompt, what `PoolingParams.also` asked for


class Pooling:
    """One request. `started_s` is when it came, on perf_counter's clock. `on_prompts` is called when all prompts are
    made: what they were made of can go."""

    def __init__(
        self,
        model: ServedModel,
        limits: Limits,
        options: PoolingOptions,
        observer: PoolingObserver,
        *,
        started_s: float,
        on_prompts: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self._limits = limits
        self._options = options
        self._observer = observer
        self._started_s = started_s
        self._on_prompts = on_prompts

    @property
    def frames_texts(self) -> bool:
        """Texts have special tokens around them."""
        return self._options.frames_texts

    def check_count(self, count: int, param: str) -> None:
        """RequestError if there are more inputs than a request may have."""
        most = self._limits.max_embedding_inputs
        if count > most:
            raise RequestError(
                f"One request may have at most {most} inputs; this has {count}.", param=param, code="too_many_inputs"
            )

    def count_tokens(self, prompts: Sequence[Prompt], max_tokens: int | None = None) -> int:
        """Tokens of all prompts together; ContextLengthError above the limit, or above `max_tokens`."""
        total = sum(len(prompt.token_ids) for prompt in prompts)
        limit = self._limits.max_embedding_tokens
        most = limit if max_tokens is None else min(max_tokens, limit)
        if total > most:
            raise ContextLengthError(
                f"The inputs have {total} tokens together; one request may have {most}. Send them in several requests.",
                param="input",
            )
        return total

    async def make_prompts(
        self,
        inputs: Sequence[PooledInput],
        places: Sequence[str],
        truncation: Truncation | None,
        *,
        embedded: bool = False,
        adapter: int = 0,
    ) -> list[Prompt]:
        """A prompt of each input. `places` says where it stands in the request. `embedded`: texts may be longer than
        the context, if the operator allows it. `adapter`: of the model's weights, 0 for none."""
        if self.model.embeds_texts_as_chats:
            inputs = [TextChat(given) if isinstance(given, str) else given for given in inputs]
        texts = {index: given for index, given in enumerate(inputs) if isinstance(given, str | list)}
        chats: dict[int, Any] = {index: given for index, given in enumerate(inputs) if index not in texts}
        made: dict[int, Prompt] = {}
        if texts:
            start_s = time.perf_counter()
            prompts = await self.model.prompts.text_prompts(
                list(texts.values()),
                add_special_tokens=self.frames_texts,
                truncation=truncation,
                params=[places[index] for index in texts],
                embedded=embedded,
                tenant=self._options.tenant,
            )
            made = dict(zip(texts, prompts, strict=True))
            self._observer.observe_prompt(time.perf_counter() - start_s)
        self._check_media(list(chats.values()))
        places_of_chats = list(chats)
        for start in range(0, len(chats), CHATS_AT_ONCE):
            group = places_of_chats[start : start + CHATS_AT_ONCE]
            prompts = await all_in_order(self._chat_prompt(chats[index], truncation) for index in group)
            made.update(zip(group, prompts, strict=True))
            self.count_tokens(list(made.values()))
        self._on_prompts()
        prompts = [made[index] for index in range(len(inputs))]
        return [_with_adapter(prompt, adapter) for prompt in prompts] if adapter else prompts

    def _check_media(self, chats: Sequence[Chat]) -> None:
        if len(chats) > 1:
            self._check_media_count(sum(len(chat.media) for chat in chats), "messages")

    def _check_media_count(self, count: int, param: str) -> None:
        if count > (most := self._limits.max_embedding_media):
            raise RequestError(
                f"The inputs have {count} media together; one request may have {most}.",
                param=param,
                code="too_many_media",
            )

    async def _chat_prompt(self, chat: Chat, truncation: Truncation | None) -> Prompt:
        prepared = await self.model.prompts.prepare_chat(
            chat.messages,
            chat.media,
            add_special_tokens=bool(self._options.add_special_tokens),
            pooled=True,
            truncation=truncation,
            tenant=self._options.tenant,
            salt=self._options.salt,
            **self._options.template,
        )
        self._observer.observe_prompt(prepared.text_s, prepared.media)
        return prepared.prompt

    async def pair_prompts(
        self,
        pairs: Sequence[tuple[PairSide, PairSide]],
        limits: PairLimits,
        places: Sequence[str],
        instruction: str | None = None,
    ) -> list[Prompt]:
        """One prompt of each pair of texts, for cross-encoders. `places` says where its second text stands."""
        media = {id(one) for pair in pairs for side in pair if isinstance(side, Said) for one in side.media}
        self._check_media_count(len(media), places[0])
        options = PairOptions(
            self._options.tenant,
            self._options.salt,
            instruction,
            self._options.template.get("template_kwargs"),
            self._options.template.get("mm_processor_kwargs"),
        )
        prompts = await self.model.pair_prompts(pairs, limits, params=places, options=options)
        self._on_prompts()
        return prompts

    async def late_prompts(
        self,
        late: LatePrompts,
        inputs: Sequence[PooledInput],
        places: Sequence[str],
        truncation: Truncation | None,
        role: Role,
    ) -> list[tuple[Prompt, PoolingParams]]:
        """A prompt of each input of a model of late interaction, and how it is pooled: texts as its queries or its
        documents are written, token ids and chats as they are."""
        texts = {index: given for index, given in enumerate(inputs) if isinstance(given, str)}
        written = await late.texts(
            list(texts.values()),
            role,
            most=None if truncation is None else truncation.max_tokens,
            params=[places[index] for index in texts],
            tenant=self._options.tenant,
        )
        made = dict(zip(texts, written, strict=True))
        others = [index for index in range(len(inputs)) if index not in texts]
        prompts = await self.make_prompts([inputs[i] for i in others], [places[i] for i in others], truncation)
        made.update((i, (prompt, PoolingParams("token_embed"))) for i, prompt in zip(others, prompts, strict=True))
        return [made[index] for index in range(len(inputs))]

    async def run(self, prompts: Sequence[Prompt], params: PoolingParams | Sequence[PoolingParams]) -> Pooled:
        """Have the engine compute the prompts, with the same params or each with its own. If one fails, the request
        fails; leaving early ends them all."""
        each = [params] * len(prompts) if isinstance(params, PoolingParams) else params
        pieces = [self._pieces(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        computed = await self._compute([piece for some in pieces for piece in some])
        vectors = iter([vector for vector, *_ in computed])
        joined = [
            self._mean([(next(vectors), len(piece.token_ids)) for piece, _ in some], own)
            for some, own in zip(pieces, each, strict=True)
        ]
        media_tokens = sum(span.length for prompt in prompts for span in prompt.spans)
        others = tuple(tuple(more) for _, *more in computed)
        return Pooled(joined, sum(len(prompt.token_ids) for prompt in prompts), media_tokens, others)

    def _pieces(self, prompt: Prompt, params: PoolingParams) -> list[tuple[Prompt, PoolingParams]]:
        """What is computed of one prompt: all of it, or a longer text in chunks of the context's length."""
        ids, size = prompt.token_ids, self.model.max_model_len
        if len(ids) <= size:
            return [(prompt, params)]
        types = prompt.token_types
        chunks = [
            Prompt(ids[start : start + size], token_types=None if types is None else types[start : start + size])
            for start in range(0, len(ids), size)
        ]
        prompts_end = min(params.prompt_tokens, size - 1)
        return [
            (chunk, replace(params, prompt_tokens=0 if index else prompts_end)) for index, chunk in enumerate(chunks)
        ]

    def _mean(self, weighted: Sequence[tuple[Vector, int]], params: PoolingParams) -> Vector:
        """The mean of chunks' vectors by their lengths, as long as the model's vectors are."""
        if len(weighted) == 1:
            return weighted[0][0]
        mean = np.average([vector for vector, _ in weighted], axis=0, weights=[weight for _, weight in weighted])
        normalize = self.model.normalizes if params.normalize is None else params.normalize
        length = float(np.linalg.norm(mean)) if normalize else 1.0
        return (mean / (length or 1.0)).astype(np.float32)

    async def _compute(self, asked: Sequence[tuple[Prompt, PoolingParams]]) -> list[tuple[Vector, ...]]:
        client = self.model.client
        streams: list[OutputStream] = []
        vectors: list[tuple[Vector, ...]] = []
        failure = "abort"
        options = self._options
        try:
            for prompt, params in asked:
                request = EngineRequest(
                    client.next_id(),
                    prompt,
                    pooling=params,
                    priority=options.priority,
                    salt=options.salt,
                    turn=options.tenant,
                    adapter=options.adapter,
                )
                streams.append(client.submit(request))
                if len(streams) % SUBMITTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
            for stream in streams:
                vectors.append(await vectors_of(stream, self._observer))
        except SensoriumError:
            failure = "error"
            raise
        finally:
            for stream in streams:
                stream.abort()
            lengths = [len(prompt.token_ids) for prompt, _ in asked]
            self._observer.pooling_ended(lengths, len(vectors), failure, time.perf_counter() - self._started_s)
        return vectors


async def vectors_of(stream: OutputStream, observer: PoolingObserver) -> tuple[Vector, ...]:
    """The one answer of a request that pools: its vector, and others of the same pass."""
    async for output in stream:
        if output.finish_reason == "error":
            raise engine_failure(output.error)
        if output.finish_reason == "abort":
            raise UnavailableError("The request was ended by the server.")
        if output.vector is not None:
            observer.pooled(output.cached_tokens, output.queue_s, output.prefill_s)
            vectors = (output.vector, *output.others)
            if not all(np.isfinite(vector).all() for vector in vectors):
                raise EngineError("The model's output for this request is not a number.")
            return vectors
    raise EngineError


def _with_adapter(prompt: Prompt, adapter: int) -> Prompt:
    """Its number is every token's type: models with adapters have no others."""
    return replace(prompt, token_types=np.full(len(prompt.token_ids), adapter, np.int32))
