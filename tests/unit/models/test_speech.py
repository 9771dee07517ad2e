"""Language models behind an audio tower (Qwen2-Audio, Voxtral, Qwen3-ASR) against transformers: features, counts, rows,
logits, greedy tokens, every cut; and through the engine, cold and warm, together, in chunks and after preemption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import checkpoints, engine_harness, speech
from support.families import maker_of
from support.image_families import record, word_tokenizer
from support.media_models import Served, again, load
from support.model_driver import Driver
from support.speech import recording
from transformers import Qwen3ASRFeatureExtractor, WhisperFeatureExtractor
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME, _detect_and_fix_repetitions
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeAudioEncoderConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES, load_class
from sensorium.errors import CheckpointError, MediaError, RequestError
from sensorium.models.loading import load_model
from sensorium.processors.base import Processor
from sensorium.processors.qwen2_audio import Qwen2AudioProcessor
from sensorium.processors.qwen3_asr import LANGUAGES, Qwen3AsrProcessor, without_loops
from sensorium.processors.voxtral import VoxtralProcessor
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.types import EngineRequest, MediaItem, Prompt, SamplingParams

NAMES = {
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    "qwen3_asr": "Qwen3ASRForConditionalGeneration",
}
WINDOW = {"qwen2_audio": 16_000, "voxtral": 15_360}  # samples, of the tiny towers
LENGTHS = {  # samples: the shortest, uneven ones, a full window or chunk, one more, several
    "qwen2_audio": (1_000, 7_001, 12_345, 15_999, 16_000, 16_001, 40_000),
    "voxtral": (1, 7_001, 15_359, 15_360, 15_361, 40_000),
    "qwen3_asr": (1, 8_000, 9_000, 15_900, 16_000, 16_160, 40_000, 33_333),
}
each_family = pytest.mark.parametrize("family", NAMES)
each_layout = pytest.mark.parametrize("layout", ["hub", "transformers"])


@cache
def folder_of(family: str, layout: str) -> TemporaryDirectory[str]:
    """An engine looks at the files again: the folder stays as long as it is kept here."""
    return TemporaryDirectory()


@cache
def served(family: str, layout: str = "hub") -> Served:
    folder = Path(folder_of(family, layout).name)
    return load(folder, maker_of(f"speech.{family}")(folder, layout))


def published(family: str, clips: Sequence[MediaItem]) -> dict[str, torch.Tensor]:
    """What transformers' processors give the models, clip by clip."""
    if family == "qwen3_asr":
        made = [
            Qwen3ASRFeatureExtractor()(one.data, sampling_rate=speech.RATE, padding=True, return_attention_mask=True)
            for one in clips
        ]
        longest = max(one["input_features"].shape[-1] for one in made)
        pad = [(0, longest - one["input_features"].shape[-1]) for one in made]
        return {
            name: torch.cat([torch.nn.functional.pad(one[key], by) for one, by in zip(made, pad, strict=True)])
            for name, key in (("input_features", "input_features"), ("input_features_mask", "attention_mask"))
        }
    window = WINDOW[family]
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    extractor.n_samples, extractor.nb_max_frames = window, window // 160
    if family == "qwen2_audio":
        how = {"padding": "max_length", "return_attention_mask": True, "return_tensors": "pt"}
        made = extractor([one.data for one in clips], sampling_rate=speech.RATE, **how)
        return {"input_features": made["input_features"], "feature_attention_mask": made["attention_mask"]}
    how = {"padding": True, "truncation": False, "pad_to_multiple_of": window, "return_tensors": "pt"}
    windows = [
        extractor(one.data, sampling_rate=speech.RATE, **how)["input_features"]
        .reshape(128, -1, window // 160)
        .transpose(0, 1)
        for one in clips
    ]
    return {"input_features": torch.cat(windows)}


def inputs_of(family: str, clips: Sequence[MediaItem], prompt: Prompt) -> dict[str, Any]:
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **(published(family, clips) if clips else {})}


def theirs_of(family: str, here: Served, clips: Sequence[MediaItem], prompt: Prompt) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = here.oracle(**inputs_of(family, clips, prompt)).logits[0]
    return logits


@cache
def greedy_of(family: str, lengths: tuple[int, ...], text: str) -> list[int]:
    """transformers' 32 tokens."""
    here, clips = served(family, "transformers"), [recording(n, n) for n in lengths]
    prompt = here.prompt(clips, text)
    made = here.oracle.generate(
        **inputs_of(family, clips, prompt), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = made[0, len(prompt.token_ids) :].tolist()
    return tokens


# Features and counts.


def processor_of(family: str) -> Processor:
    """With the sizes that are published."""
    made: type[Processor] = load_class(FAMILIES[NAMES[family]].processor)
    marks: tuple[str, str, str] = made.marks  # type: ignore[attr-defined]
    tokens = {text: 7 + i for i, text in enumerate(marks) if text} | {"<s>": 1}
    fill = {"audio_token_id": tokens[marks[1]]}
    return made(record({"audio_config": {}, **fill}, {}), word_tokenizer(tokens))


GOLDEN = {  # samples -> rows and the features' sum, with zeros or silence up to whole windows or chunks
    "qwen2_audio": {400: (1, -407643.99), 8000: (12, -397509.62), 16001: (25, -386881.17), 720000: (750, 229397.05)},
    "voxtral": {1: (375, -575772.02), 80000: (375, -300168.64), 480000: (375, 229397.05), 720000: (750, 141220.47)},
    "qwen3_asr": {1: (7, -9372.02), 7999: (7, 3819.04), 16159: (13, 7646.94), 24000: (20, 11441.53)},
}
COUNTS = {
    "qwen2_audio": {16000: 25, 24000: 37, 32000: 50, 80000: 125, 240000: 375, 479999: 750, 960000: 750},
    "voxtral": {320: 375, 479999: 375, 480001: 750, 960000: 750, 9_600_000: 7500},
    "qwen3_asr": {16000: 13, 16001: 13, 32000: 26, 80000: 65, 240000: 195, 479999: 390, 720000: 585, 960000: 780},
}


@pytest.mark.parametrize(("family", "samples"), [(family, one) for family in GOLDEN for one in GOLDEN[family]])
def test_features_and_rows_are_the_known_ones(family: str, samples: int) -> None:
    rows, total = GOLDEN[family][samples]
    processor = processor_of(family)
    features = processor.process(recording(samples))
    assert features.num_rows == rows == processor.num_tokens("audio", 1, 1, samples)
    assert features.arrays["mel"].sum(dtype=np.float64) == pytest.approx(total, abs=0.2)


@each_family
def test_rows_are_the_known_ones(family: str) -> None:
    processor = processor_of(family)
    assert {n: processor.num_tokens("audio", 1, 1, n) for n in COUNTS[family]} == COUNTS[family]


def mel_of(family: str, clip: MediaItem) -> NDArray[np.float32]:
    """transformers', [bins, frames]."""
    made = published(family, [clip])
    if family == "voxtral":
        return made["input_features"].transpose(0, 1).reshape(128, -1).numpy()
    frames = int(made["input_features_mask"].sum()) if family == "qwen3_asr" else None
    return made["input_features"][0, :, :frames].numpy()


@each_family
def test_features_equal_transformers(family: str) -> None:
    here = served(family)
    for samples in LENGTHS[family]:
        clip = recording(samples, samples)
        np.testing.assert_allclose(here.processor.process(clip).arrays["mel"], mel_of(family, clip), atol=1e-4)


def test_clips_without_a_row_are_refused() -> None:
    processor = processor_of("qwen2_audio")
    for samples in (1, 320):
        with pytest.raises(MediaError, match="too short"):
            processor.num_tokens("audio", 1, 1, samples)
        with pytest.raises(MediaError, match="too short"):
            processor.process(recording(samples))
    assert processor.num_tokens("audio", 1, 1, 321) == 1


# The tower and the model.


@each_layout
@each_family
def test_rows_equal_transformers(family: str, layout: str) -> None:
    """Every clip as it is alone, whatever is encoded beside it. The package's layout is the one of clips that are
    convolved as they are, for which transformers has another class."""
    here = served(family, layout)
    lengths = [n for n in LENGTHS[family] if layout == "transformers" or family != "qwen3_asr" or n >= 16_000]
    clips = [recording(n, n) for n in lengths]
    media = [here.processor.process(one) for one in clips]
    for clip, features, ours in zip(clips, media, here.encode(media), strict=True):
        inputs = published(family, [clip])
        with torch.inference_mode():
            theirs = rows_of_transformers(family, here, inputs)
        assert len(ours) == features.num_rows
        torch.testing.assert_close(ours, theirs[: len(ours)], atol=1e-4, rtol=0)


def rows_of_transformers(family: str, here: Served, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model: Any = here.oracle.model
    rows: torch.Tensor
    if family != "qwen2_audio":
        rows = model.get_audio_features(**inputs).pooler_output
        return rows
    mask = inputs["feature_attention_mask"]
    heard = torch.arange(mask.shape[1] // 2) < (mask.sum() - 1) // 2 + 1
    bias = torch.zeros(1, 1, 1, len(heard)).masked_fill(~heard, torch.finfo(torch.float32).min)
    states = model.audio_tower(inputs["input_features"], attention_mask=bias).last_hidden_state
    return model.multi_modal_projector(states)[0]


@each_layout
@each_family
def test_logits_equal_transformers(family: str, layout: str) -> None:
    here, clips = served(family, layout), [recording(17_001, 1), recording(30_500, 2)]
    prompt = here.prompt(clips)
    ours = Driver(here.model).prefill(here.run(prompt))
    torch.testing.assert_close(ours, theirs_of(family, here, clips, prompt), atol=1e-4, rtol=0)


@each_family
def test_prefill_cut_everywhere_inside_media(family: str) -> None:
    here, clips = served(family), [recording(16_500, 3)]
    prompt = here.prompt(clips)
    driver, run = Driver(here.model, num_blocks=4096), here.run(prompt)
    whole = driver.prefill(again(run))
    span = prompt.spans[0]
    for place in range(span.offset, span.offset + span.length + 1):
        torch.testing.assert_close(driver.prefill(again(run), place), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(driver.prefill(again(run), *[1] * len(whole)), whole, atol=1e-4, rtol=0)


# The engine.

REQUESTS: tuple[tuple[tuple[int, ...], str], ...] = (
    ((16_500,), "USER: {} what is it?"),
    ((16_500,), "USER: {} what is it, then?"),
    ((17_000,), "USER: {} what is it?"),
    ((30_500, 16_000), "{}"),
    ((), "one two three"),
    ((20_000,), "a longer question comes before the answer, and then {} and nothing"),
    ((16_500, 17_000), "{} the same?"),
    ((40_000,), "{}."),
)


def requests_of(family: str) -> list[EngineRequest]:
    here, made = served(family), []
    for index, (lengths, text) in enumerate(REQUESTS, 1):
        prompt = here.prompt([recording(n, n) for n in lengths], text)
        made.append(EngineRequest(index, prompt, SamplingParams(max_tokens=32, temperature=0.0)))
    return made


@each_family
def test_greedy_tokens_cold_warm_and_together(family: str) -> None:
    expected = [greedy_of(family, *one) for one in REQUESTS]
    assert all(len(set(tokens)) > 4 for tokens in expected), "a model that runs in circles shows nothing"
    bench = engine_harness.bench(served(family).model, block_size=4)
    for request, tokens in zip(requests_of(family), expected, strict=True):
        cold, warm = (bench.run(request)[0] for _ in range(2))
        assert cold.tokens == warm.tokens == tokens
        assert warm.cached > 0
    together = engine_harness.bench(served(family).model).run(*requests_of(family))
    assert engine_harness.tokens_of(together) == expected


@each_family
def test_greedy_tokens_in_chunks_and_after_preemption(family: str) -> None:
    """A step has fewer tokens than a clip has rows, and the cache room for two requests."""
    expected = [greedy_of(family, *one) for one in REQUESTS]
    longest = max(len(request.prompt.token_ids) for request in requests_of(family)) + 32
    bench = engine_harness.bench(
        served(family).model, block_size=4, kv_tokens=(2 * longest + 11) // 4 * 4, max_num_batched_tokens=11
    )
    results = bench.run(*requests_of(family))
    assert engine_harness.tokens_of(results) == expected
    assert sum(result.preemptions for result in results) > 0


# Prompts.


def chat_of(family: str, *messages: Message) -> tuple[str, Processor]:
    processor = served(family).processor
    template = LocalTemplate(
        FAMILIES[NAMES[family]].chat_template or "",
        processor.tokenizer,
        modalities=processor.modalities,
        placeholder=processor.placeholder,
    )
    return template.render(list(messages)), processor


def user(*parts: str) -> Message:
    return Message("user", tuple(MediaPart("audio") if part == "audio" else TextPart(part) for part in parts))


def test_qwen2_audio_numbers_the_clips_of_a_conversation() -> None:
    text, _ = chat_of(
        "qwen2_audio", user("audio", "What?"), Message("assistant", (TextPart("A bell."),)), user("audio", "And?")
    )
    heard = "<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nAudio 1: {heard}What?<|im_end|>\n<|im_start|>assistant\nA bell.<|im_end|>\n"
        f"<|im_start|>user\nAudio 2: {heard}And?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_voxtral_writes_turns_as_mistrals_program() -> None:
    system = Message("system", (TextPart("Be short."),))
    text, processor = chat_of("voxtral", user("audio", "audio", "Same?"), Message("assistant", (TextPart("No."),)))
    assert text == "<s>[INST][BEGIN_AUDIO][AUDIO][BEGIN_AUDIO][AUDIO]Same?[/INST]No.</s>"
    assert chat_of("voxtral", system, user("Hi"))[0] == "<s>[SYSTEM_PROMPT]Be short.[/SYSTEM_PROMPT][INST]Hi[/INST]"
    told = "<s>[INST]Be short.\n\n[BEGIN_AUDIO][AUDIO]?[/INST]"
    assert chat_of("voxtral", system, user("audio", "?"))[0] == told
    ids = processor.build(told, [processor.process(recording(9))]).token_ids
    assert (ids == processor.placeholder_id("audio")).sum() == 12
    assert processor.tokenizer.id_to_token(int(ids[-3 - 12])) == "[BEGIN_AUDIO]"


def test_qwen3_asr_keeps_the_system_turn_that_is_empty() -> None:
    text, _ = chat_of("qwen3_asr", user("audio"))
    heard = "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_start|>system\n<|im_end|>\n{heard}"
    text, _ = chat_of("qwen3_asr", Message("system", (TextPart("names: Köln"),)), user("audio"))
    assert text == f"<|im_start|>system\nnames: Köln<|im_end|>\n{heard}"


@each_family
def test_clips_and_placeholders_must_agree(family: str) -> None:
    processor = served(family).processor
    with pytest.raises(RequestError, match=r"0 audio placeholder\(s\), but the request brings 1 audio"):
        processor.build("none", [processor.process(recording(9_000))])
    typed = processor.tokenizer.escape(processor.placeholder("audio", 0))
    assert not processor.build(typed, []).spans


# What Qwen3-ASR's completions are read by.


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("a" * 20, "a" * 20),
        ("a" * 21, "a"),
        ("b" + "ha" * 25 + " end", "bha end"),
        ("ha" * 19, "ha" * 19),
        ("no loop here", "no loop here"),
        ("x" * 20 + "y" * 30, "x" * 20 + "y"),
        ("x" * 20 + " and here is more of it, long enough", "x and here is more of it, long enough"),
        ("z" * 19 + "abcdefghij" * 20, "z" * 19 + "abcdefghij"),
    ],
)
def test_loops_are_repaired(text: str, repaired: str) -> None:
    assert without_loops(text) == repaired == _detect_and_fix_repetitions(text)


def test_languages_are_the_published_ones() -> None:
    assert dict(LANGUAGES) == LANGUAGE_CODE_TO_NAME


# Weights.


def in_memory(key: str) -> str:
    """The names that transformers has in memory."""
    if key.startswith("language_model.model."):
        return key.replace("language_model.model.", "model.language_model.")
    return key.removeprefix("language_model.") if "lm_head" in key else f"model.{key}"


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
def test_names_in_memory_are_read_too(family: str, tmp_path: Path) -> None:
    oracle = maker_of(f"speech.{family}")(tmp_path)
    checkpoints.write_weights(tmp_path, {in_memory(k): v for k, v in checkpoints.read_weights(tmp_path).items()})
    here, reference = load(tmp_path, oracle), served(family)
    media = [here.processor.process(recording(20_000))]
    torch.testing.assert_close(here.encode(media), reference.encode(media), atol=0, rtol=0)


@each_layout
def test_qwen3_asr_with_the_head_that_is_published(layout: checkpoints.Layout, tmp_path: Path) -> None:
    here = load(tmp_path, speech.make_qwen3_asr(tmp_path, layout, tied=True))
    clips = [recording(17_001, 1)]
    prompt = here.prompt(clips)
    ours = Driver(here.model).prefill(here.run(prompt))
    torch.testing.assert_close(ours, theirs_of("qwen3_asr", here, clips, prompt), atol=1e-4, rtol=0)
    assert here.model.tied


@each_family
def test_missing_tensors_are_named(family: str, tmp_path: Path) -> None:
    maker_of(f"speech.{family}")(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    lost = next(key for key in tensors if key.endswith("layers.1.self_attn.k_proj.weight") and "audio" in key)
    checkpoints.write_weights(tmp_path, {key: value for key, value in tensors.items() if key != lost})
    with pytest.raises(CheckpointError, match=r"missing.*audio_tower\.layers\.1\.self_attn\.k_proj\.weight"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


@each_family
def test_bfloat16_rows_are_close(family: str, tmp_path: Path) -> None:
    maker_of(f"speech.{family}")(tmp_path)
    here = served(family)
    rounded = load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16, device="cpu")
    features = here.processor.process(recording(40_000))
    item = {name: torch.from_numpy(array) for name, array in features.arrays.items()}
    with torch.inference_mode():
        ours = rounded.encode("audio", [item])[0]
    expected = here.encode([features])[0]
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).norm() < 0.03 * expected.norm()


def test_clips_shorter_than_a_chunk_are_convolved_as_their_program_does() -> None:
    """The published package, whose tower is Qwen3-Omni's, as they are; transformers with zeros behind them."""
    here, filled = served("qwen3_asr"), served("qwen3_asr", "transformers")
    oracle = Qwen3OmniMoeAudioEncoder(Qwen3OmniMoeAudioEncoderConfig(**here.model.checkpoint.config["audio_config"]))
    tower = "thinker.audio_tower."
    tensors = checkpoints.read_weights(here.model.checkpoint.folder)
    found = {key.removeprefix(tower): value for key, value in tensors.items() if key.startswith(tower)}
    oracle.load_state_dict(found)
    for samples in (8_000, 9_000, 15_900, 16_000, 16_160, 40_000):
        clip = recording(samples, samples)
        features, mel = here.processor.process(clip), torch.from_numpy(mel_of("qwen3_asr", clip))
        with torch.inference_mode():
            theirs = oracle(mel, feature_lens=torch.tensor([mel.shape[1]])).last_hidden_state
        ours = here.encode([features])[0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        differs = (ours - filled.encode([features])[0]).abs().max() > 1e-3
        assert differs == (samples == 8_000)  # the others' last row does not reach the end


def test_classes() -> None:
    found: list[Callable[..., Any]] = [type(served(family).processor) for family in NAMES]
    assert found == [Qwen2AudioProcessor, VoxtralProcessor, Qwen3AsrProcessor]
