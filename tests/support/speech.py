"""Tiny checkpoints of models that hear, and recordings for them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration

from sensorium.types import MediaItem
from support import checkpoints
from support.checkpoints import CHATML_SPECIALS, CHATML_TEMPLATE, LLAMA_SPECIALS, LLAMA_TEMPLATE, Layout

RATE = 16_000
QWEN2_AUDIO_SPECIALS = (*CHATML_SPECIALS, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
VOXTRAL_SPECIALS = (
    *LLAMA_SPECIALS,
    *("[INST]", "[/INST]", "[BEGIN_AUDIO]", "[AUDIO]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TRANSCRIBE]"),
)
QWEN3_OMNI_SPECIALS = (
    *(*CHATML_SPECIALS, *checkpoints.VISION_SPECIALS),
    *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
)
QWEN3_ASR_SPECIALS = (*CHATML_SPECIALS, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
TOWER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}


def recording(samples: int, seed: int = 0) -> MediaItem:
    """Noise as in the tables of facts."""
    data = (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)
    return MediaItem("audio", data, hashlib.sha256(data.tobytes()).digest(), "messages[0]", sample_rate=RATE)


def make_qwen2_audio(
    path: Path,
    layout: Layout = "hub",
    *,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Windows of one second."""
    ids = checkpoints.write_tokenizer(path, layout, QWEN2_AUDIO_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    write_options, options = checkpoints._write_options(options)
    shape = checkpoints._shape(ids, {"rms_norm_eps": 1e-5, "max_position_embeddings": 1024, **(text or {})})
    config = Qwen2AudioConfig(
        text_config={**shape, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        audio_config={**TOWER, "num_mel_bins": 128, "max_source_positions": 50, **(audio or {})},
        audio_token_index=ids["<|AUDIO|>"],
        **options,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    return checkpoints._write(path, layout, model, ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)


def make_voxtral(
    path: Path,
    layout: Layout = "hub",
    *,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Windows of one second, 12 rows each: 48 states, four to a row. Heads are wider than the hidden size says."""
    ids = checkpoints.write_tokenizer(path, layout, VOXTRAL_SPECIALS, LLAMA_TEMPLATE, bos="<s>", eos="</s>")
    write_options, options = checkpoints._write_options(options)
    shape = {"rms_norm_eps": 1e-5, "rope_theta": 1e8, "head_dim": 16, "max_position_embeddings": 1024, **(text or {})}
    config = VoxtralConfig(
        text_config={**checkpoints._shape(ids, shape), "model_type": "llama", "tie_word_embeddings": False},
        audio_config={
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
            **{"num_mel_bins": 128, "max_source_positions": 48, **(audio or {})},
        },
        audio_token_id=ids["[AUDIO]"],
        **options,
    )
    model = VoxtralForConditionalGeneration(config)
    return checkpoints._write(path, layout, model, ids["<s>"], ids["</s>"], **write_options)


def make_qwen3_asr(
    path: Path,
    layout: Layout = "hub",
    *,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    tied: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Windows of two chunks. The hub's layout is the published package's: all of it is a thinker. A tied head, as the
    published ones are, makes random weights repeat their last token."""
    ids = checkpoints.write_tokenizer(path, layout, QWEN3_ASR_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    _add_plain_token(path, "<asr_text>")
    write_options, options = checkpoints._write_options(options)
    shape = {"rope_theta": 1e6, "head_dim": 16, "max_position_embeddings": 2048, **(text or {})}
    shape = {**checkpoints._shape(ids, shape), "tie_word_embeddings": tied}
    config = Qwen3ASRConfig(
        text_config={**shape, "model_type": "qwen3"},
        audio_config={
            **{**TOWER, "num_mel_bins": 128, "downsample_hidden_size": 6, "n_window_infer": 200},
            **{"output_dim": shape["hidden_size"], **(audio or {})},
        },
        audio_token_id=ids["<|audio_pad|>"],
        pad_token_id=ids["<|im_end|>"],
        eos_token_id=[ids["<|endoftext|>"], ids["<|im_end|>"]],
        tie_word_embeddings=tied,
        **options,
    )
    model = Qwen3ASRForConditionalGeneration(config)
    made = checkpoints._write(path, "transformers", model, ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)
    if layout == "hub":
        _as_published(path)
    return made


def _add_plain_token(path: Path, text: str) -> None:
    """A token that is no special one."""
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    tokenizer.save(str(file))


def _published_name(key: str) -> str:
    for old, new in (
        ("model.multi_modal_projector.linear_", "audio_tower.proj"),
        ("model.language_model.", "model."),
        ("model.audio_tower.", "audio_tower."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _as_published(path: Path) -> None:
    """Qwen3-ASR's own names and config.json; the head is stored though it is tied."""
    tensors = checkpoints.read_weights(path)
    named = {f"thinker.{_published_name(key)}": tensor for key, tensor in tensors.items()}
    named.setdefault("thinker.lm_head.weight", named["thinker.model.embed_tokens.weight"].clone())
    checkpoints.write_weights(path, named)
    stated = checkpoints._old_names(json.loads((path / "config.json").read_text()))
    sections = {"rope_type": "default", "mrope_section": [3, 3, 2], "interleaved": True, "mrope_interleaved": True}
    text = {**stated["text_config"], "model_type": "qwen3_asr_text", "rope_scaling": sections}
    thinker = {
        **{"audio_token_id": stated["audio_token_id"], "model_type": "qwen3_asr_thinker", "text_config": text},
        "audio_config": {**stated["audio_config"], "model_type": "qwen3_asr_audio_encoder"},
    }
    published = {
        **{"architectures": stated["architectures"], "model_type": "qwen3_asr", "torch_dtype": stated["torch_dtype"]},
        **{"support_languages": ["English"], "thinker_config": thinker},
    }
    checkpoints._write_json(path / "config.json", published)


def make_qwen3_omni(
    path: Path,
    layout: Layout = "hub",
    *,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    video: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The thinker. Six experts; two layers of the vision tower give rows to the decoder's first two of three; the
    hub's layout has a talker beside it."""
    template = checkpoints.QWEN2_VL_TEMPLATE.replace(
        "{% elif 'text' in part %}",
        "{% elif part['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% elif 'text' in part %}",
    )
    ids = checkpoints.write_tokenizer(path, layout, QWEN3_OMNI_SPECIALS, template, eos="<|im_end|>")
    write_options, options = checkpoints._write_options(options)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [3, 3, 2], "interleaved": True}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_hidden_layers": 3}
    shape = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 4096, "rope_parameters": rope, **experts}
    shape = checkpoints._shape(ids, {**shape, **(text or {})})
    config = Qwen3OmniMoeThinkerConfig(
        text_config={**shape, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        vision_config={**checkpoints._qwen3_vision(shape), "depth": 3, "deepstack_visual_indexes": [0, 2]}
        | {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, **(vision or {})},
        audio_config={
            **{**TOWER, "num_mel_bins": 128, "downsample_hidden_size": 6, "n_window_infer": 200},
            **{"output_dim": shape["hidden_size"], **(audio or {})},
        },
        position_id_per_seconds=13,
        **{f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video", "audio")},
        **{f"{name}_token_id": ids[f"<|{name}|>"] for name in ("audio_start", "vision_start", "vision_end")},
        **options,
    )
    files = {
        **{"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3OmniMoeProcessor"},
        **{"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, **checkpoints.QWEN3_PREPROCESSOR},
    }
    checkpoints._write_json(path / "preprocessor_config.json", {**files, **(preprocessor or {})})
    if video is not None:
        checkpoints._write_json(path / "video_preprocessor_config.json", video)
    model = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    made = checkpoints._write(path, "transformers", model, ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)
    if layout == "hub":
        _as_a_thinker(path)
    return made


def _as_a_thinker(path: Path) -> None:
    """What a folder holds becomes the part of a model that speaks, too."""
    tensors = {f"thinker.{key}": tensor for key, tensor in checkpoints.read_weights(path).items()}
    more = {f"{part}.embed.weight": torch.zeros(2, 2) for part in ("talker", "code2wav")}
    checkpoints.write_weights(path, {**tensors, **more})
    stated = checkpoints._old_names(json.loads((path / "config.json").read_text()))
    del stated["architectures"]
    for key in ("rope_theta", "rope_scaling"):
        del stated["vision_config"][key]
    published = {
        **{"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe"},
        **{"torch_dtype": stated.pop("torch_dtype"), "talker_config": {"hidden_size": 2}, "thinker_config": stated},
    }
    checkpoints._write_json(path / "config.json", published)
