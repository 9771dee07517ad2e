"""Ultravox against a composition written here: Whisper's encoder, the projector's formula, Llama on embeddings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.checkpoints import Parts, make_ultravox, read_weights, write_weights
from support.model_driver import Driver, Sequence
from torch import Tensor
from torch.nn import functional

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.hub import text_model_of
from sensorium.errors import CheckpointError, RequestError
from sensorium.models.loading import load_model
from sensorium.processors.ultravox import PLACEHOLDER, UltravoxProcessor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaItem, Prompt

CHUNK = 100  # mel frames, of the tiny tower


def clip(num_samples: int, seed: int = 0) -> MediaItem:
    data = (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)
    return MediaItem("audio", data, hashlib.sha256(data.tobytes()).digest(), "messages[0]", sample_rate=16_000)


def processor_of(path: Path) -> UltravoxProcessor:
    checkpoint = open_checkpoint(path, path / "language")
    return UltravoxProcessor(checkpoint, Tokenizer.from_folder(path).with_literals(UltravoxProcessor.literals))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rows_of(parts: Parts, mel: Tensor) -> Tensor:
    """[bins, frames] -> the language model's rows, chunk by chunk. Whisper's class takes only chunks of full length.

    As published: chunks after the first are padded with zeros to full length, nothing attends to the padding, and of
    the projected rows those are kept that any frame of the chunk belongs to.
    """
    rows = []
    for index, chunk in enumerate(torch.split(mel, CHUNK, dim=1)):
        frames = chunk.shape[1]
        tower = parts.vision
        padded = functional.pad(chunk, (0, CHUNK - frames if index else 0))
        x = functional.gelu(tower.conv1(padded.unsqueeze(0)))
        x = functional.gelu(tower.conv2(x)).transpose(1, 2)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        heard = torch.arange(x.shape[1]) < (frames - 1) // 2 + 1
        mask = torch.zeros(1, 1, x.shape[1], x.shape[1]).masked_fill(~heard, torch.finfo(torch.float32).min)
        for layer in tower.layers:
            out = layer(x, attention_mask=mask)
            x = out[0] if isinstance(out, tuple) else out
        x = tower.layer_norm(x)[0]
        x = functional.pad(x, (0, 0, 0, -len(x) % 8)).reshape(-1, 8 * x.shape[1])
        first, second = (rms(x, parts.own["ln_pre.weight"]) @ parts.own["linear_1.weight"].T).chunk(2, -1)
        x = rms(functional.silu(second) * first, parts.own["ln_mid.weight"]) @ parts.own["linear_2.weight"].T
        rows.append(x[: -(-frames // 16)])
    return torch.cat(rows)


def embedded(parts: Parts, prompt: Prompt) -> Tensor:
    out = parts.text.get_input_embeddings()(torch.from_numpy(prompt.token_ids).long()).clone()
    for span in prompt.spans:
        rows = rows_of(parts, torch.from_numpy(prompt.media[span.item].arrays["mel"]))
        assert len(rows) == span.length
        out[span.offset : span.offset + span.length] = rows
    return out


@pytest.mark.parametrize(("num_samples", "rows"), [(1, 1), (160, 1), (16_000, 7), (48_000, 19), (49_000, 20)])
def test_counts(tmp_path: Path, num_samples: int, rows: int) -> None:
    make_ultravox(tmp_path, audio={"max_source_positions": 1500})
    assert processor_of(tmp_path).process(clip(num_samples)).num_rows == rows


def test_counts_of_long_clips(tmp_path: Path) -> None:
    make_ultravox(tmp_path, audio={"max_source_positions": 1500})
    processor = processor_of(tmp_path)
    assert processor.process(clip(480_000)).num_rows == 188
    assert processor.process(clip(480_001)).num_rows == 189


@torch.inference_mode()
def test_the_published_class_agrees_on_a_full_chunk(tmp_path: Path) -> None:
    """The composition above against WhisperEncoder itself, where that runs."""
    parts = make_ultravox(tmp_path)
    model = load_model(open_checkpoint(tmp_path, tmp_path / "language"), dtype=torch.float32, device="cpu")
    mel = torch.randn(128, CHUNK)
    expected = parts.vision(mel.unsqueeze(0)).last_hidden_state[0]
    torch.testing.assert_close(cast(Any, model.audio_tower)([mel])[0], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_rows_logits_and_greedy_tokens(tmp_path: Path) -> None:
    parts = make_ultravox(tmp_path)
    assert text_model_of(tmp_path) == str(tmp_path / "language")
    model = load_model(open_checkpoint(tmp_path, tmp_path / "language"), dtype=torch.float32, device="cpu")
    processor = processor_of(tmp_path)
    clips = [processor.process(clip(n, n)) for n in (1_600, 17_333, 33_000)]
    rows = model.encode("audio", [{"mel": torch.from_numpy(one.arrays["mel"])} for one in clips])
    prompts = [
        processor.build(f"<s>What is{PLACEHOLDER} this?", clips[:1]),
        processor.build(f"{PLACEHOLDER}{PLACEHOLDER}", clips[1:]),
    ]
    sequences = []
    for prompt, offset in zip(prompts, (0, 1), strict=True):
        expected = embedded(parts, prompt)
        ours = model.embed(torch.from_numpy(prompt.token_ids).long())
        for span in prompt.spans:
            ours[span.offset : span.offset + span.length] = rows[span.item + offset]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        logits = parts.text(inputs_embeds=expected.unsqueeze(0)).logits[0]
        for cut in range(1, len(expected)):
            sequence = Sequence(prompt.token_ids.tolist(), rows=ours)
            torch.testing.assert_close(Driver(model).prefill(sequence, cut), logits, atol=1e-4, rtol=1e-4)
        sequences.append(Sequence(prompt.token_ids.tolist(), rows=ours))
    together = Driver(model).greedy(sequences, 32)
    for prompt, tokens in zip(prompts, together, strict=True):
        expected = embedded(parts, prompt).unsqueeze(0)
        for token in tokens:
            assert int(parts.text(inputs_embeds=expected).logits[0, -1].argmax()) == token
            expected = torch.cat([expected, parts.text.get_input_embeddings()(torch.tensor([[token]]))], 1)


@torch.inference_mode()
def test_every_length_beyond_one_chunk(tmp_path: Path) -> None:
    """Alone and beside other clips, which the published code would pad to one length."""
    parts = make_ultravox(tmp_path)
    model = load_model(open_checkpoint(tmp_path, tmp_path / "language"), dtype=torch.float32, device="cpu")
    lengths = (99, 100, 101, 102, 115, 116, 117, 131, 199, 200, 201, 248, 37)
    mels = [torch.randn(128, count, generator=torch.Generator().manual_seed(count)) for count in lengths]
    for batch in (*([mel] for mel in mels), mels):
        for ours, mel in zip(model.encode("audio", [{"mel": mel} for mel in batch]), batch, strict=True):
            torch.testing.assert_close(ours, rows_of(parts, mel), atol=1e-4, rtol=1e-4)


def test_placeholders_and_clips_must_agree(tmp_path: Path) -> None:
    make_ultravox(tmp_path)
    processor = processor_of(tmp_path)
    one = processor.process(clip(1_600))
    for text, media in ((PLACEHOLDER, []), ("none", [one]), (PLACEHOLDER * 2, [one])):
        with pytest.raises(RequestError, match="placeholder"):
            processor.build(text, media)
    typed = processor.tokenizer.escape(f"I say {PLACEHOLDER}")
    assert not processor.build(typed, []).spans


def test_language_weights_of_the_first_repository_win(tmp_path: Path) -> None:
    make_ultravox(tmp_path)
    own = {
        "language_model.model.norm.weight": torch.full_like(
            read_weights(tmp_path / "language")["model.norm.weight"], 3.0
        )
    }
    write_weights(tmp_path, {**read_weights(tmp_path), **own})
    model = load_model(open_checkpoint(tmp_path, tmp_path / "language"), dtype=torch.float32, device="cpu")
    assert cast(Any, model.model).norm.weight.unique().tolist() == [3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"projector_act": "relu"}, "projector_act"), ({"num_projector_layers": 2}, "projector layers")],
)
def test_other_versions_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_ultravox(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(open_checkpoint(tmp_path, tmp_path / "language"), dtype=torch.float32, device="cpu")
