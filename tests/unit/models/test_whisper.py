"""Whisper against transformers' class: encoder, decoder in every cut, in the engine, and the rules of transcripts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine_harness import bench, request, tokens_of
from support.model_driver import Driver, Sequence
from support.whisper import ENGLISH, features, make_whisper, speech
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine import speech_rules
from sensorium.errors import CheckpointError
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model
from sensorium.processors.whisper import WhisperProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, MediaFeatures, MediaItem, Prompt, SpeechRules

START = [401, 402, 406, 410]  # start, en, transcribe, notimestamps


def processor_of(path: Path) -> WhisperProcessor:
    return WhisperProcessor(open_checkpoint(path), Tokenizer.from_folder(path))


def recording(seconds: float, seed: int = 0) -> MediaItem:
    data = speech(seconds, seed)
    return MediaItem("audio", data, hashlib.sha256(data.tobytes()).digest(), "file", sample_rate=16_000)


class Made:
    def __init__(self, path: Path, layout: str = "hub") -> None:
        self.oracle = make_whisper(path, layout)  # type: ignore[arg-type]
        self.model = load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")
        self.processor = processor_of(path)

    def window(self, seconds: float, seed: int = 0, first: int = 0) -> MediaFeatures:
        return self.processor.window(self.processor.process(recording(seconds, seed)), first)

    def memory(self, window: MediaFeatures) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.encode("audio", [{"mel": torch.from_numpy(window.arrays["mel"])}])[0]

    def greedy(self, window: MediaFeatures, tokens: list[int], count: int) -> list[int]:
        """The oracle's, without any rule."""
        ids, out, cache = torch.tensor([tokens]), [], None
        with torch.inference_mode():
            encoded = self.oracle.model.encoder(torch.from_numpy(window.arrays["mel"])[None])
            for _ in range(count):
                step = self.oracle(encoder_outputs=encoded, decoder_input_ids=ids, cache=cache, use_cache=True)
                ids, cache = step.logits[:, -1:].argmax(-1), step.cache
                out.append(int(ids))
        return out

    def request(self, window: MediaFeatures, tokens: list[int], count: int, salt: bytes = b"") -> EngineRequest:
        plain = request(tokens, count, salt=salt)
        prompt = Prompt(plain.prompt.token_ids, media=(window,))
        return EngineRequest(plain.id, prompt, plain.sampling, salt=salt)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("whisper"))


@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_logits_whatever_the_cut(layout: str, tmp_path: Path) -> None:
    one = Made(tmp_path, layout)
    window, tokens = one.window(2.7, first=30), [408, 60, 70, 80, *START, 90, 91]
    with torch.inference_mode():
        mel = torch.from_numpy(window.arrays["mel"])[None]
        expected = one.oracle(input_features=mel, decoder_input_ids=torch.tensor([tokens])).logits[0]
    memory = one.memory(window)
    for cut in range(len(tokens)):
        logits = Driver(one.model).prefill(Sequence(list(tokens), memory=memory), cut)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_features_are_the_published_ones(made: Made) -> None:
    for seconds in (0.0001, 0.01, 0.56, 1.0, 3.126):
        samples = speech(seconds) if seconds > 0.001 else np.ones(1, np.float32)
        item = MediaItem("audio", samples, b"k", sample_rate=16_000)
        found = made.processor.process(item).arrays["mel"]
        np.testing.assert_allclose(found, features(samples)[0].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("bins", "samples", "total", "least", "most"),
    [
        (80, 160, -111431.093, -0.46523, 1.53477),
        (80, 480_000, -59398.846, -0.42176, 1.57824),
        (128, 16_000, -136715.542, -0.36213, 1.63787),
    ],
)
def test_the_published_size(bins: int, samples: int, total: float, least: float, most: float, tmp_path: Path) -> None:
    make_whisper(tmp_path, num_mel_bins=bins, max_source_positions=1500)
    wave = np.sin(0.05 * np.arange(samples)).astype(np.float32)
    mel = processor_of(tmp_path).process(MediaItem("audio", wave, b"k", sample_rate=16_000)).arrays["mel"]
    assert mel.shape == (bins, 3000)
    assert float(mel.astype(np.float64).sum()) == pytest.approx(total, abs=0.5)
    assert (mel.min(), mel.max()) == (pytest.approx(least, abs=1e-4), pytest.approx(most, abs=1e-4))


def test_eight_requests_together_and_again(made: Made) -> None:
    """Unequal prompts, some of one recording; then from the prefix cache; then where there is too little room."""
    asked = [(made.window(0.4 + 0.3 * (i % 5), i % 5), [408, *range(50, 50 + 3 * i), *START]) for i in range(8)]
    expected = [made.greedy(window, tokens, 32) for window, tokens in asked]
    assert len({tuple(one) for one in expected}) == 8
    engine = bench(made.model, max_model_len=64, block_size=4)
    for again in range(2):
        results = engine.run(*(made.request(window, tokens, 32) for window, tokens in asked))
        assert tokens_of(results) == expected
        assert not again or min(one.cached for one in results) > 0
    narrow = bench(made.model, max_model_len=64, block_size=4, kv_tokens=160)
    results = narrow.run(*(made.request(window, tokens, 32) for window, tokens in asked))
    assert tokens_of(results) == expected
    assert narrow.engine.scheduler.preemptions


def test_a_recording_is_encoded_once_for_a_tenant_and_never_taken_for_another(made: Made) -> None:
    engine = bench(made.model, max_model_len=64, block_size=4)
    encoder, tokens = engine.engine.encoder, [408, 60, 61, 62, 63, *START]
    first, second = made.window(0.8, 1), made.window(0.8, 2)
    found = engine.run(made.request(first, tokens, 12))
    assert engine.run(made.request(first, tokens, 12))[0].tokens == found[0].tokens == made.greedy(first, tokens, 12)
    assert (encoder.queries, encoder.hits) == (2, 1)
    other = engine.run(made.request(second, tokens, 12), made.request(first, tokens, 12, b"tenant"))
    assert [one.cached for one in other] == [0, 0]
    assert other[0].tokens == made.greedy(second, tokens, 12)
    assert (encoder.queries, encoder.hits) == (4, 1)


def test_what_cannot_run_is_refused(made: Made) -> None:
    engine = bench(made.model, max_model_len=64)
    window = made.window(0.5)
    for media in ((), (window, window)):
        plain = request(START, 4)
        bare = EngineRequest(plain.id, Prompt(plain.prompt.token_ids, media=media), plain.sampling)
        assert engine.run(bare)[0].error == "This model needs one recording."


def test_quantised_weights_and_an_int8_cache(made: Made, tmp_path: Path) -> None:
    """As close to the exact logits as eight bits are."""
    folder = made.model.checkpoint.folder
    quantised = load_model(
        open_checkpoint(folder), dtype=torch.float32, device="cpu", quantization=Quantization(8), quantize_towers=True
    )
    window, tokens = made.window(0.9), [*START, *range(60, 90)]
    memory = made.memory(window)
    exact = Driver(made.model).prefill(Sequence(list(tokens), memory=memory))
    for model, int8 in ((quantised, False), (made.model, True)):
        logits = Driver(model, int8_cache=int8).prefill(Sequence(list(tokens), memory=memory), 20)
        assert 0 < (logits - exact).norm() < 0.05 * exact.norm()


def test_rules_are_those_of_the_reference() -> None:
    """On many random beginnings and logits, for models with and without a bound for the first timestamp."""
    rng, first, end = np.random.default_rng(0), 60, 40
    for case in range(300):
        stated = GenerationConfig(eos_token_id=end, no_timestamps_token_id=first - 1)
        initial = None if case % 3 == 0 else 5
        stated.max_initial_timestamp_index = initial
        begin = 3
        length = int(rng.integers(0, 6))
        said = [
            int(rng.integers(first, first + 15) if rng.random() < 0.5 else rng.integers(0, end)) for _ in range(length)
        ]
        scores = torch.from_numpy(rng.standard_normal((1, 80)).astype(np.float32) * 3)
        ids = torch.tensor([[50, 51, 52, *said]])
        expected = SuppressTokensAtBeginLogitsProcessor([3, end], begin)(ids, scores)
        expected = SuppressTokensLogitsProcessor([7, 8, 51])(ids, expected)
        rules = SpeechRules(end, (7, 8, 51), (3, end), None, initial)
        if case % 5:
            expected = WhisperTimeStampLogitsProcessor(stated, begin)(ids, expected)
            rules = SpeechRules(end, (7, 8, 51), (3, end), first, initial)
        row = scores[0].clone()
        row[speech_rules.forbidden(rules, len(row), is_first=not said)] = -torch.inf
        speech_rules.hold(row, rules, said)
        torch.testing.assert_close(row, expected[0])


def test_models_of_english_alone(tmp_path: Path) -> None:
    make_whisper(tmp_path, generation=ENGLISH)
    assert processor_of(tmp_path).speech.beginning(None, "transcribe", timestamps=False) == [401, 410]


def test_previous_text_holds_no_control_tokens(made: Made) -> None:
    ids = made.processor.previous_ids("a <|notimestamps|> b")
    assert ids[0] == 408 and max(ids[1:]) < 400
    assert len(made.processor.previous_ids("word " * 100)) == 1 + 64 // 2 - 1
    assert made.processor.previous_ids("  ") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"alignment_heads": [[5, 0]]}, "alignment_heads"), ({"alignment_heads": [[0]]}, "alignment_heads")],
)
def test_what_a_checkpoint_says_wrongly(change: dict[str, object], message: str, tmp_path: Path) -> None:
    make_whisper(tmp_path, generation=change)
    with pytest.raises(CheckpointError, match=message):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


def test_an_extractor_of_another_kind_is_refused(tmp_path: Path) -> None:
    make_whisper(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"hop_length": 160', '"hop_length": 200'))
    with pytest.raises(CheckpointError, match="hop_length must be 160"):
        processor_of(tmp_path)
