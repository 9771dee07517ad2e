"""Tiny ColPali checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import ColPaliConfig, ColPaliForRetrieval, PaliGemmaConfig, PreTrainedModel

from support.checkpoints import (
    GEMMA_SPECIALS,
    GEMMA_TEMPLATE,
    Layout,
    _clip,
    _shape,
    _write,
    _write_json,
    read_weights,
    write_tokenizer,
    write_weights,
)


def make_colpali(path: Path, layout: Layout = "hub", *, is_engine: bool = False) -> PreTrainedModel:
    """Pages of 28 pixels in four patches. `is_engine`: as colpali-engine has it, else as transformers saved it when
    the published ones were made, or today."""
    ids = write_tokenizer(path, layout, (*GEMMA_SPECIALS, "<image>"), GEMMA_TEMPLATE, bos="<bos>", eos="<eos>")
    vlm = PaliGemmaConfig(
        text_config={
            **_shape(ids, {"head_dim": 16, "num_key_value_heads": 1, "pad_token_id": ids["<pad>"]}),
            "model_type": "gemma",
        },
        vision_config=_clip({"model_type": "siglip_vision_model", "vision_use_head": False}),
        image_token_index=ids["<image>"],
        projection_dim=32,
        hidden_size=32,
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            **{"image_processor_type": "SiglipImageProcessor", "image_seq_length": 4, "resample": 3},
            **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 28, "width": 28}},
        },
    )
    model = ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm.to_dict(), embedding_dim=24))
    made = _write(path, "transformers", model, ids["<bos>"], ids["<eos>"])
    if layout == "hub":
        write_weights(path, {_published(key, is_engine): tensor for key, tensor in read_weights(path).items()})
        config = json.loads((path / "config.json").read_text())
        text = config["vlm_config"]["text_config"]
        for key in ("use_bidirectional_attention", "max_position_embeddings", "hidden_act", "tie_word_embeddings"):
            text.pop(key, None)
        if is_engine:
            config = {**config["vlm_config"], "architectures": ["ColPali"], "dtype": config["dtype"]}
        _write_json(path / "config.json", config)
    return made


def _published(key: str, is_engine: bool) -> str:
    """Of a name that transformers saves today."""
    inner = key.removeprefix("vlm.").removeprefix("model.")
    if inner.startswith("embedding_proj_layer."):
        return inner.replace("embedding_proj_layer", "custom_text_proj") if is_engine else inner
    if ".vision_model." not in inner:
        inner = inner.replace("vision_tower.", "vision_tower.vision_model.")
    return f"{'model' if is_engine else 'vlm'}.{inner}"
