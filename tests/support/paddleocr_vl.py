"""Tiny PaddleOCR-VL checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration, PreTrainedModel

from sensorium.checkpoint.chat_templates import PADDLEOCR_VL
from support.checkpoints import (
    CLIP_MEAN,
    CLIP_STD,
    Layout,
    _old_names,
    _shape,
    _write,
    _write_json,
    _write_options,
    read_weights,
    write_tokenizer,
    write_weights,
)

SPECIALS = ("<unk>", "<|begin_of_sentence|>", "</s>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>")


def make_paddleocr_vl(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Patches of 7, four to a row, and a table of four by four positions."""
    write_options, options = _write_options(options)
    ids = write_tokenizer(path, layout, SPECIALS, PADDLEOCR_VL, eos="</s>")
    tied = options.pop("tie_word_embeddings", False)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = PaddleOCRVLConfig(
        text_config=_shape(ids, {"head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": tied}),
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 30, "patch_size": 7},
        },
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"],
        vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"],
        tie_word_embeddings=tied,
        **options,
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            **{"image_processor_type": "PaddleOCRVLImageProcessor", "patch_size": 7, "temporal_patch_size": 1},
            **{"merge_size": 2, "size": {"shortest_edge": 392, "longest_edge": 4704}},
            **{"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        },
    )
    ends = ids["<|begin_of_sentence|>"], ids["</s>"]
    model = _write(path, "transformers", PaddleOCRVLForConditionalGeneration(config), *ends, **write_options)
    if layout == "hub":
        _publish(path)
    return model


def _publish(path: Path) -> None:
    """The decoder's keys flat, and tensors that nobody reads."""
    config = _old_names(json.loads((path / "config.json").read_text()))
    text = config.pop("text_config")
    config["vision_config"]["model_type"] = "paddleocr_vl"
    _write_json(path / "config.json", {**text, **config})
    unused = {"visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(2, 2)}
    write_weights(path, {**read_weights(path), **unused, "visual.vision_model.head.probe": torch.zeros(2)})
