"""Recordings of any length against transformers' `generate`: windows, segments, words, silence and second attempts."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.engine_harness import bench
from support.whisper import ENGLISH, extractor, make_whisper, speech
from transformers.models.whisper.generation_whisper import _dynamic_time_warping
from transformers.models.whisper.tokenization_whisper import _combine_tokens_into_words

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.models.loading import load_model
from sensorium.processors.whisper import WhisperProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.serving.transcription import Segment, Thresholds, Transcription, Wish
from sensorium.serving.words import token_ends, words_of
from sensorium.types import EngineRequest, MediaItem, PoolingParams, Prompt, SamplingParams, TokenLogprob

NEVER = Thresholds(None, None, None, None)
END = 400
MOST = 12  # tokens of a window
_ids = itertools.count(1)


class Made:
    """A model, its oracle, and the engine that a transcription asks."""

    def __init__(self, path: Path, **generation: Any) -> None:
        self.oracle = make_whisper(path, seed=6, generation=generation)
        checkpoint = open_checkpoint(path)
        self.model = load_model(checkpoint, dtype=torch.float32, device="cpu")
        self.processor = WhisperProcessor(checkpoint, Tokenizer.from_folder(path))
        self.bench = bench(self.model, max_model_len=64)
        self.asked: list[SamplingParams] = []

    async def say(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], list[TokenLogprob]]:
        self.asked.append(params)
        result = self.bench.run(EngineRequest(next(_ids), prompt, params))[0]
        assert not result.error
        return result.tokens, result.logprobs

    async def attention(self, prompt: Prompt, params: PoolingParams) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.bench.run(EngineRequest(next(_ids), prompt, pooling=params))[0].vector
        return found

    def transcription(self, samples: NDArray[np.float32], **wish: Any) -> Transcription:
        key = hashlib.sha256(samples.tobytes()).digest()
        recording = self.processor.process(MediaItem("audio", samples, key, sample_rate=16_000))
        sampling = SamplingParams(max_tokens=1, stop_token_ids=(END,))
        wish = {"language": "en", "timestamps": True, "context": 64, "thresholds": NEVER, "most_tokens": MOST, **wish}
        return Transcription(self.processor, recording, self, Wish("transcribe", sampling, **wish))

    def ours(self, samples: NDArray[np.float32], **wish: Any) -> list[Segment]:
        async def collect() -> list[Segment]:
            return [one async for one in self.transcription(samples, **wish).segments()]

        return asyncio.run(collect())

    def theirs(self, samples: NDArray[np.float32], **options: Any) -> list[dict[str, Any]]:
        """The oracle's segments, but for those without text."""
        long = {"truncation": False, "padding": "longest"} if len(samples) > 16_000 else {}
        own = extractor(80)(samples, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True, **long)
        options = {
            "return_timestamps": True,
            "return_segments": True,
            "task": "transcribe",
            "max_new_tokens": MOST,
            **options,
        }
        with torch.inference_mode():
            found = self.oracle.generate(
                input_features=own.input_features, attention_mask=own.attention_mask, **options
            )
        return [one for one in found["segments"][0] if self.processor.text_of(one["tokens"].tolist()).strip()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("whisper"))


def assert_same(ours: list[Segment], theirs: list[dict[str, Any]]) -> None:
    assert [list(one.tokens) for one in ours] == [one["tokens"].tolist() for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert (one.start_s, one.end_s) == (pytest.approx(float(other["start"])), pytest.approx(float(other["end"])))


@pytest.mark.parametrize("seconds", [1.0, 2.513])
def test_windows_segments_and_words(seconds: float, made: Made) -> None:
    samples = speech(seconds, 3)
    theirs = made.theirs(samples, language="en", return_token_timestamps=True)
    ours = made.ours(samples, words=True)
    assert_same(ours, theirs)
    if seconds > 1:
        assert len(ours) > 2
    for one, other in zip(ours, theirs, strict=True):
        places = [i for i, token in enumerate(one.tokens) if token < END]
        times = other["token_timestamps"][places].tolist()
        assert one.words[-1].end_s == pytest.approx(times[-1], abs=0.011)
        assert {round(word.end_s, 1) for word in one.words} <= {round(time, 1) for time in times}
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(one.words))


def test_a_short_one_without_timestamps(made: Made) -> None:
    samples = speech(0.7, 5)
    own = extractor(80)(samples, sampling_rate=16_000, return_tensors="pt").input_features
    expected = made.oracle.generate(
        input_features=own, language="de", task="transcribe", return_timestamps=False, max_new_tokens=MOST
    )
    found = made.ours(samples, timestamps=False, language="de")
    assert len(found) == 1
    tokens = expected[0].tolist()
    assert list(found[0].tokens) == tokens[: tokens.index(END) if END in tokens else None]
    assert (found[0].start_s, found[0].end_s) == (0.0, 0.7)


@pytest.mark.parametrize(
    ("wish", "together"),
    [
        ({"timestamps": False}, 4),
        ({"timestamps": False, "hurries": True}, 3),  # of six windows one, two, and the others
        ({"timestamps": False, "conditions": True}, 1),
        ({}, 1),
    ],
)
def test_windows_that_depend_on_none_are_computed_together(
    wish: dict[str, Any], together: int, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And say what they say one after the other."""
    samples, running, most = speech(5.3, 5), 0, 0
    plain = made.say

    async def say(prompt: Prompt, params: SamplingParams) -> tuple[list[int], list[TokenLogprob]]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        found = await plain(prompt, params)
        running -= 1
        return found

    monkeypatch.setattr(made, "say", say)
    monkeypatch.setattr("sensorium.serving.transcription.WINDOWS_TOGETHER", 4)
    found = made.ours(samples, **wish)
    assert most == together and running == 0
    monkeypatch.setattr("sensorium.serving.transcription.WINDOWS_TOGETHER", 1)
    again = made.ours(samples, **wish)
    assert [(one.seek, one.end_s, one.tokens) for one in again] == [(one.seek, one.end_s, one.tokens) for one in found]
    assert len(found) > 4


def test_who_stops_listening_stops_the_windows_ahead(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, cancelled = made.say, 0

    async def say(prompt: Prompt, params: SamplingParams) -> tuple[list[int], list[TokenLogprob]]:
        nonlocal cancelled
        if len(made.asked) == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                raise
        return await plain(prompt, params)

    monkeypatch.setattr(made, "say", say)

    async def first() -> Segment:
        segments = made.transcription(speech(5.3, 5), timestamps=False).segments()
        try:
            return await anext(segments)
        finally:
            await segments.aclose()  # type: ignore[attr-defined]

    made.asked.clear()
    assert asyncio.run(first()).text
    assert cancelled == 5


@pytest.mark.parametrize("conditions", [False, True])
def test_a_text_before_the_recording(conditions: bool, made: Made) -> None:
    samples, previous = speech(1.4, 3), made.processor.previous_ids("a cat and a dog")
    theirs = made.theirs(samples, language="en", prompt_ids=torch.tensor(previous), condition_on_prev_tokens=conditions)
    ours = made.ours(samples, previous=tuple(previous), conditions=conditions)
    assert_same(ours, theirs)
    assert [one.tokens for one in ours] != [one.tokens for one in made.ours(samples)]


def test_the_language_is_heard(made: Made) -> None:
    found = set()
    for seed in range(2):
        samples = speech(1.2, seed)
        transcription = made.transcription(samples, language=None)

        async def collect(one: Transcription = transcription) -> list[Segment]:
            return [segment async for segment in one.segments()]

        ours = asyncio.run(collect())
        assert_same(ours, made.theirs(samples))
        own = extractor(80)(samples, sampling_rate=16_000, return_tensors="pt", truncation=True).input_features
        assert transcription.language is not None
        expected = int(made.oracle.detect_language(input_features=own)[0])
        assert made.processor.speech.languages[transcription.language] == expected
        found.add(transcription.language)
    assert found


def test_silence_says_nothing_and_its_probability_is_told(made: Made) -> None:
    samples = speech(1.0, 3)
    mel = extractor(80)(samples, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.inference_mode():
        logits = made.oracle(input_features=mel, decoder_input_ids=torch.tensor([[401]])).logits[0, 0]
    expected = float(logits.softmax(-1)[made.processor.speech.no_speech])
    told = made.ours(samples, tells_silence=True)
    first = [one.no_speech_prob for one in told if one.seek == 0]
    assert first == [pytest.approx(expected, rel=1e-3)] * len(first)
    unlikely = told[0].avg_logprob + 0.01
    for logprob, no_speech, is_silent in (
        (unlikely, expected * 0.9, True),
        (unlikely, expected * 1.1, False),
        (told[0].avg_logprob - 0.01, expected * 0.9, False),
        (None, expected * 0.9, True),
    ):
        thresholds = replace(NEVER, logprob=logprob, no_speech=no_speech)
        found = made.ours(samples, thresholds=thresholds, temperatures=(0.0,))
        assert (found == []) == is_silent
        if logprob is not None:
            options = {"logprob_threshold": logprob, "no_speech_threshold": no_speech, "temperature": (0.0,)}
            assert (made.theirs(samples, language="en", **options) == []) == is_silent


def test_the_mean_of_logprobs_is_the_reference_s(made: Made) -> None:
    samples = speech(1.0, 3)
    found = made.theirs(samples, language="en", logprob_threshold=-100.0, temperature=(0.0,))
    result = found[0]["result"]
    tokens = result["sequences"][-len(result["scores"]) :]
    expected = float(made.oracle._retrieve_avg_logprobs(result["scores"], tokens, 0.0))
    assert made.ours(samples)[0].avg_logprob == pytest.approx(expected, abs=1e-4)


def test_what_is_too_unlikely_or_too_regular_is_said_again(made: Made) -> None:
    samples, sure = speech(0.3, 3), Thresholds(0.0, None, None, None)
    made.asked.clear()
    best = made.ours(samples, thresholds=sure)[0]
    tried = [one.temperature for one in made.asked if one.rules is not None]
    assert tried == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] * (len(tried) // 6)
    assert best.avg_logprob == max(best.avg_logprob, made.ours(samples)[0].avg_logprob)
    assert made.ours(samples, thresholds=sure)[0] == best  # what is drawn depends on the recording alone
    for regular in (replace(NEVER, compression=0.0), replace(NEVER, token_compression=0.0)):
        made.asked.clear()
        made.ours(samples, thresholds=regular, temperatures=(0.0, 0.5))
        assert {one.temperature for one in made.asked} == {0.0, 0.5}
    made.asked.clear()
    made.ours(samples)
    assert {one.temperature for one in made.asked} == {0.0}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Thresholds()),
        ({"logprob_threshold": None, "no_speech_threshold": 0.3}, Thresholds(logprob=None, no_speech=0.3)),
        ({"compression_ratio_threshold": 1.35}, Thresholds(compression=None, token_compression=1.35)),
    ],
)
def test_thresholds_of_a_checkpoint(stated: dict[str, float | None], expected: Thresholds) -> None:
    assert Thresholds.of(stated) == expected


def test_models_of_english_alone(tmp_path: Path) -> None:
    made = Made(tmp_path, **ENGLISH)
    own = extractor(80)(speech(0.9), sampling_rate=16_000, return_tensors="pt").input_features
    expected = made.oracle.generate(input_features=own, return_timestamps=False, max_new_tokens=MOST)[0].tolist()
    tokens = list(made.ours(speech(0.9), timestamps=False, language=None)[0].tokens)
    assert tokens == expected[: expected.index(END) if END in expected else None]


def test_the_path_is_the_reference_s() -> None:
    for seed, shape in enumerate([(1, 1), (1, 7), (7, 1), (5, 9), (12, 40), (40, 12)]):
        weights = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        text, rows = _dynamic_time_warping(-weights.astype(np.float64))
        jumps = np.pad(np.diff(text), (1, 0), constant_values=1).astype(bool)
        assert token_ends(weights, 0.02) == pytest.approx((rows[jumps] * 0.02).tolist())


@pytest.mark.parametrize("language", ["english", "chinese"])
@pytest.mark.parametrize(
    "text",
    [
        ' He said: "It isn\'t far," (two) and left... ¡Hola! It costs $5 or 3.5 €.',
        "Grüße aus Köln, où est la bibliothèque? 你好，世界。 Привет 🙂 naïve",
    ],
)
def test_words_are_the_reference_s(text: str, language: str, made: Made) -> None:
    tokenizer = made.processor.tokenizer
    ids = tokenizer.encode(text)
    like = SimpleNamespace(decode=lambda some, **_: tokenizer.decode(some), eos_token_id=END, language=language)
    expected, _, places = _combine_tokens_into_words(like, list(ids), language)
    times = [(float(i), float(i + 1)) for i in range(len(ids))]
    found = words_of(ids, times, tokenizer.decode, spaced=language == "english", first_control=END)
    assert [one.text for one in found] == expected
    assert [(one.start_s, one.end_s) for one in found] == [(own[0], own[-1] + 1) for own in places]
