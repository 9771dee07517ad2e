"""POST /v1/audio/transcriptions and /translations: an uploaded recording goes to a model that transcribes, or becomes
the prompt that another one has for recordings, or a chat with one that hears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from sensorium.api.context import Context
from sensorium.api.generated import Asker, Work, generate_answer, running_usage, text_of, usage_object
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.audio import AudioRequest, parse_fields
from sensorium.api.protocol.languages import LANGUAGES, language_name
from sensorium.api.recordings import DELTA, DONE, FILE, PLAIN_TEXT, Upload, spoken_language, stream_frames, transcribe
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.multipart import read_form
from sensorium.api.transport.sse import EventStream
from sensorium.errors import (
    MediaError,
    MissingFieldError,
    RequestError,
    UnsupportedFieldError,
    UnsupportedModalityError,
)
from sensorium.media.source import MediaSource
from sensorium.prompt.formats.base import Delta
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.serving.generation import Choice, Generation, GenerationRequest
from sensorium.serving.model import ServedModel
from sensorium.serving.recordings import chat_transcript, transcriber_of

if TYPE_CHECKING:
    from sensorium.processors.transcripts import Transcriber, Transcript


async def transcriptions(context: Context, call: Call) -> None:
    await _listen(context, call, translates=False)


async def translations(context: Context, call: Call) -> None:
    await _listen(context, call, translates=True)


async def _listen(context: Context, call: Call, *, translates: bool) -> None:
    with context.tenants.enter(call.tenant), context.pending.open() as pending:
        upload = await _read(context, call, pending, translates=translates)
        async with context.acquire(upload.request.model, "transcribe", "generate") as entry:
            work = Work(context, call, entry)
            if "transcribe" in entry.model.tasks:
                await transcribe(work, upload, pending)
            else:
                upload.request.check_for_chat()
                entry.need("generate")
                await generate_answer(work, ChattedRecording(upload), pending)


async def _read(context: Context, call: Call, pending: PendingBody, *, translates: bool) -> Upload:
    form = await read_form(call, context.limits, FILE, pending.add)
    request = parse_fields(form.fields, context.unknown)
    call.take_name(request.request_id)
    if form.file is None:
        raise MissingFieldError(FILE)
    return Upload(request, MediaSource("audio", FILE, payload=form.file), translates=translates)


class ChattedRecording:
    """One request of these endpoints to a model that completes prompts. `duration_s` and `transcript` are known when it
    is prepared."""

    num_sequences = 1

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._request = upload.request
        self._translates = upload.translates
        self.duration_s = 0.0
        self.transcript = chat_transcript()

    @property
    def model_name(self) -> str | None:
        return self._request.model

    async def prepare(self, work: Asker) -> GenerationRequest:
        request, model, salt = self._request, work.model, work.salt()
        _check_hears(model)
        transcriber = _transcriber_of(model, translates=self._translates)
        how: dict[str, Any] = {"tenant": work.turn, "salt": salt}
        if transcriber is not None:
            language = _check_for_transcriber(request, transcriber)
            self.transcript = transcriber.transcript(language)
            text = transcriber.transcription(language, request.context())
            prepared = await model.prompts.prepare_text(text, [self._upload.take_source()], param=FILE, **how)
        else:
            message = Message("user", (MediaPart("audio"), TextPart(request.instruction(translates=self._translates))))
            prepared = await model.prompts.prepare_chat([message], [self._upload.take_source()], **how)
        work.observer.observe_prompt(prepared.text_s, prepared.media)
        self.duration_s = prepared.media[0].duration_s
        _check_is_heard_whole(self.duration_s, model)
        is_open = transcriber is not None  # however long the recording is: what a chat may say is no measure
        params = request.sampling(model.defaults, len(prepared.prompt.token_ids), FILE, is_open=is_open)
        return GenerationRequest(((prepared.prompt, params),), salt=salt)

    def text_of(self, completion: str) -> str:
        """What is said in the recording."""
        return self.transcript.whole(completion)

    @property
    def language(self) -> str | None:
        """Of the text: as the request names it, or the English name of what the model was told or has found."""
        if self._translates:
            return self._request.to_language or "en"
        found = self.transcript.language
        return self._request.language if found is None else (language_name(found) or found).lower()

    async def answer(self, work: Work, generation: Generation) -> None:
        if self._request.stream:
            await _stream(work, self._request, generation, self.transcript)
            return
        text = self.text_of((await generation.collect())[0].text)
        if self._request.response_format == "text":
            await work.call.respond(text.encode() + b"\n", content_type=PLAIN_TEXT)
            return
        await work.call.respond(msgspec.json.encode(self._body(text)))

    def _body(self, text: str) -> dict[str, Any]:
        request, duration_s = self._request, self.duration_s
        body: dict[str, Any] = {"text": text, "usage": {"type": "duration", "seconds": math.ceil(duration_s)}}
        if request.response_format == "verbose_json":
            body |= {
                "task": "translate" if self._translates else "transcribe",
                "language": self.language,
                "duration": duration_s,
                "segments": None,
                "words": None,
            }
        return body


def _check_hears(model: ServedModel) -> None:
    if "audio" not in model.processor.modalities:
        raise UnsupportedModalityError("audio", param="model", takes=model.processor.modalities)


def _transcriber_of(model: ServedModel, *, translates: bool) -> Transcriber | None:
    """Whoever has a prompt of its own for this; None where it is a chat."""
    transcriber = transcriber_of(model)
    if transcriber is None or not translates:
        return transcriber
    if not transcriber.translates:
        raise RequestError("This model writes recordings down: it does not translate.", param="model")
    return None


def _check_for_transcriber(request: AudioRequest, transcriber: Transcriber) -> str | None:
    """The code of the language. RequestError for what this model cannot be told."""
    if not transcriber.takes_context:
        for name in ("prompt", "hotwords"):
            if getattr(request, name):
                raise UnsupportedFieldError(f"This model takes no `{name}` with a recording: leave it out.", param=name)
    return spoken_language(request, tuple(transcriber.spoken) or tuple(LANGUAGES))


def _check_is_heard_whole(duration_s: float, model: ServedModel) -> None:
    most = model.processor.longest_audio_s
    if most is not None and duration_s > most:
        raise MediaError(
            f"This model hears the first {most:g} s of a recording, and this one has {duration_s:.1f} s: send it in "
            "parts.",
            param=FILE,
            code="audio_too_long",
        )


async def _stream(work: Work, request: AudioRequest, generation: Generation, transcript: Transcript) -> None:
    """Events for two kinds of clients in one: vLLM's read `choices`, OpenAI's `type` and `delta`, or `text` at the
    end."""
    frames = stream_frames(work, request, running_usage(generation))
    async with EventStream(work.call, work.context.limits.keep_alive_comment_s) as events:
        said: list[str] = []

        async def emit(choice: Choice, deltas: Sequence[Delta]) -> None:
            text, event = transcript.push(text_of(deltas)), b""
            if choice.finish_reason is not None:
                text += transcript.finish()
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
