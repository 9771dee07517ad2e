"""Recordings for models that transcribe: what a form asks, the text with its times, and every form of answer."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from sensorium.api.generated import Asker, Work, usage_object
from sensorium.api.guards.admission import PendingBody
from sensorium.api.protocol.audio import THRESHOLDS, AudioRequest
from sensorium.api.protocol.languages import language_code, language_name
from sensorium.api.transport.frames import Frames, StreamHead
from sensorium.api.transport.frames import Usage as RunningUsage
from sensorium.api.transport.sse import EventStream
from sensorium.errors import RequestError
from sensorium.media.source import MediaSource
from sensorium.serving.model import ServedModel
from sensorium.serving.recordings import RecordingEngine, processor_of
from sensorium.serving.transcription import TEMPERATURES, Segment, Thresholds, Transcription, Wish

if TYPE_CHECKING:
    from sensorium.processors.whisper import WhisperProcessor

FILE = "file"
DELTA = "transcript.text.delta"
DONE = "transcript.text.done"
PLAIN_TEXT = b"text/plain; charset=utf-8"


class Upload:
    """One request of these endpoints, or of a program."""

    def __init__(self, request: AudioRequest, source: MediaSource, *, translates: bool) -> None:
        self.request = request
        self.translates = translates
        self._source: MediaSource | None = source

    def take_source(self) -> MediaSource:
        """The recording, once: its file is not kept."""
        source, self._source = self._source, None
        return source or MediaSource("audio", FILE)


@dataclass(frozen=True, slots=True)
class Listening:
    """A recording that a model transcribes. `duration_s` is all of it."""

    transcription: Transcription
    engine: RecordingEngine
    duration_s: float


async def listen(work: Asker, upload: Upload, progressed: Callable[[], None] = lambda: None) -> Listening:
    """Decode a recording; what is said in it is not asked yet. `progressed` hears of every part that is done then."""
    wish, salt, processor = _wish(work.model, upload), work.salt(), processor_of(work.model)
    (recording,), timings = await work.model.prompts.media([upload.take_source()], tenant=work.turn, salt=salt)
    work.observer.observe_prompt(0.0, timings)
    engine = RecordingEngine(work.model, work.observer, salt, work.turn, progressed)
    return Listening(Transcription(processor, recording, engine, wish), engine, timings[0].duration_s)


async def transcribe(work: Work, upload: Upload, pending: PendingBody) -> None:
    with work.entry.admission.admit(1):
        async with work.context.open_request(work.call) as in_flight:
            listening = await listen(work, upload, in_flight.progressed)
            pending.release()
            transcription, engine = listening.transcription, listening.engine
            if upload.request.stream:
                await _stream(work, upload.request, transcription, engine)
            else:
                segments = [one async for one in transcription.segments()]
                await _respond(work, upload, segments, transcription.language or "en", listening.duration_s)
            work.call.note = f"{engine.usage.prompt_tokens} + {engine.usage.completion_tokens} tokens"


# What is asked


def _wish(model: ServedModel, upload: Upload) -> Wish:
    request, processor = upload.request, processor_of(model)
    language = spoken_language(request, tuple(processor.speech.languages) or ("en",))
    if upload.translates:
        _check_translates(request, processor)
    generation, tells = model.checkpoint.generation, request.response_format in ("verbose_json", "srt", "vtt")
    words = "word" in request.granularities
    if words and "align" not in model.all_tasks:
        raise RequestError(
            "This model does not tell when words are said (its generation_config.json has no alignment_heads).",
            param="timestamp_granularities",
        )
    limits = (request.max_completion_tokens, generation.get("max_new_tokens"), generation.get("max_length"))
    return Wish(
        "translate" if upload.translates else "transcribe",
        request.sampling(model.defaults, 1, FILE),
        language,
        tuple(processor.previous_ids(request.context())),
        timestamps=tells,
        words=words,
        tells_silence=request.response_format == "verbose_json",
        temperatures=(request.temperature,) if request.temperature else TEMPERATURES,
        thresholds=_thresholds(request, Thresholds.of(generation)),
        conditions=generation.get("condition_on_prev_tokens") is True,
        hurries=request.stream is True,
        context=model.max_model_len,
        most_tokens=next((limit for limit in limits if isinstance(limit, int)), None),
    )


def spoken_language(request: AudioRequest, known: Sequence[str]) -> str | None:
    """The code of what is spoken; None where the model is to find out. RequestError for one that it does not know."""
    if request.language is None:
        return None
    code = language_code(request.language, known)
    if code is None:
        raise RequestError(
            f"This model does not know {language_name(request.language)}; it knows {', '.join(known)}.",
            param="language",
        )
    return code


def _check_translates(request: AudioRequest, processor: WhisperProcessor) -> None:
    if "translate" not in processor.speech.tasks or not processor.speech.languages:
        raise RequestError("This model knows English alone: it does not translate.", param="model")
    if language_name(request.to_language or "en") != "English":
        raise RequestError("This model translates to English only.", param="to_language")


def _thresholds(request: AudioRequest, stated: Thresholds) -> Thresholds:
    logprob, compression, no_speech = (getattr(request, name) for name in THRESHOLDS)
    return Thresholds(
        stated.logprob if logprob is None else logprob,
        stated.compression if compression is None else compression,
        stated.token_compression if compression is None else None,
        stated.no_speech if no_speech is None else no_speech,
    )


# What is answered


async def _respond(work: Work, upload: Upload, segments: Sequence[Segment], language: str, duration_s: float) -> None:
    form, text = upload.request.response_format, text_of_segments(segments, upload.request.response_format)
    if form in ("text", "srt", "vtt"):
        plain = text + "\n" if form == "text" else text
        await work.call.respond(
            plain.encode(), content_type=b"text/vtt; charset=utf-8" if form == "vtt" else PLAIN_TEXT
        )
        return
    body: dict[str, Any] = {"text": text, "usage": {"type": "duration", "seconds": math.ceil(duration_s)}}
    if form == "verbose_json":
        asked = upload.request.granularities
        words = [
            {"word": word.text.strip(), "start": word.start_s, "end": word.end_s}
            for one in segments
            for word in one.words
        ]
        body |= {
            "task": "translate" if upload.translates else "transcribe",
            "language": (language_name("en" if upload.translates else language) or language).lower(),
            "duration": duration_s,
            "segments": [_segment(number, one) for number, one in enumerate(segments)] if "segment" in asked else None,
            "words": words if "word" in asked else None,
        }
    await work.call.respond(msgspec.json.encode(body))


def text_of_segments(segments: Sequence[Segment], form: str | None) -> str:
    """All that was said, as subtitles where the form is srt or vtt."""
    if form in ("srt", "vtt"):
        return srt(segments) if form == "srt" else vtt(segments)
    return "".join(one.text for one in segments).strip()


def _segment(number: int, one: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": one.seek,
        "start": one.start_s,
        "end": one.end_s,
        "text": one.text,
        "tokens": one.tokens,
        "temperature": one.temperature,
        "avg_logprob": one.avg_logprob,
        "compression_ratio": one.compression_ratio,
        "no_speech_prob": one.no_speech_prob,
    }


def srt(segments: Sequence[Segment]) -> str:
    """Subtitles as SubRip has them."""
    return "".join(
        f"{number}\n{_clock(one.start_s, ',')} --> {_clock(one.end_s, ',')}\n{_line(one.text)}\n\n"
        for number, one in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """Subtitles as WebVTT has them."""
    cues = (f"{_clock(one.start_s, '.')} --> {_clock(one.end_s, '.')}\n{_line(one.text)}\n\n" for one in segments)
    return "WEBVTT\n\n" + "".join(cues)


def _line(text: str) -> str:
    """What does not end a cue, nor looks like its times."""
    return " ".join(text.split()).replace("-->", "->")


def _clock(seconds: float, mark: str) -> str:
    """01:02:03,450"""
    total = round(seconds * 1000)
    return f"{total // 3_600_000:02}:{total // 60_000 % 60:02}:{total // 1000 % 60:02}{mark}{total % 1000:03}"


async def _stream(work: Work, request: AudioRequest, transcription: Transcription, engine: RecordingEngine) -> None:
    """An event for every segment that is done: only then is it known that it will not be said again."""
    frames = stream_frames(work, request, lambda unsent: usage_object(engine.usage, unsent=unsent))
    async with EventStream(work.call, work.context.limits.keep_alive_comment_s) as events:
        said = ""
        async for text in _pieces(transcription):
            said += text
            await events.write(frames.text(0, text, beside={"type": DELTA, "delta": text}))
        await events.write(frames.finish(0, "", None, "stop", None, beside={"type": DONE, "text": said.strip()}))
        await events.end(frames.usage(usage_object(engine.usage)) if request.stream_include_usage else b"")


async def _pieces(transcription: Transcription) -> AsyncIterator[str]:
    """The segments' texts; the first one's leading space is none of the transcript's."""
    is_first = True
    async for segment in transcription.segments():
        yield segment.text.lstrip() if is_first else segment.text
        is_first = False


def stream_frames(work: Work, request: AudioRequest, running: RunningUsage) -> Frames:
    """Events for two kinds of clients in one: vLLM's read `choices`, OpenAI's `type` and `delta`, or `text` at the
    end."""
    include_usage = bool(request.stream_include_usage)
    return Frames(
        StreamHead(work.call.answer_id("trsc-"), int(time.time()), request.model or work.entry.name),
        "transcription.chunk",
        open_text=b'"delta":{"content":',
        close_text=b"}",
        include_usage=include_usage,
        running_usage=running if include_usage and request.stream_continuous_usage_stats else None,
    )
