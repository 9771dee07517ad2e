"""Tiny InternVL checkpoints, as published (`InternVLChatModel`) and as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from support.checkpoints import (
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

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif p['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PUBLISHED = {
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "vision_tower.": "vision_model.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
}


def make_internvl(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Squares of 28 pixels in patches of 7: four rows each, at most four squares and the whole image."""
    write_options, options = _write_options(options)
    ids = write_tokenizer(path, layout, SPECIALS, TEMPLATE, eos="<|im_end|>")
    text = Qwen3Config if options.pop("qwen3", False) else Qwen2Config
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 7, "attention_bias": True, **options.pop("vision", {})},
    }
    config = InternVLConfig(
        text_config=text(**_shape(ids, {"tie_word_embeddings": False, "head_dim": 8})).to_dict(),
        vision_config=InternVLVisionConfig(**vision).to_dict(),
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
        **options,
    )
    shape = {"height": 28, "width": 28}
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    _write_json(path / "preprocessor_config.json", {"size": shape, **means, **(tiles if layout != "hub" else {})})
    ends = ids["<|endoftext|>"], ids["<|im_end|>"]
    model = _write(path, "transformers", InternVLForConditionalGeneration(config), *ends, **write_options)
    if layout == "hub":
        _publish(path)
    return model


def _publish(path: Path) -> None:
    config = _old_names(json.loads((path / "config.json").read_text()))
    vision = config["vision_config"]
    vision |= {"image_size": vision["image_size"][0], "patch_size": vision["patch_size"][0]}
    vision |= {"qkv_bias": vision.pop("attention_bias"), "qk_normalization": vision.pop("use_qk_norm")}
    published = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": config["text_config"],
        "vision_config": vision,
        "downsample_ratio": config["downsample_ratio"],
        **{"ps_version": "v2", "select_layer": -1, "dynamic_image_size": True, "use_thumbnail": True},
        **{"min_dynamic_patch": 1, "max_dynamic_patch": 4, "force_image_size": 28, "torch_dtype": "float32"},
    }
    _write_json(path / "config.json", published)
    tensors = read_weights(path)
    for name in [name for name in tensors if ".attention.q_proj." in name]:
        three = [tensors.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        tensors[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(three)
    for old, new in _PUBLISHED.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    write_weights(path, tensors)
