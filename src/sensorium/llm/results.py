"""What comes back, in the names of vLLM's classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sensorium.serving.generation import ToolCall
from sensorium.serving.transcription import Segment
from sensorium.serving.words import Word

Vector = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Logprob:
    """`rank` is 1 for the most likely token; None for a chosen token that is not among the alternatives."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer, as far as it has come. `reasoning` and `tool_calls` are what the model's format sets apart from the
    text; `finish_reason` is None while it goes on, else stop, length or tool_calls. `logprobs` has, for each token, the
    chosen one and the alternatives."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All answers to one prompt. `prompt` is None where it was given as token ids or messages."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True, slots=True)
class PooledOutput(Generic[T]):
    """What one input came to."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Embedding:
    """[size], of length 1 unless the model or the params say otherwise."""

    embedding: Vector


@dataclass(frozen=True, slots=True)
class Classification:
    """`probs` is [classes]; `label` the name of the likeliest, if the model has names."""

    probs: Vector
    label: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class Score:
    score: float


@dataclass(frozen=True, slots=True)
class PooledData:
    """[size], or [tokens, size] for tasks that look at tokens."""

    data: Vector


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in one recording. `language` is a code of ISO 639-1; None where the model was not told and does not
    tell. `segments` have start_s, end_s, text and tokens; `words`, if asked for, text, start_s and end_s."""

    request_id: str
    text: str
    language: str | None
    duration_s: float
    segments: list[Segment] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place in the list that was given, and its score."""

    index: int
    relevance_score: float
