"""`AsyncLLM` for programs without an event loop: lists in, lists out."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from sensorium.errors import RequestError
from sensorium.llm.async_llm import AsyncLLM
from sensorium.llm.inputs import Chat, Compared, PooledInput, PromptInput, many_chats, many_prompts
from sensorium.llm.params import LoRARequest, PoolingParams, SamplingParams
from sensorium.llm.progress import progress
from sensorium.llm.recordings import Recording, many_recordings
from sensorium.llm.results import (
    Classification,
    Embedding,
    PooledData,
    PooledOutput,
    Ranked,
    RequestOutput,
    Score,
    Transcript,
)
from sensorium.types import PoolingTask

T = TypeVar("T")
R = TypeVar("R")
Params = SamplingParams | Sequence[SamplingParams] | None
MAX_NUM_SEQS = 256
"""Where nothing is said: lists of prompts want throughput, where a server's clients want their next token."""
WAITING = 4
"""Prompts that are under way for each sequence that the engine computes at a time."""


class LLM:
    """One model: `LLM(model).generate(["Hello"])`. The model is a folder or a hub id; None is the built-in one.
    Arguments are the flags of `sensorium serve`, vLLM's names for them among them.

    Usable from any thread, as a context manager too; `close` ends the engine, as the program's end does. Errors are
    SensoriumErrors: StartupError while loading, RequestError for what is wrong with a request.
    """

    def __init__(self, model: str | None = None, **arguments: Any) -> None:
        self._llm = AsyncLLM(model, **{"max_num_seqs": MAX_NUM_SEQS, **arguments})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sensorium", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _close, self._llm, self._loop, self._thread)
        try:
            self._run(self._llm.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the engine. Nothing happens the second time."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Answers to prompts, in their order; one SamplingParams for all or one for each. `use_tqdm` shows a bar on a
        terminal. `lora_request`: see `AsyncLLM.generate`."""
        given = many_prompts(prompts)
        ask = partial(self._llm.complete, lora_request=lora_request)
        return self._answers(given, sampling_params, ask, use_tqdm)

    def chat(
        self, messages: Chat | Sequence[Chat], sampling_params: Params = None, *, use_tqdm: bool = True, **fields: Any
    ) -> list[RequestOutput]:
        """Answers to one chat or several. See `AsyncLLM.chat`."""

        ask = partial(self._llm.complete_chat, **fields)
        return self._answers(many_chats(messages), sampling_params, ask, use_tqdm)

    def transcribe(
        self,
        recordings: Recording | Sequence[Recording],
        *,
        translates: bool = False,
        use_tqdm: bool = True,
        **fields: Any,
    ) -> list[Transcript]:
        """What is said in one recording or a list of them. See `AsyncLLM.transcribe`."""
        ask = partial(self._llm.transcribe, translates=translates, **fields)
        return self._each(many_recordings(recordings), ask, use_tqdm)

    def embed(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        pooling_params: PoolingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> list[PooledOutput[Embedding]]:
        return self._run(self._llm.embed(inputs, pooling_params, lora_request=lora_request))

    def classify(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        pooling_params: PoolingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> list[PooledOutput[Classification]]:
        return self._run(self._llm.classify(inputs, pooling_params, lora_request=lora_request))

    def encode(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[PooledOutput[PooledData]]:
        found = self._llm.encode(inputs, pooling_params, pooling_task=pooling_task, lora_request=lora_request)
        return self._run(found)

    def score(
        self,
        data_1: Compared | Sequence[Compared],
        data_2: Compared | Sequence[Compared],
        pooling_params: PoolingParams | None = None,
        *,
        instruction: str | None = None,
    ) -> list[PooledOutput[Score]]:
        """One score for each pair. See `AsyncLLM.score`."""
        return self._run(self._llm.score(data_1, data_2, pooling_params, instruction=instruction))

    def rerank(
        self,
        query: Compared,
        documents: Sequence[Compared],
        pooling_params: PoolingParams | None = None,
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[Ranked]:
        """The documents' places and scores, best first."""
        return self._run(self._llm.rerank(query, documents, pooling_params, top_n=top_n, instruction=instruction))

    def _answers(
        self,
        given: Sequence[T],
        params: Params,
        ask: Callable[[T, SamplingParams | None], Awaitable[RequestOutput]],
        shows: bool,
    ) -> list[RequestOutput]:
        each = [params] * len(given) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(given):
            raise RequestError(
                f"There are {len(given)} prompts and {len(each)} sampling_params: give one for all, or one for each.",
                param="sampling_params",
            )
        return self._each(list(zip(given, each, strict=True)), lambda pair: ask(*pair), shows)

    def _each(self, given: Sequence[T], ask: Callable[[T], Awaitable[R]], shows: bool) -> list[R]:
        """The answers to all, in their order; as many at a time as the engine takes."""
        limit = WAITING * self._llm.model.client.config.max_num_seqs

        async def all_of_them() -> list[R]:
            places = asyncio.Semaphore(limit)
            with progress(len(given), shown=shows) as advance:

                async def one(asked: T) -> R:
                    async with places:
                        found = await ask(asked)
                    advance()
                    return found

                return list(await asyncio.gather(*map(one, given)))

        return self._run(all_of_them())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # Ctrl-C ends what it waited for


def _close(llm: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(llm.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
