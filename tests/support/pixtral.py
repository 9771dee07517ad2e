"""Tiny Mistral 3 and Pixtral checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
)

from sensorium.checkpoint.chat_templates import MISTRAL3
from support.checkpoints import (
    CLIP_MEAN,
    CLIP_STD,
    GROWING,
    Layout,
    _shape,
    _write,
    _write_json,
    _write_options,
    write_tokenizer,
)

SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
IMAGE = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def make_mistral3(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Patches of 14, four to a row, and a longest edge of 112."""
    merges = {"spatial_merge_size": options.pop("spatial_merge_size", 2), "multimodal_projector_bias": False}
    return _make(path, layout, Mistral3ForConditionalGeneration, Mistral3Config, 14, merges, options)


def make_pixtral(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Patches of 16, each a row, and a longest edge of 112."""
    full = {"vision_feature_select_strategy": "full", "image_seq_length": 1}
    return _make(path, layout, LlavaForConditionalGeneration, LlavaConfig, 16, full, options)


def _make(
    path: Path, layout: Layout, model: Any, config: Any, patch: int, own: dict[str, Any], options: dict[str, Any]
) -> PreTrainedModel:
    write_options, options = _write_options(options)
    text, grows = MistralConfig, {}
    if options.pop("ministral3", False):
        text, grows = Ministral3Config, {"rope_parameters": GROWING}
    ids = write_tokenizer(path, layout, (*SPECIALS, *IMAGE), MISTRAL3, bos="<s>", eos="</s>")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": patch,
        **options.pop("vision", {}),
    }
    made = config(
        text_config=text(**_shape(ids, {"head_dim": 12, "sliding_window": None, **grows})).to_dict(),
        vision_config=PixtralVisionConfig(**vision).to_dict(),
        image_token_index=ids["[IMG]"],
        **{"vision_feature_layer": -1, "projector_hidden_act": "gelu", **own, **options},
    )
    cell = patch * own.get("spatial_merge_size", 1)
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "patch_size": {"height": cell, "width": cell},
            "size": {"longest_edge": 112},
            "resample": 3,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    )
    return _write(path, layout, model(made), ids["<s>"], ids["</s>"], **write_options)
