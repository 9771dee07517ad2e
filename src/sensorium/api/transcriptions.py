"""POST /v1/audio/transcriptions and /translations: an uploaded recording becomes a chat with a model that hears."""

from __future__ import annotations

import math
import secrets
import time
from typing import Any

import msgspec

from sensorium.api.answer import Answer, Answers, ask
from sensorium.api.context import Entry, Service
from sensorium.api.protocol.audio import AudioRequest, parse_fields
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.frames import Frames, StreamHead
from sensorium.api.transport.multipart import read_form
from sensorium.api.transport.sse import EventStream
from sensorium.errors import RequestError
from sensorium.media.source import MediaSource
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.serving.defaults import completion_length
from sensorium.serving.prompts import Prepared
from sensorium.types import SamplingParams

FILE = "file"


async def transcriptions(service: Service, call: Call) -> None:
    await _listen(service, call, translates=False)


async def translations(service: Service, call: Call) -> None:
    await _listen(service, call, translates=True)


async def _listen(service: Service, call: Call, *, translates: bool) -> None:
    with service.tenants.enter(call.tenant), service.pending.open() as pending:
        form = await read_form(call, service.limits, FILE, pending.add)
        request = parse_fields(form.fields, service.unknown)
        if form.file is None:
            raise RequestError(f"`{FILE}` is required.", param=FILE, code="missing_required_parameter")
        entry = service.entry(request.model)
        _check_hears(entry)
        with entry.admission.admit(1) as permit:
            async with service.flight(call):
                prepared = await _prompt(service, call, entry, request, form.file, translates)
                pending.release()
                permit.add_prompt_tokens(len(prepared.prompt.token_ids))
                sampling = request.sampling_body()
                params = _sampling(entry, request, len(prepared.prompt.token_ids))
                answers = ask(
                    entry,
                    sampling,
                    [(prepared.prompt, params)],
                    service.salts.of(call.tenant),
                    started_s=call.started_s,
                    continues=False,
                )
                with answers:
                    await _answer(service, call, entry, request, answers, prepared, translates)
                    call.note = f"{answers.prompt_tokens} + {answers.completion_tokens} tokens"


def _check_hears(entry: Entry) -> None:
    entry.need("generate")
    if "audio" not in entry.model.processor.modalities:
        raise RequestError(
            f"The model {entry.name!r} does not understand sound.", param="model", code="unsupported_modality"
        )


async def _prompt(
    service: Service, call: Call, entry: Entry, request: AudioRequest, file: bytes, translates: bool
) -> Prepared:
    message = Message("user", (MediaPart("audio"), TextPart(request.instruction(translates=translates))))
    prepared = await entry.model.prompts.prepare_chat(
        [message], [MediaSource("audio", FILE, payload=file)], tenant=call.turn, salt=service.salts.of(call.tenant)
    )
    entry.metrics.observe_prompt(prepared.text_s, prepared.media)
    return prepared


def _sampling(entry: Entry, request: AudioRequest, prompt_tokens: int) -> SamplingParams:
    defaults = entry.model.defaults
    max_tokens = completion_length(defaults, prompt_tokens, request.max_completion_tokens, None, 1, FILE)
    return request.sampling_body().sampling_with(defaults, max_tokens=max_tokens, logprobs=None)


async def _answer(
    service: Service,
    call: Call,
    entry: Entry,
    request: AudioRequest,
    answers: Answers,
    prepared: Prepared,
    translates: bool,
) -> None:
    if request.stream:
        await _stream(service, call, entry, request, answers)
        return
    text = (await answers.collect())[0].strip()
    if request.response_format == "text":
        await call.respond(text.encode() + b"\n", content_type=b"text/plain; charset=utf-8")
        return
    duration_s = prepared.media[0].duration_s
    body: dict[str, Any] = {"text": text, "usage": {"type": "duration", "seconds": math.ceil(duration_s)}}
    if request.response_format == "verbose_json":
        language = request.language if not translates else request.to_language or "en"
        body |= {
            "task": "translate" if translates else "transcribe",
            "language": language,
            "duration": duration_s,
            "segments": None,
            "words": None,
        }
    await call.respond(msgspec.json.encode(body))


async def _stream(service: Service, call: Call, entry: Entry, request: AudioRequest, answers: Answers) -> None:
    head = StreamHead("trsc-" + secrets.token_hex(12), int(time.time()), request.model or entry.name)
    include_usage = bool(request.stream_include_usage)
    runs_usage = include_usage and request.stream_continuous_usage_stats
    frames = Frames(
        head,
        "transcription.chunk",
        open_text=b'"delta":{"content":',
        close_text=b"}",
        include_usage=include_usage,
        running_usage=answers.usage_without if runs_usage else None,
    )
    async with EventStream(call, service.limits.keep_alive_comment_s) as events:

        async def emit(answer: Answer, text: str) -> None:
            if answer.finish_reason is not None:
                await events.write(frames.finish(answer.index, text, None, answer.finish_reason, answer.stop_reason))
            elif text:
                await events.write(frames.text(answer.index, text))

        await answers.run(emit)
        await events.end(frames.usage(answers.usage()) if include_usage else b"")
