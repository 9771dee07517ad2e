"""Tiny LFM2-VL checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, PreTrainedModel
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from sensorium.checkpoint.chat_templates import LFM2_VL
from sensorium.types import MediaFeatures
from support.checkpoints import (
    CHATML_SPECIALS,
    Layout,
    _hub_config,
    _old_names,
    _shape,
    _write,
    _write_json,
    _write_options,
    read_weights,
    write_tokenizer,
    write_weights,
)

IMAGE = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
TILES = tuple(f"<|img_row_{line}_col_{column}|>" for line in range(1, 4) for column in range(1, 4))
FILE: dict[str, Any] = {
    **{"image_processor_type": "Lfm2VlImageProcessor", "do_image_splitting": True, "use_thumbnail": True},
    **{"encoder_patch_size": 4, "downsample_factor": 2, "tile_size": 16, "min_tiles": 2, "max_tiles": 4},
    **{"min_image_tokens": 2, "max_image_tokens": 6, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}


def make_lfm2_vl(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Patches of 4, four to a row; tiles of 16 pixels, two to four of them, and a whole image of at most six rows."""
    write_options, options = _write_options(options)
    ids = write_tokenizer(
        path, layout, (*CHATML_SPECIALS, *IMAGE, *TILES), LFM2_VL, bos="<|endoftext|>", eos="<|im_end|>"
    )
    text = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"patch_size": 4, "num_patches": 9, "vision_use_head": False, **options.pop("vision", {})},
    }
    tied = options.pop("tie_word_embeddings", False)
    ends = ids["<|endoftext|>"], ids["<|im_end|>"]
    config = Lfm2VlConfig(
        text_config=Lfm2Config(
            bos_token_id=ends[0],
            eos_token_id=ends[1],
            **_shape(ids, {**text, "intermediate_size": 80, "tie_word_embeddings": tied}),
        ).to_dict(),
        vision_config=Siglip2VisionConfig(**vision).to_dict(),
        image_token_id=ids["<image>"],
        tie_word_embeddings=tied,
        **{"projector_hidden_size": 40, **options},
    )
    _write_json(path / "preprocessor_config.json", FILE)
    model = _write(path, "transformers", Lfm2VlForConditionalGeneration(config), *ends, **write_options)
    if layout == "hub":
        _publish(path)
    return model


def _publish(path: Path) -> None:
    config = _old_names(json.loads((path / "config.json").read_text()))
    config["model_type"] = "lfm2-vl"
    config["image_token_index"] = config.pop("image_token_id")
    config["tie_embedding"] = config.pop("tie_word_embeddings")
    config["text_config"] = _hub_config(config["text_config"])
    _write_json(path / "config.json", config)
    inner = "model.vision_tower."
    tensors = {key.replace(inner, f"{inner}vision_model."): tensor for key, tensor in read_weights(path).items()}
    write_weights(path, tensors)


def padded_inputs(media: list[MediaFeatures]) -> dict[str, torch.Tensor]:
    """What transformers' model takes, of our patches: its processor needs torchvision, so the tests of ours hold pixels
    against torch's own resizing and against its sums."""
    tiles: list[torch.Tensor] = []
    grids = torch.cat([torch.from_numpy(one.arrays["grids"]).long() for one in media])
    for one in media:
        pixels = torch.from_numpy(one.arrays["pixels"]).float().view(len(one.arrays["pixels"]), 3, -1)
        scale, shift = (torch.from_numpy(one.arrays[name])[:, None] for name in ("scale", "shift"))
        rows = (pixels * scale + shift).transpose(1, 2).flatten(1)
        tiles += torch.split(rows, one.arrays["grids"].prod(axis=1).tolist())
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True),
        "pixel_attention_mask": (torch.arange(max(map(len, tiles))) < grids.prod(1, keepdim=True)).int(),
        "spatial_shapes": grids,
    }
