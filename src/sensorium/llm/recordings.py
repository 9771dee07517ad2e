"""Recordings -> text, as the endpoints do it: by a model that transcribes, or one that chats about what it hears."""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from sensorium.api.generated import Asker
from sensorium.api.recordings import Upload, listen, text_of_segments
from sensorium.api.transcriptions import ChattedRecording
from sensorium.llm.results import Transcript
from sensorium.serving.generation import generate

Recording = str | os.PathLike[str] | bytes | tuple[np.ndarray[Any, Any], int]
"""A URL, a path, a file's bytes, or (float [samples], rate in Hz)."""


def many_recordings(given: Recording | Sequence[Recording]) -> list[Any]:
    """One or a list of them, as a list."""
    return list(given) if isinstance(given, list) else [given]


async def transcript(work: Asker, upload: Upload, request_id: str) -> Transcript:
    """As /v1/audio/transcriptions and /translations would answer."""
    request = upload.request
    if "transcribe" in work.model.tasks:
        listening = await listen(work, upload)
        segments = [one async for one in listening.transcription.segments()]
        language = listening.transcription.language or "en"
        words = [word for one in segments for word in one.words]
        text = text_of_segments(segments, request.response_format)
        return Transcript(request_id, text, language, listening.duration_s, segments, words)
    request.check_for_chat()
    asked = ChattedRecording(upload)
    with generate(work.model, await asked.prepare(work), work.observer, started_s=perf_counter()) as generation:
        text = asked.text_of((await generation.collect())[0].text)
    return Transcript(request_id, text, request.to_language if upload.translates else asked.language, asked.duration_s)
