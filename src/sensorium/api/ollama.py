"""POST /api/chat, /api/generate, /api/embed and /api/embeddings, for clients that speak nothing but Ollama's API."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from sensorium.api.context import Context
from sensorium.api.embeddings import check_dimensions
from sensorium.api.foreign import TranslatedChat
from sensorium.api.generated import Asker, Work, answer_generated
from sensorium.api.guards.admission import PendingBody
from sensorium.api.logprobs import chat_logprobs, token_names
from sensorium.api.ollama_answers import LINES, Pieces, figures, now
from sensorium.api.pooled import opened, pool_inputs
from sensorium.api.protocol.foreign_chat import ForeignChat
from sensorium.api.protocol.ollama import (
    AnsweredBody,
    GenerateRequest,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    kept_s,
)
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.body import read_request
from sensorium.api.transport.sse import EventStream
from sensorium.api.vectors import vector_json, written_in_time
from sensorium.prompt.formats.base import Delta
from sensorium.serving.generation import Choice, Generation, GenerationRequest

Line = Callable[[str, dict[str, Any], bool], dict[str, Any]]
"""One object of the answer, of the model's name, what is said, and whether it is the last."""


async def chat(context: Context, call: Call) -> None:
    async def read(pending: PendingBody) -> OllamaAnswer:
        request = await read_request(call, OllamaChatRequest, context.limits, context.unknown, pending, any_type=True)
        request.check(context.limits, context.unknown)
        _keep(context, request)
        if not request.messages:
            raise _OnlyLoads(request)
        return OllamaAnswer(request, request.as_chat(), _chat_line)

    await _answer(context, call, read, _chat_line)


async def generate(context: Context, call: Call) -> None:
    async def read(pending: PendingBody) -> OllamaAnswer:
        request = await read_request(call, GenerateRequest, context.limits, context.unknown, pending, any_type=True)
        request.check(context.limits, context.unknown)
        _keep(context, request)
        if request.loads:
            raise _OnlyLoads(request)
        if request.raw:
            return RawAnswer(request, request.as_chat(), request.prompt or "")
        return OllamaAnswer(request, request.as_chat(), _text_line)

    await _answer(context, call, read, _text_line)


class _OnlyLoads(Exception):
    """The request says nothing: its client wants the model to be there."""

    def __init__(self, request: AnsweredBody) -> None:
        self.request = request


def _keep(context: Context, request: AnsweredBody | OllamaEmbedRequest) -> None:
    """What the request says of how long its model stays after it."""
    if (seconds := kept_s(request.keep_alive)) is not None and request.model:
        context.catalog.keep(context.catalog.find(request.model), seconds)


async def _answer(
    context: Context, call: Call, read: Callable[[PendingBody], Awaitable[OllamaAnswer]], line: Line
) -> None:
    try:
        await answer_generated(context, call, read)
    except _OnlyLoads as found:
        request = found.request
        if not (request.unloads and context.catalog.forget(context.catalog.find(request.model))):
            async with context.acquire(request.model) as entry:
                entry.need("generate")
        answer = line(request.model, {"content": ""}, True)
        answer["done_reason"] = "unload" if request.unloads else "load"
        await call.respond(msgspec.json.encode(answer))


def _chat_line(model: str, said: dict[str, Any], done: bool) -> dict[str, Any]:
    return {"model": model, "created_at": now(), "message": {"role": "assistant", **said}, "done": done}


def _text_line(model: str, said: dict[str, Any], done: bool) -> dict[str, Any]:
    thoughts = {"thinking": said["thinking"]} if "thinking" in said else {}
    return {"model": model, "created_at": now(), "response": said["content"], **thoughts, "done": done}


class OllamaAnswer(TranslatedChat):
    def __init__(self, request: AnsweredBody, chat: ForeignChat, line: Line) -> None:
        super().__init__(chat)
        self._model = request.model
        self._streams = request.streams
        self._line = line

    async def answer(self, work: Work, generation: Generation) -> None:
        if self._streams:
            await self._stream(work, generation)
            return
        deltas: list[Delta] = []

        async def keep(choice: Choice, new: Sequence[Delta]) -> None:
            deltas.extend(new)

        await generation.run(keep)
        choice = generation.choices[0]
        said = Pieces().take(deltas, ends=True, cut=_is_cut(choice))
        found = self._line(self._model, said, True) | self._logprobs(work, choice) | figures(generation, choice)
        await work.call.respond(msgspec.json.encode(found))

    async def _stream(self, work: Work, generation: Generation) -> None:
        pieces = Pieces()
        async with EventStream(work.call, 0.0, done=b"", comment=b"", content_type=LINES) as lines:

            async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
                await write(pieces.take(deltas))

            async def write(said: dict[str, Any]) -> None:
                if any(said.values()):
                    line = self._line(self._model, said, False) | self._logprobs(work, generation.choices[0])
                    await lines.write(msgspec.json.encode(line) + b"\n")

            await generation.run(emit)
            choice = generation.choices[0]
            await write(pieces.take((), ends=True, cut=_is_cut(choice)))
            last = self._line(self._model, {"content": ""}, True) | figures(generation, choice)
            last |= self._logprobs(work, choice)
            await lines.end(msgspec.json.encode(last) + b"\n")

    def _logprobs(self, work: Work, choice: Choice) -> dict[str, Any]:
        """Of the tokens since the last line, where they are wanted."""
        if not self.request.logprobs:
            return {}
        tokens = choice.take_logprobs()
        return {"logprobs": chat_logprobs(token_names(work.model.tokenizer), tokens)["content"]} if tokens else {}


class RawAnswer(OllamaAnswer):
    """The prompt as it is, without a template, and the answer without a format."""

    def __init__(self, request: AnsweredBody, chat: ForeignChat, prompt: str) -> None:
        super().__init__(request, chat, _text_line)
        self._prompt = prompt

    async def prepare(self, work: Asker) -> GenerationRequest:
        model, request = work.model, self.request
        grammar = await model.grammars.held(request.form(), work.turn)
        prompt = await model.prompts.text_prompt(self._prompt, tenant=work.turn)
        params = replace(request.sampling(model.defaults, len(prompt.token_ids)), grammar=grammar)
        return request.generation(((prompt, params),), work.salt(), continues=True)


def _is_cut(choice: Choice) -> bool:
    return choice.finish_reason != "stop" or choice.stop_reason is not None


async def embed_texts(context: Context, call: Call) -> None:
    await _embed(context, call, OllamaEmbedRequest, several=True)


async def embed_text(context: Context, call: Call) -> None:
    """The older form: one text, one vector."""
    await _embed(context, call, OllamaEmbeddingsRequest, several=False)


async def _embed(context: Context, call: Call, body: type[OllamaEmbedRequest], *, several: bool) -> None:
    async with opened(context, call, body, "embed", any_type=True) as job:
        job.entry.need("embed")
        _keep(context, job.request)
        check_dimensions(job.entry, job.request.dimensions)
        pooled = await pool_inputs(job, job.request.params())

        def written() -> bytes:
            return b",".join(vector_json(vector, "float") for vector in pooled.vectors)

        vectors = await written_in_time(written, pooled.vectors)
        if not several:
            await call.respond(b'{"embedding":' + vectors + b"}")
            return
        head = msgspec.json.encode({"model": job.model_name})
        end = {
            "total_duration": int((time.perf_counter() - call.started_s) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": pooled.prompt_tokens,
        }
        await call.respond(head[:-1] + b',"embeddings":[' + vectors + b"]," + msgspec.json.encode(end)[1:])
