"""Tiny LLaVA-OneVision checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from support.checkpoints import (
    CHATML_SPECIALS,
    CLIP_MEAN,
    CLIP_STD,
    LLAVA_NEXT_TEMPLATE,
    Layout,
    _shape,
    _square,
    _write,
    _write_json,
    _write_options,
    write_tokenizer,
)

PINPOINTS = [[28 * lines, 28 * columns] for lines in (1, 2, 3) for columns in (1, 2, 3)]
FILE = {
    **{"image_processor_type": "LlavaOnevisionImageProcessor", "size": _square(28), "resample": 3},
    **{"image_grid_pinpoints": PINPOINTS, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
}


def make_llava_onevision(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Tiles of 28 pixels, nine rows each; a grid of more than two tiles is made smaller."""
    write_options, options = _write_options(options)
    ids = write_tokenizer(path, layout, (*CHATML_SPECIALS, "<image>", "<video>"), LLAVA_NEXT_TEMPLATE, eos="<|im_end|>")
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 9, "vision_use_head": False},
    }
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**_shape(ids, {"tie_word_embeddings": False})).to_dict(),
        vision_config=SiglipVisionConfig(**vision).to_dict(),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        **options,
    )
    _write_json(path / "preprocessor_config.json", FILE)
    model = LlavaOnevisionForConditionalGeneration(config)
    return _write(path, layout, model, ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)
