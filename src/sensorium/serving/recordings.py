"""What a transcription asks of the engine: text of a window, and which part of it each token is about."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import ServerError
from sensorium.processors.transcripts import Transcriber, Transcript
from sensorium.processors.whisper import WhisperProcessor
from sensorium.serving.generation import GenerationObserver, GenerationRequest, Usage, generate
from sensorium.serving.model import ServedModel
from sensorium.serving.pooled import PoolingObserver, vectors_of
from sensorium.types import EngineRequest, PoolingParams, Prompt, SamplingParams, TokenLogprob


def processor_of(model: ServedModel) -> WhisperProcessor:
    """Of a model that transcribes."""
    if not isinstance(model.processor, WhisperProcessor):
        raise ServerError
    return model.processor


def transcriber_of(model: ServedModel) -> Transcriber | None:
    """The processor of a model that has a prompt of its own for recordings; None of others."""
    processor = model.processor
    return processor if isinstance(processor, Transcriber) and processor.transcribes else None


def chat_transcript() -> Transcript:
    """What a chat says of a recording: all of it is the text, and nobody tells the language."""
    return Transcript(None)


class Observer(GenerationObserver, PoolingObserver, Protocol):
    """Who counts: every window is a request."""


class RecordingEngine:
    """One transcription's way to the engine. `usage` is of all its windows so far; `progressed` is called when the
    engine has answered."""

    def __init__(
        self, model: ServedModel, observer: Observer, salt: bytes, turn: bytes, progressed: Callable[[], None]
    ) -> None:
        self._model = model
        self._observer = observer
        self._salt = salt
        self._turn = turn
        self._progressed = progressed
        self._prompt_tokens = self._completion_tokens = self._cached_tokens = 0

    @property
    def usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens, 0, {})

    async def say(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], list[TokenLogprob]]:
        """Tokens, the end token among them, and what is told of each."""
        request = GenerationRequest(((prompt, params),), salt=self._salt, keeps_ids=True)
        generating = generate(self._model, request, self._observer, started_s=perf_counter(), turn=self._turn)
        with generating as generation:
            await generation.collect()
            self._progressed()
            self._prompt_tokens += generation.prompt_tokens
            self._completion_tokens += generation.completion_tokens
            self._cached_tokens += generation.cached_tokens
            choice = generation.choices[0]
            return choice.take_token_ids(), choice.take_logprobs()

    async def attention(self, prompt: Prompt, params: PoolingParams) -> NDArray[np.float32]:
        """[tokens, rows of the recording]"""
        client = self._model.client
        request = EngineRequest(client.next_id(), prompt, pooling=params, salt=self._salt, turn=self._turn)
        stream = client.submit(request)
        try:
            found = (await vectors_of(stream, self._observer))[0]
            self._progressed()
            return found
        finally:
            stream.abort()
