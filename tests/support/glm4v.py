"""Tiny GLM-4.1V, GLM-4.5V and GLM-OCR checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    PreTrainedModel,
)

from sensorium.checkpoint.chat_templates import GLM4V
from support.checkpoints import (
    CLIP_MEAN,
    CLIP_STD,
    Layout,
    _old_names,
    _shape,
    _write,
    _write_json,
    _write_options,
    write_tokenizer,
)

SPECIALS = (
    *("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "[gMASK]", "<sop>"),
    *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|video|>", "<|end_of_video|>"),
)


def make_glm4v(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Patches of 7, four to a row, in heads of 16 of which half is rotated."""
    return _make(path, layout, Glm4vForConditionalGeneration, Glm4vConfig, {}, options)


def make_glm_ocr(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    return _make(path, layout, GlmOcrForConditionalGeneration, GlmOcrConfig, {"head_dim": 16}, options)


def make_glm4v_moe(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    experts = {
        **{"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"first_k_dense_replace": 1, "n_shared_experts": 1, "attention_bias": True, "routed_scaling_factor": 1.5},
    }
    return _make(path, layout, Glm4vMoeForConditionalGeneration, Glm4vMoeConfig, experts, options)


def _make(
    path: Path, layout: Layout, model: Any, config: Any, text: dict[str, Any], options: dict[str, Any]
) -> PreTrainedModel:
    write_options, options = _write_options(options)
    ids = write_tokenizer(path, layout, SPECIALS, GLM4V, eos="<|user|>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 2, 1]}
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope, **text}
    made = config(
        text_config=_shape(ids, {**shape, "pad_token_id": ids["<|endoftext|>"], **options.pop("text", {})}),
        vision_config={
            **{"hidden_size": 32, "depth": 2, "num_heads": 2, "image_size": 42, "patch_size": 7},
            **{
                "out_hidden_size": 32,
                "intermediate_size": 40,
                "attention_bias": model is not Glm4vForConditionalGeneration,
            },
        },
        **{f"{kind}_token_id": ids[f"<|{kind}|>"] for kind in ("image", "video")},
        **{f"{kind}_start_token_id": ids[f"<|begin_of_{kind}|>"] for kind in ("image", "video")},
        **{f"{kind}_end_token_id": ids[f"<|end_of_{kind}|>"] for kind in ("image", "video")},
        **{"tie_word_embeddings": False, **options},
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            **{"image_processor_type": "Glm4vImageProcessor", "patch_size": 7, "temporal_patch_size": 2},
            **{"merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": 9408}},
            **{"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        },
    )
    ends = ids["<|endoftext|>"], ids["<|user|>"]
    saved = _write(path, "transformers", model(made), *ends, **write_options)
    if layout == "hub":
        _write_json(path / "config.json", _old_names(json.loads((path / "config.json").read_text())))
    return saved
