"""Tiny SmolVLM and Idefics3 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from sensorium.checkpoint.chat_templates import SMOLVLM
from support.checkpoints import Layout, _shape, _write, _write_json, _write_options, write_tokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>")
TILES = tuple(f"<row_{line}_col_{column}>" for line in range(1, 4) for column in range(1, 4))
FILE: dict[str, Any] = {
    **{"image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": True, "resample": 1},
    **{"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
    **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "video_sampling": {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 24}},
}


def make_smolvlm(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Tiles of 24 pixels, four rows each; the longer side is enlarged to two tiles."""
    return _make(path, layout, SmolVLMForConditionalGeneration, SmolVLMConfig, options)


def make_idefics3(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    return _make(path, layout, Idefics3ForConditionalGeneration, Idefics3Config, options)


def _make(path: Path, layout: Layout, model: Any, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    write_options, options = _write_options(options)
    ids = write_tokenizer(path, layout, (*SPECIALS, *TILES), SMOLVLM, eos="<end_of_utterance>")
    ends = ids["<|im_start|>"], ids["<end_of_utterance>"]
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 24, "patch_size": 5, **options.pop("vision", {})},
    }
    made = config(
        text_config=LlamaConfig(**_shape(ids, {"pad_token_id": ends[0]})).to_dict(),
        vision_config=vision,
        image_token_id=ids["<image>"],
        **{"scale_factor": 2, "tie_word_embeddings": False, **options},
    )
    _write_json(path / "preprocessor_config.json", FILE)
    return _write(path, "transformers", model(made), *ends, **write_options)
