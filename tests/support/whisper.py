"""Tiny random Whispers with windows of a second, in the hub's layout and in transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from support.checkpoints import Layout, _randomise, write_tokenizer

WINDOW = 16_000  # samples
TIMES = tuple(f"<|{i * 0.02:.2f}|>" for i in range(51))
CONTROLS = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|zh|>", "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
)
ENGLISH = {"lang_to_id": None, "task_to_id": None, "is_multilingual": False}
NO_THRESHOLDS = {"logprob_threshold": None, "compression_ratio_threshold": None, "no_speech_threshold": None}


def make_whisper(
    path: Path, layout: Layout = "hub", *, generation: dict[str, Any] | None = None, seed: int = 0, **options: Any
) -> WhisperForConditionalGeneration:
    """`generation`: more for generation_config.json; None leaves a key out."""
    ids = write_tokenizer(path, layout, (*CONTROLS, *TIMES), "", eos="<|endoftext|>")
    shape = {
        **{"d_model": 32, "num_mel_bins": 80, "max_source_positions": 50, "max_target_positions": 64},
        **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
        **{"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
        **{f"{name}_token_id": ids["<|endoftext|>"] for name in ("eos", "bos", "pad")},
        **{"vocab_size": max(ids.values()) + 1, "decoder_start_token_id": ids["<|startoftranscript|>"]},
        **options,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(**shape)).requires_grad_(False)
    _randomise(model, seed)
    model.model.decoder.embed_tokens.weight[ids["<|notimestamps|>"] :] *= (
        0.5  # text is to win over all timestamps together
    )
    stated = {
        **{f"{name}_token_id": ids["<|endoftext|>"] for name in ("eos", "bos", "pad")},
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "lang_to_id": {text: ids[text] for text in ("<|en|>", "<|de|>", "<|zh|>")},
        "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        "is_multilingual": True,
        "suppress_tokens": [*range(5, 9), *(ids[text] for text in CONTROLS[1:-1])],
        "begin_suppress_tokens": [220, ids["<|endoftext|>"]],
        "max_initial_timestamp_index": 25,
        "alignment_heads": [[0, 1], [1, 0], [1, 1]],
        "max_length": 64,
        "return_timestamps": False,
        **NO_THRESHOLDS,
        **(generation or {}),
    }
    model.generation_config = GenerationConfig(**{key: value for key, value in stated.items() if value is not None})
    model.eval().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(stated))
    extractor(shape["num_mel_bins"]).save_pretrained(path)
    if layout == "hub":
        config = json.loads((path / "config.json").read_text())
        config |= {**model.config.to_dict(), "torch_dtype": "float32", "num_hidden_layers": config["encoder_layers"]}
        (path / "config.json").write_text(json.dumps(config))
    return model


def extractor(bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=bins, chunk_length=1)


def speech(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Tones that change, so that windows differ."""
    rng = np.random.default_rng(seed)
    count = round(seconds * 16_000)
    pitch = np.repeat(rng.uniform(100, 3000, -(-count // 800)), 800)[:count]
    loud = np.repeat(rng.uniform(0.05, 1, -(-count // 800)), 800)[:count]
    noise = 0.02 * rng.standard_normal(count)
    return (0.5 * loud * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + noise).astype(np.float32)


def features(samples: NDArray[np.float32], bins: int = 80) -> torch.Tensor:
    """transformers' log-mel of a recording [1, bins, frames]: of a short one padded, of a long one whole."""
    own = extractor(bins)
    if len(samples) <= WINDOW:
        short: torch.Tensor = own(samples, sampling_rate=16_000, return_tensors="pt").input_features
        return short
    options: dict[str, Any] = {"truncation": False, "padding": "longest", "return_attention_mask": True}
    whole: torch.Tensor = own(samples, sampling_rate=16_000, return_tensors="pt", **options).input_features
    return whole
