"""A recording as text, window by window: each begins where the last timestamp of the one before says. Where none are
asked for, several windows are computed together.

Source: the long-form algorithm of Whisper's paper (section 4.5) as transformers' `generate` has it. A window whose text
is too regular or too unlikely is said again at higher temperatures; what the model takes for silence says nothing.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sensorium.config import WINDOWS_TOGETHER
from sensorium.processors.whisper import SECONDS_OF_TIMESTAMP, WhisperProcessor
from sensorium.serving.concurrency import ended
from sensorium.serving.words import WITHOUT_SPACES, Word, token_ends, words_of
from sensorium.types import MediaFeatures, PoolingParams, Prompt, SamplingParams, TokenLogprob

FRAMES_OF_ROW = 2
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CONDITIONS_BELOW = 0.5  # temperature of a window whose text the next one may be told


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a window is said again, or is silence. None: never. `token_compression` is of the tokens' numbers, which is
    what transformers' generation_config.json means by its threshold; `compression` of the text."""

    logprob: float | None = -1.0
    compression: float | None = 2.4
    token_compression: float | None = None
    no_speech: float | None = 0.6

    @classmethod
    def of(cls, generation: Mapping[str, Any]) -> Thresholds:
        """Those of generation_config.json; what it does not mention is as OpenAI's program has it."""
        found = cls()
        if "logprob_threshold" in generation:
            found = replace(found, logprob=generation["logprob_threshold"])
        if "no_speech_threshold" in generation:
            found = replace(found, no_speech=generation["no_speech_threshold"])
        if "compression_ratio_threshold" in generation:
            found = replace(found, compression=None, token_compression=generation["compression_ratio_threshold"])
        return found


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be made of a recording. `language` None: detected. `previous`: a text before it, as tokens.

    `sampling` is for every window; its `temperature` and `max_tokens` are overwritten. `most_tokens` bounds a window's.
    """

    task: Literal["transcribe", "translate"]
    sampling: SamplingParams
    language: str | None = None
    previous: tuple[int, ...] = ()
    timestamps: bool = False
    words: bool = False
    tells_silence: bool = False  # the probability of silence is wanted of every segment
    temperatures: tuple[float, ...] = TEMPERATURES
    thresholds: Thresholds = field(default_factory=Thresholds)
    conditions: bool = False  # every window is told the text before it
    hurries: bool = False  # the first text is wanted soon, though all of it takes longer then
    context: int = 448
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Something that is said between two timestamps. `seek` is the window's first frame, of 10 ms."""

    seek: int
    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] = ()


class Engine(Protocol):
    async def say(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], list[TokenLogprob]]:
        """Tokens, the end token among them, and what is told of each."""

    async def attention(self, prompt: Prompt, params: PoolingParams) -> NDArray[np.float32]:
        """[tokens, rows of the recording]"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A window's text at one temperature, without the end token."""

    tokens: list[int]
    text: str
    temperature: float
    avg_logprob: float
    ended: bool

    @property
    def compression_ratio(self) -> float:
        return _ratio(self.text.encode())

    def is_regular(self, thresholds: Thresholds, vocab_size: int) -> bool:
        """Whether it repeats itself more than texts do."""
        size = int(math.log2(vocab_size) / 8) + 1
        numbers = b"".join(token.to_bytes(size, "little") for token in self.tokens)
        return _is_above(self.compression_ratio, thresholds.compression) or _is_above(
            _ratio(numbers), thresholds.token_compression
        )

    def is_unlikely(self, thresholds: Thresholds) -> bool:
        return thresholds.logprob is not None and self.avg_logprob < thresholds.logprob


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [first, last) of a window, between two of its timestamps, in seconds from its beginning."""

    first: int
    last: int
    start_s: float
    end_s: float


def cut(tokens: Sequence[int], first_timestamp: int, frames: int) -> tuple[list[Part], int]:
    """A window's tokens by its pairs of timestamps, and how many frames on the next window begins.

    What follows the last pair was cut off by the window's end, and is left to the next one.
    """
    is_time = [token >= first_timestamp for token in tokens]

    def seconds(place: int) -> float:
        return (tokens[place] - first_timestamp) * SECONDS_OF_TIMESTAMP

    ends = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]
    if not ends:
        last = next((i for i in range(len(tokens) - 1, -1, -1) if is_time[i]), None)
        end_s = frames // FRAMES_OF_ROW * SECONDS_OF_TIMESTAMP
        if last is not None and tokens[last] != first_timestamp:
            end_s = seconds(last)
        return [Part(0, len(tokens), 0.0, end_s)], frames
    is_single = is_time[-2:] == [False, True]
    if is_single:
        ends.append(len(tokens))
    else:
        ends[-1] += 1
    parts, first = [], 0
    for end in ends:
        is_pair = end == ends[-1] and not is_single  # the last part has both of its pair
        parts.append(Part(first, end, seconds(first), seconds(end - 1 - is_pair)))
        first = end
    return parts, frames if is_single else (tokens[first - 2] - first_timestamp) * FRAMES_OF_ROW


class Transcription:
    """One recording's. `language` is known once `detect` or the first segment was awaited."""

    def __init__(self, processor: WhisperProcessor, recording: MediaFeatures, engine: Engine, wish: Wish) -> None:
        self._processor = processor
        self._recording = recording
        self._engine = engine
        self._wish = wish
        self._tokens = processor.speech
        self._said: list[int] = [*wish.previous[1:]]  # what the next window is told, if it is
        self._is_told = wish.conditions
        self._silence: dict[tuple[int, tuple[int, ...]], float] = {}  # probability by window and previous tokens
        self.language = wish.language

    async def segments(self) -> AsyncIterator[Segment]:
        frames, step, seek = int(self._recording.arrays["frames"][0]), self._processor.window_frames, 0
        most = 1 if self._wish.timestamps or self._wish.conditions else WINDOWS_TOGETHER
        together = 1 if self._wish.hurries else most
        await self._detect()
        begun: deque[asyncio.Future[tuple[list[Segment], int]]] = deque()  # the windows from `seek` on
        try:
            while seek < frames:
                undone = [one for one in begun if not one.done()]
                while len(undone) < together and len(begun) < 2 * together and seek + len(begun) * step < frames:
                    begun.append(asyncio.ensure_future(self._window(seek + len(begun) * step, frames)))
                    undone.append(begun[-1])
                if not begun[0].done():
                    await asyncio.wait(undone, return_when=asyncio.FIRST_COMPLETED)
                    continue
                said, offset = await begun[0]
                begun.popleft()
                together = min(2 * together, most)
                for segment in said:
                    yield segment
                seek += offset
                if offset < step:  # a timestamp says where the next one begins, though none were asked for
                    await ended(begun)
                    begun.clear()
        finally:
            await ended(begun)
            begun.clear()  # a task keeps its error, the error this frame

    async def _window(self, seek: int, frames: int) -> tuple[list[Segment], int]:
        """What is said in the window that begins at frame `seek` of `frames`, and where the next one begins then."""
        size = min(frames - seek, self._processor.window_frames)
        window, previous = self._processor.window(self._recording, seek), self._previous()
        attempt = await self._attempt(window, seek, previous)
        if attempt is None:
            return [], size
        parts, offset = cut(attempt.tokens, self._tokens.first_timestamp, size)
        if not self._wish.timestamps:
            parts = [Part(0, len(attempt.tokens), 0.0, size // FRAMES_OF_ROW * SECONDS_OF_TIMESTAMP)]
        times = await self._times(window, previous, attempt, size) if self._wish.words else []
        found = [await self._segment(window, seek, previous, attempt, part, times) for part in parts]
        self._remember(attempt, parts)
        return [segment for segment in found if segment.text.strip()], offset

    # What the model is asked

    async def _detect(self) -> None:
        """The language of the recording's beginning, where nobody has said it."""
        if self.language is not None or not self._tokens.languages:
            return
        codes = {token: code for code, token in self._tokens.languages.items()}
        window = self._processor.window(self._recording, 0)
        params = SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=tuple(codes))
        tokens, _ = await self._engine.say(self._prompt([self._tokens.start], window), params)
        self.language = codes[tokens[0]]

    async def _attempt(self, window: MediaFeatures, seek: int, previous: tuple[int, ...]) -> Attempt | None:
        """The first that is neither too regular nor too unlikely; of none such, the likeliest, one that is not too
        regular if there is any. None for silence."""
        thresholds, tried, vocab_size = self._wish.thresholds, list[Attempt](), self._processor.checkpoint.vocab_size
        for temperature in self._wish.temperatures:
            one = await self._say(window, previous, temperature)
            unlikely = one.is_unlikely(thresholds)
            may_be_silence = thresholds.no_speech is not None and (unlikely or thresholds.logprob is None)
            if may_be_silence and _is_above(await self._silent(window, seek, previous), thresholds.no_speech):
                return None
            tried.append(one)
            if not unlikely and not one.is_regular(thresholds, vocab_size):
                return one
        return max(tried, key=lambda one: (not one.is_regular(thresholds, vocab_size), one.avg_logprob))

    async def _say(self, window: MediaFeatures, previous: tuple[int, ...], temperature: float) -> Attempt:
        wish, tokens = self._wish, self._tokens
        ids = self._beginning(previous)
        room = wish.context - len(ids)
        seed = wish.sampling.seed
        if seed is None:  # a recording that is sent again gives the same text
            seed = int.from_bytes(window.key[:7], "little")
        params = replace(
            wish.sampling,
            temperature=temperature,
            max_tokens=max(1, min(room, wish.most_tokens or room)),
            seed=seed,
            logprobs=0,
            rules=tokens.rules(timestamps=wish.timestamps),
        )
        said, logprobs = await self._engine.say(self._prompt(ids, window), params)
        average = sum(one.logprob for one in logprobs) / max(len(logprobs), 1)
        ended = bool(said) and said[-1] in wish.sampling.stop_token_ids
        kept = said[:-1] if ended else said
        return Attempt(kept, self._processor.text_of(kept), temperature, average, ended)

    async def _silent(self, window: MediaFeatures, seek: int, previous: tuple[int, ...]) -> float:
        """The probability that nothing is said in a window."""
        key = (seek, previous)
        if key not in self._silence:
            token = self._tokens.no_speech
            params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=(token,))
            ids = [*previous, self._tokens.start]
            _, logprobs = await self._engine.say(self._prompt(ids, window), params)
            self._silence = {key: math.exp(dict(logprobs[0].top)[token])}
        return self._silence[key]

    async def _times(
        self, window: MediaFeatures, previous: tuple[int, ...], attempt: Attempt, frames: int
    ) -> list[float]:
        """When each of an attempt's tokens is over, in seconds from the window's beginning."""
        beginning = self._beginning(previous)
        known = attempt.tokens if attempt.ended else attempt.tokens[:-1]  # what the model has read, not only said
        if not known:
            return [0.0] * len(attempt.tokens)
        params = PoolingParams("align", prompt_tokens=len(beginning), dimensions=max(1, frames // FRAMES_OF_ROW))
        weights = await self._engine.attention(self._prompt([*beginning, *known], window), params)
        ends = token_ends(weights, SECONDS_OF_TIMESTAMP)
        return [*ends, ends[-1]][: len(attempt.tokens)]

    # What becomes of it

    async def _segment(
        self,
        window: MediaFeatures,
        seek: int,
        previous: tuple[int, ...],
        attempt: Attempt,
        part: Part,
        times: list[float],
    ) -> Segment:
        offset = seek * SECONDS_OF_TIMESTAMP / FRAMES_OF_ROW
        tokens = attempt.tokens[part.first : part.last]
        silence = await self._silent(window, seek, previous) if self._wish.tells_silence else 0.0
        return Segment(
            seek,
            round(offset + part.start_s, 2),
            round(offset + part.end_s, 2),
            self._processor.text_of(tokens),
            tuple(tokens),
            attempt.temperature,
            attempt.avg_logprob,
            attempt.compression_ratio,
            silence,
            tuple(self._words(attempt.tokens, part, times, offset)) if times else (),
        )

    def _words(self, tokens: list[int], part: Part, times: list[float], offset: float) -> list[Word]:
        places = [i for i in range(part.first, part.last) if tokens[i] < self._tokens.end]
        spans = [(round(offset + (times[i - 1] if i else 0.0), 2), round(offset + times[i], 2)) for i in places]
        return words_of(
            [tokens[i] for i in places],
            spans,
            self._processor.text_of,
            spaced=self.language not in WITHOUT_SPACES,
            first_control=self._tokens.end,
        )

    def _remember(self, attempt: Attempt, parts: list[Part]) -> None:
        """What the next window may be told: of a pair of timestamps at the end of a part, one."""
        first = self._tokens.first_timestamp
        for part in parts:
            tokens = attempt.tokens[part.first : part.last]
            self._said += tokens[:-1] if len(tokens) > 2 and tokens[-2] >= first else tokens
        self._is_told = self._wish.conditions and attempt.temperature < CONDITIONS_BELOW

    def _previous(self) -> tuple[int, ...]:
        if self._is_told and self._said and self._tokens.previous is not None:
            return (self._tokens.previous, *self._said[-self._processor.most_prompt :])
        return self._wish.previous

    def _beginning(self, previous: tuple[int, ...]) -> list[int]:
        wish = self._wish
        return [*previous, *self._tokens.beginning(self.language, wish.task, timestamps=wish.timestamps)]

    def _prompt(self, ids: list[int], window: MediaFeatures) -> Prompt:
        return Prompt(np.array(ids, np.int32), media=(window,))


def _ratio(data: bytes) -> float:
    return len(data) / len(zlib.compress(data)) if data else 0.0


def _is_above(value: float, threshold: float | None) -> bool:
    return threshold is not None and value > threshold
