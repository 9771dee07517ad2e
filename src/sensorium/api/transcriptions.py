"""POST /v1/audio/transcriptions and /translations: an uploaded recording goes to a model that transcribes, or becomes a
chat with one that hears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from sensorium.api.context import Context, Entry
from sensorium.api.generated import Work, generate_answer, running_usage, text_of, usage_object
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.audio import AudioRequest, parse_fields
from sensorium.api.recordings import DELTA, DONE, FILE, PLAIN_TEXT, Upload, stream_frames, transcribe
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.multipart import read_form
from sensorium.api.transport.sse import EventStream
from sensorium.errors import MissingFieldError, UnsupportedModalityError
from sensorium.prompt.formats.base import Delta
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.serving.generation import Choice, Generation, GenerationRequest


async def transcriptions(context: Context, call: Call) -> None:
    await _listen(context, call, translates=False)


async def translations(context: Context, call: Call) -> None:
    await _listen(context, call, translates=True)


async def _listen(context: Context, call: Call, *, translates: bool) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        upload = await _read(context, call, pending, translates=translates)
        async with context.acquire(upload.request.model) as entry:
            work = Work(context, call, entry)
            if "transcribe" in entry.model.tasks:
                await transcribe(work, upload, pending)
            else:
                upload.request.check_for_chat()
                await generate_answer(work, _Recording(upload), pending)


async def _read(context: Context, call: Call, pending: PendingBody, *, translates: bool) -> Upload:
    form = await read_form(call, context.limits, FILE, pending.add)
    request = parse_fields(form.fields, context.unknown)
    call.take_name(request.request_id)
    if form.file is None:
        raise MissingFieldError(FILE)
    return Upload(request, form.file, translates)


class _Recording:
    """One request of these endpoints to a model that chats."""

    num_sequences = 1

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._request = upload.request
        self._translates = upload.translates
        self._duration_s = 0.0

    @property
    def model_name(self) -> str | None:
        return self._request.model

    async def prepare(self, work: Work) -> GenerationRequest:
        request, model, salt = self._request, work.entry.model, work.salt()
        _check_hears(work.entry)
        message = Message("user", (MediaPart("audio"), TextPart(request.instruction(translates=self._translates))))
        prepared = await model.prompts.prepare_chat(
            [message], [self._upload.source()], tenant=work.call.turn, salt=salt
        )
        work.entry.metrics.observe_prompt(prepared.text_s, prepared.media)
        self._duration_s = prepared.media[0].duration_s
        params = request.sampling(model.defaults, len(prepared.prompt.token_ids), FILE)
        return GenerationRequest(((prepared.prompt, params),), salt=salt)

    async def answer(self, work: Work, generation: Generation) -> None:
        if self._request.stream:
            await _stream(work, self._request, generation)
            return
        text = (await generation.collect())[0].text.strip()
        if self._request.response_format == "text":
            await work.call.respond(text.encode() + b"\n", content_type=PLAIN_TEXT)
            return
        await work.call.respond(msgspec.json.encode(self._body(text)))

    def _body(self, text: str) -> dict[str, Any]:
        request, duration_s = self._request, self._duration_s
        body: dict[str, Any] = {"text": text, "usage": {"type": "duration", "seconds": math.ceil(duration_s)}}
        if request.response_format == "verbose_json":
            body |= {
                "task": "translate" if self._translates else "transcribe",
                "language": request.to_language or "en" if self._translates else request.language,
                "duration": duration_s,
                "segments": None,
                "words": None,
            }
        return body


def _check_hears(entry: Entry) -> None:
    entry.need("generate")
    if "audio" not in entry.model.processor.modalities:
        raise UnsupportedModalityError("audio", param="model", takes=entry.model.processor.modalities)


async def _stream(work: Work, request: AudioRequest, generation: Generation) -> None:
    """Events for two kinds of clients in one: vLLM's read `choices`, OpenAI's `type` and `delta`, or `text` at the
    end."""
    frames = stream_frames(work, request, running_usage(generation))
    async with EventStream(work.call, work.context.limits.keep_alive_comment_s) as events:
        said: list[str] = []

        async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
            text, event = text_of(deltas), b""
            if text:
                said.append(text)
                event = frames.text(choice.index, text, beside={"type": DELTA, "delta": text})
            if choice.finish_reason is not None:
                end = {"type": DONE, "text": "".join(said).strip()}
                event += frames.finish(choice.index, "", None, choice.finish_reason, choice.stop_reason, beside=end)
            if event:
                await events.write(event)

        await generation.run(emit)
        await events.end(frames.usage(usage_object(generation.usage())) if request.stream_include_usage else b"")
