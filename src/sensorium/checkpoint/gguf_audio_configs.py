"""config.json of towers that hear, in GGUF: what their metadata and tensors say, in each family's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.checkpoint.gguf_tower_configs import named_tokens, rows_of_tensor, tower_layers

_WHISPER = {  # metadata -> names in config.json: OpenAI's, and those that transformers gives Voxtral's tower
    "embedding_length": ("d_model", "hidden_size"),
    "feed_forward_length": ("encoder_ffn_dim", "intermediate_size"),
    "attention.head_count": ("encoder_attention_heads", "num_attention_heads"),
    "num_mel_bins": ("num_mel_bins",),
}


def _whisper(tower: Metadata) -> dict[str, Any]:
    config = {name: tower.number(f"audio.{key}") for key, names in _WHISPER.items() for name in names}
    config |= dict.fromkeys(("encoder_layers", "num_hidden_layers"), tower_layers(tower, "a"))
    if "a.position_embd.weight" in tower.tensors:
        config["max_source_positions"] = rows_of_tensor(tower, "a.position_embd.weight")
    return config


def ultravox(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """What stands for a recording is no token, but text that prompts are split on."""
    return {
        "audio_config": _whisper(tower),
        "hidden_size": rows_of_tensor(tower, "mm.a.mlp.1.weight"),
        "stack_factor": tower.number("audio.projector.stack_factor"),
        "projector_act": "swiglu",
        "projector_ln_mid": "mm.a.norm_mid.weight" in tower.tensors,
        "audio_token_index": rows_of_tensor(text, "token_embd.weight"),
    }


def qwen2_audio(text: Metadata, tower: Metadata) -> dict[str, Any]:
    return {"audio_config": _whisper(tower), **named_tokens(text, {"audio_token_index": "<|AUDIO|>"}, "a recording")}


def voxtral(text: Metadata, tower: Metadata) -> dict[str, Any]:
    return {
        "audio_config": _whisper(tower),
        "projector_hidden_act": "gelu",
        **named_tokens(text, {"audio_token_id": "[AUDIO]"}, "a recording"),
    }


def qwen2_omni(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """Positions of its tower are computed, whatever the file has of them."""
    tokens = {
        "audio_token_index": "<|AUDIO|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
    }
    audio = {**_whisper(tower), "output_dim": rows_of_tensor(tower, "mm.a.fc.weight")}
    return {"audio_config": audio, **named_tokens(text, tokens, "a recording")}


def qwen3_audio(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """Qwen3-ASR's and Qwen3-Omni's. Sizes of chunks and windows are not stored: those of the published models."""
    tokens = {"audio_token_id": "<|audio_pad|>", "audio_start_token_id": "<|audio_start|>"}
    audio = {
        **_whisper(tower),
        "downsample_hidden_size": rows_of_tensor(tower, "a.conv2d.1.weight"),
        "output_dim": rows_of_tensor(tower, "mm.a.mlp.2.weight"),
    }
    return {"audio_config": audio, **named_tokens(text, tokens, "a recording")}


def gemma4(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """What is not stored is that of the published models: chunks, what is looked back at, caps and weights."""
    kernel = tower.tensors.get("a.blk.0.conv_dw.weight")
    tokens = {"audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>"}
    audio: dict[str, Any] = {
        "hidden_size": tower.number("audio.embedding_length"),
        "num_hidden_layers": tower_layers(tower, "a"),
        "num_attention_heads": tower.number("audio.attention.head_count"),
        "subsampling_conv_channels": [rows_of_tensor(tower, f"a.conv1d.{one}.weight") for one in (0, 1)],
        "output_proj_dims": rows_of_tensor(tower, "a.pre_encode.out.weight"),
        "rms_norm_eps": tower.number("audio.attention.layer_norm_epsilon"),
        "use_clipped_linears": "a.blk.0.attn_q.input_max" in tower.tensors,
    }
    if kernel is not None:
        audio["conv_kernel_size"] = kernel.shape[-1]
    return {"audio_config": audio, **named_tokens(text, tokens, "a recording")}


def nothing(tower: Metadata) -> Mapping[str, Any]:
    """preprocessor_config.json of towers that hear: config.json says it all."""
    return {}
