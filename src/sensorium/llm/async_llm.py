"""One model in this program: its engine in a process of its own, everything else on this event loop."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from sensorium.api.chat import Chat
from sensorium.api.embeddings import check_dimensions
from sensorium.api.generated import Asker
from sensorium.api.protocol.audio import AudioRequest
from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.common import Body, UnknownFields
from sensorium.api.protocol.completion import CompletionRequest
from sensorium.api.protocol.content import Conversation, conversation
from sensorium.api.protocol.items import InputItem
from sensorium.api.protocol.pooling import PoolingRequest
from sensorium.api.protocol.score import ComparingBody, RerankRequest, ScoreRequest
from sensorium.api.protocol.validation import parse_json
from sensorium.api.recordings import Upload
from sensorium.api.score import best_first, side_of, sides_of
from sensorium.config import Limits, ServeOptions
from sensorium.errors import RequestError, SensoriumError
from sensorium.llm.answers import Answers, Unobserved
from sensorium.llm.inputs import Chat as Messages
from sensorium.llm.inputs import Compared, PooledInput, PromptInput, is_chat, many, parts_of
from sensorium.llm.media import PythonParts, source_of
from sensorium.llm.options import options_of
from sensorium.llm.params import LoRARequest, PoolingParams, SamplingParams
from sensorium.llm.recordings import Recording, transcript
from sensorium.llm.results import (
    Classification,
    Embedding,
    PooledData,
    PooledOutput,
    Ranked,
    RequestOutput,
    Score,
    Transcript,
    Vector,
)
from sensorium.media.source import MediaSource
from sensorium.serving.adapters import AdapterTable
from sensorium.serving.comparing import Comparison, Side, compare
from sensorium.serving.generation import GenerationRequest, generate
from sensorium.serving.model import ServedModel
from sensorium.serving.pooled import Permit, Pooling, PoolingOptions
from sensorium.serving.sequences import Sequences, pool
from sensorium.startup.model import Starting, adapters_of, media_loader, opened, start
from sensorium.types import INT32_MAX, PoolingTask, Prompt

Request = TypeVar("Request", bound=Body)
AT_ONCE = 256
"""Inputs that are made into prompts and sent before the first is waited for."""


@dataclass(frozen=True, slots=True)
class _Program:
    """The Asker of this program: nobody else's turns, nobody else's caches."""

    model: ServedModel
    name: str
    limits: Limits
    turn: bytes = b""
    observer: Unobserved = field(default_factory=Unobserved)

    def salt(self, own: str | None = None) -> bytes:
        return b"" if own is None else own.encode()


class _Unlimited:
    """A permit where nobody is kept out."""

    def add_prompt_tokens(self, count: int) -> None: ...


def _unlimited(count: int) -> AbstractContextManager[Permit]:
    return nullcontext(_Unlimited())


class _ProgramChat(Chat):
    """A chat whose media may be the program's objects."""

    def __init__(self, request: ChatRequest, parts: PythonParts) -> None:
        super().__init__(request)
        self._parts = parts

    def conversation(self, work: Asker) -> Conversation:
        found = super().conversation(work)
        return replace(found, media=self._parts.with_objects(found.media))


class AsyncLLM:
    """`async with AsyncLLM(model) as llm`. The model is a folder or a hub id; None is the built-in one. Arguments are
    the flags of `sensorium serve` (max_model_len, quantization, ...), vLLM's names for them among them.

    Requests may run at the same time; the engine computes them together. Errors are SensoriumErrors: StartupError while
    loading, RequestError (a ValueError of ours, with `param`) for what is wrong with a request.
    """

    def __init__(self, model: str | None = None, **arguments: Any) -> None:
        self._options: ServeOptions = options_of(model, arguments)
        self._stack = AsyncExitStack()
        self._program: _Program | None = None
        self._adapters = AdapterTable()
        self._ids = itertools.count()
        self._unknown = UnknownFields()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Returns when the model is loaded; StartupError says in one line why it cannot be."""
        starting: Starting = start(self._options, lambda phase, fraction: None)
        loader = media_loader(starting.options)
        self._stack.push_async_callback(loader.aclose)
        try:
            model = await self._stack.enter_async_context(opened(starting, loader))
            await starting.client.wait_ready()
            model.check_task()
            self._adapters = AdapterTable(adapters_of(self._options.load), self._options.load.download_dir)
            await self._adapters.load_all(starting.client)
        except BaseException:
            await self._stack.aclose()
            raise
        self._program = _Program(model, starting.names[0], starting.options.limits)

    async def aclose(self) -> None:
        """End what runs, and the engine. Nothing happens the second time."""
        self._program = None
        await self._stack.aclose()

    @property
    def model(self) -> ServedModel:
        return self._opened.model

    @property
    def _opened(self) -> _Program:
        if self._program is None:
            raise SensoriumError("This model is not open: use `async with AsyncLLM(...)`, or start() first.")
        return self._program

    # Text.

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer as it comes: every output has all of it so far, the last one is finished. Leaving ends it.
        `lora_request` is an adapter of the model, one of `lora` (of this object) by its name, or another one."""
        asked = await self._text_request(prompt, sampling_params)
        async with self._begun(*asked, request_id, lora_request) as answers:
            async for output in answers.stream():
                yield output

    async def complete(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> RequestOutput:
        """`generate`, whole."""
        asked = await self._text_request(prompt, sampling_params)
        async with self._begun(*asked, request_id, lora_request) as answers:
            return await answers.whole()

    async def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
        **fields: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """An answer to OpenAI's messages, as it comes. Parts may hold the program's own objects: {"type": "image",
        "image": a PIL image, an array, a path or bytes}, and so for video and audio. `fields` are a request's others,
        such as tools, tool_choice, chat_template_kwargs, continue_final_message or enable_thinking."""
        asked = await self._chat_request(messages, sampling_params, fields)
        async with self._begun(asked, None, request_id, lora_request) as answers:
            async for output in answers.stream():
                yield output

    async def complete_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
        **fields: Any,
    ) -> RequestOutput:
        """`chat`, whole."""
        asked = await self._chat_request(messages, sampling_params, fields)
        async with self._begun(asked, None, request_id, lora_request) as answers:
            return await answers.whole()

    async def _text_request(
        self, prompt: PromptInput, sampling_params: SamplingParams | None
    ) -> tuple[GenerationRequest, str | None]:
        """What is sent to the engine, and the prompt if it is text."""
        program = self._need("generate")
        text, media = parts_of(prompt)
        sampling = sampling_params or SamplingParams()
        fields = {**sampling.fields_of_request(), "logprobs": sampling.logprobs}
        request = self._read(CompletionRequest, {"prompt": text, **fields})
        request.check(program.limits)
        made = await self._prompt(request, media)
        grammar = await program.model.grammars.held(request.form(), b"")
        params = replace(request.sampling(program.model.defaults, len(made.token_ids)), grammar=grammar)
        asked = request.generation(((made, params),), b"", continues=True)
        return asked, text if isinstance(text, str) else None

    async def _chat_request(
        self, messages: Messages, sampling_params: SamplingParams | None, fields: Mapping[str, Any]
    ) -> GenerationRequest:
        program = self._need("generate")
        parts, sampling = PythonParts(), sampling_params or SamplingParams()
        given = sampling.fields_of_request()
        if sampling.logprobs is not None:
            given |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        request = self._read(ChatRequest, {**given, **fields, "messages": parts.replaced(messages)})
        request.check(program.limits, self._options.server)
        return await _ProgramChat(request, parts).prepare(program)

    @asynccontextmanager
    async def _begun(
        self, asked: GenerationRequest, text: str | None, request_id: str | None, lora_request: LoRARequest | None
    ) -> AsyncIterator[Answers]:
        """It ends with the block, whether or not it is whole."""
        program = self._opened
        async with self._adapter(lora_request) as adapter:
            asked = replace(asked, keeps_ids=True, adapter=adapter)
            with generate(program.model, asked, program.observer, started_s=perf_counter()) as generation:
                yield Answers(generation, program.model.tokenizer, request_id or self._name(), text)

    @asynccontextmanager
    async def _adapter(self, asked: LoRARequest | None) -> AsyncIterator[int]:
        """The engine's number of an adapter that was loaded, now if need be; 0 for none."""
        if asked is None:
            yield 0
            return
        client, table = self.model.client, self._adapters
        found = table.find(asked.lora_name)
        if found is None or (asked.lora_path and found.path != asked.lora_path):
            if not asked.lora_path:
                raise RequestError(
                    f"The adapter {asked.lora_name!r} does not exist; `lora_path` says where it is.",
                    param="lora_request",
                )
            found = await table.ensure(client, asked.lora_name, asked.lora_path)
        with table.use(found, lambda: client):
            yield found.number

    async def transcribe(
        self, recording: Recording, *, translates: bool = False, request_id: str | None = None, **fields: Any
    ) -> Transcript:
        """What is said in a recording. `fields` are those of /v1/audio/transcriptions: language, prompt, temperature,
        response_format ("verbose_json" for times, "srt" or "vtt" for a text of subtitles), timestamp_granularities
        (["word"]), ... `translates`: into English, as /v1/audio/translations has it."""
        if "transcribe" not in self.model.tasks:
            self._need("generate", doing="transcribe")
        request = self._read(AudioRequest, fields)
        request.check()
        if request.stream:
            raise RequestError("A transcript comes whole: leave `stream` out.", param="stream")
        upload = Upload(request, source_of("audio", recording, "recording"), translates=translates)
        return await transcript(self._opened, upload, request_id or self._name())

    # Vectors.

    async def embed(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        pooling_params: PoolingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> list[PooledOutput[Embedding]]:
        """A vector of each text, list of token ids or chat (a list of messages)."""
        own = pooling_params or PoolingParams()
        check_dimensions(self._opened, own.dimensions)
        found = await self._pooled(inputs, "embed", own, lora_request)
        return [PooledOutput(self._name(), Embedding(vector), ids) for vector, ids in found]

    async def classify(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        pooling_params: PoolingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> list[PooledOutput[Classification]]:
        labels = self._opened.model.labels
        found = await self._pooled(inputs, "classify", pooling_params or PoolingParams(), lora_request)
        return [
            PooledOutput(self._name(), Classification(probs, dict(enumerate(labels)).get(int(probs.argmax()))), ids)
            for probs, ids in found
        ]

    async def encode(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[PooledOutput[PooledData]]:
        """What the model makes of its states for a task: embed, classify, token_embed, token_classify; None: the first
        that it does."""
        task = pooling_task or self._opened.model.default_pooling_task or "embed"
        found = await self._pooled(inputs, task, pooling_params or PoolingParams(), lora_request)
        return [PooledOutput(self._name(), PooledData(data), ids) for data, ids in found]

    async def score(
        self,
        data_1: Compared | Sequence[Compared],
        data_2: Compared | Sequence[Compared],
        pooling_params: PoolingParams | None = None,
        *,
        instruction: str | None = None,
    ) -> list[PooledOutput[Score]]:
        """One score for each pair: 1 and 1, 1 and N, or N and N. A reranker reads both together; of an embedder the
        vectors are compared."""
        parts = PythonParts()
        request = self._read(
            ScoreRequest, {"data_1": parts.content(data_1), "data_2": parts.content(data_2), "instruction": instruction}
        )
        request.check(self._opened.limits, self._options.server)
        found = await self._scores(request, sides_of(request, self._chat_of(parts)), pooling_params)
        return [PooledOutput(self._name(), Score(one), []) for one in found]

    async def rerank(
        self,
        query: Compared,
        documents: Sequence[Compared],
        pooling_params: PoolingParams | None = None,
        *,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[Ranked]:
        """The documents' places and scores, best first."""
        parts = PythonParts()
        if not documents:
            raise RequestError("`documents` must not be empty.", param="documents")
        request = self._read(
            RerankRequest,
            {"query": parts.content(query), "documents": parts.content(documents), "instruction": instruction},
        )
        request.check(self._opened.limits, self._options.server)
        chat = self._chat_of(parts)
        sides = side_of([request.query], "query", 0, chat, is_list=False), side_of(request.items, "documents", 0, chat)
        scores = await self._scores(request, sides, pooling_params)
        return [Ranked(index, scores[index]) for index in best_first(scores, top_n)]

    async def _scores(
        self, request: ComparingBody, sides: tuple[Side, Side], params: PoolingParams | None
    ) -> list[float]:
        program, own = self._opened, params or PoolingParams()
        pooling = self._pooling()
        comparison = Comparison(
            program.model,
            program.name,
            pooling,
            own.of("score"),
            request.instruction,
            program.model.truncation(own.truncate_prompt_tokens, None),
            True,
            self._need,
            _unlimited,
            pooling.run,
        )
        return [float(vector[0]) for vector in (await compare(comparison, *sides)).vectors]

    def _chat_of(self, parts: PythonParts) -> Callable[[InputItem, str], Conversation]:
        """Conversations of contents in which there may be the program's objects."""

        def chat(item: InputItem, place: str) -> Conversation:
            found = item.conversation(place, self.model.processor.modalities, self._opened.limits)
            return replace(found, media=parts.with_objects(found.media))

        return chat

    def _pooling(self, adapter: int = 0) -> Pooling:
        """With as many inputs as the program likes: it asks itself."""
        program = self._opened
        limits = replace(
            program.limits,
            max_embedding_inputs=INT32_MAX,
            max_embedding_tokens=INT32_MAX,
            max_embedding_media=INT32_MAX,
        )
        return Pooling(
            program.model, limits, PoolingOptions(adapter=adapter), program.observer, started_s=perf_counter()
        )

    async def _pooled(
        self,
        inputs: Sequence[PooledInput] | PooledInput,
        task: PoolingTask,
        own: PoolingParams,
        lora_request: LoRARequest | None,
    ) -> list[tuple[Vector, list[int]]]:
        """Each input's vector, and its prompt's token ids."""
        self._need(task)
        given = [self._input(one) for one in many(inputs)]
        async with self._adapter(lora_request) as adapter:
            return await self._pooled_by(self._pooling(adapter), given, task, own)

    async def _pooled_by(
        self, pooling: Pooling, given: Sequence[str | list[int] | Conversation], task: PoolingTask, own: PoolingParams
    ) -> list[tuple[Vector, list[int]]]:
        choice, truncation = own.choice(), self.model.truncation(own.truncate_prompt_tokens, None)
        found: list[tuple[Vector, list[int]]] = []
        for begin in range(0, len(given), AT_ONCE):
            group = given[begin : begin + AT_ONCE]
            places = [f"inputs[{begin + index}]" for index in range(len(group))]
            pooled, prompts = await pool(
                Sequences(pooling, group, places, own.of(task), choice, truncation, _unlimited, pooling.run)
            )
            found += zip(pooled.vectors, (one.token_ids.tolist() for one in prompts), strict=True)
        return found

    def _input(self, given: PooledInput) -> str | list[int] | Conversation:
        if isinstance(given, str):
            return given
        if is_chat(given):
            return self._conversation(given)
        ids: Any = given
        return list(ids)

    def _conversation(self, messages: Messages) -> Conversation:
        parts = PythonParts()
        request = self._read(PoolingRequest, {"messages": parts.replaced(messages)})
        found = conversation(request.chats[0], self.model.processor.modalities, self._opened.limits)
        return replace(found, media=parts.with_objects(found.media))

    def _name(self) -> str:
        return f"request-{next(self._ids)}"

    async def _prompt(self, request: CompletionRequest, media: Sequence[MediaSource]) -> Prompt:
        prompts = self._opened.model.prompts
        truncation = self._opened.model.truncation(request.truncate_prompt_tokens, None, completion=request.length or 1)
        (given,) = request.prompts
        return await prompts.text_prompt(given, media=media, truncation=truncation)

    def _need(self, task: str, *, doing: str | None = None) -> _Program:
        program = self._opened
        if task not in program.model.tasks:
            can = ", ".join(program.model.tasks)
            raise RequestError(
                f"The model {program.name!r} does not {doing or task}. It can: {can}.", code="unsupported_task"
            )
        return program

    def _read(self, model: type[Request], fields: Mapping[str, Any]) -> Request:
        """By the rules of a request's body, whose JSON this would be."""
        try:
            body = msgspec.json.encode(fields)
        except (TypeError, ValueError) as error:
            raise RequestError(f"This cannot be part of a request: {error}.") from None
        return parse_json(model, body, self._unknown)
