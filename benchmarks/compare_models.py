"""Writes a checkpoint of a published shape with random bfloat16 weights into FOLDER, for `compare.py`.

    python benchmarks/compare_models.py SHAPE FOLDER

Every token of the vocabulary is letters, so that the first token of a completion is seen when it comes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from catalog_models import CHAT, TEMPLATE, byte_level
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<start_of_image>{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write(folder: Path, files: dict[str, Any]) -> None:
    """JSON files; what is there already gains the new entries."""
    for name, contents in files.items():
        file = folder / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, **contents}, indent=1))


def qwen_files(folder: Path) -> None:
    """What Qwen3-VL's processor reads; Qwen3.5 has the same."""
    sizes: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    sizes |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor"}
    write(
        folder,
        {
            "preprocessor_config.json": {
                **{"image_processor_type": "Qwen2VLImageProcessor", **sizes},
                "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
            },
            "video_preprocessor_config.json": {
                **{"video_processor_type": "Qwen3VLVideoProcessor", **sizes},
                "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
            },
        },
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def qwen_media(ids: dict[str, int]) -> dict[str, int]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: ids[f"<|{name}|>"] for key, name in zip(keys, names, strict=True)}


QWEN_TOWER = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16},
    **{"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304},
}


def qwen3_vl_2b(folder: Path) -> PreTrainedModel:
    ids = byte_level(folder, 151_936, CHAT)
    qwen_files(folder)
    text = {
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151_936},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144},
        **{"rope_theta": 5e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        **{"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
    }
    vision = {**QWEN_TOWER, "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **qwen_media(ids))
    return Qwen3VLForConditionalGeneration(config)


def qwen3_5(folder: Path, **sizes: int) -> PreTrainedModel:
    ids = byte_level(folder, 248_320, CHAT)
    qwen_files(folder)
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    text: dict[str, Any] = {
        **{"vocab_size": 248_320, "head_dim": 256, "attn_output_gate": True, "full_attention_interval": 4},
        **{"layer_types": layers * (sizes["num_hidden_layers"] // len(layers)), "max_position_embeddings": 262_144},
        **{"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        **{"linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
            **{"mrope_section": [11, 11, 10], "mrope_interleaved": True},
        },
        **{"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        **sizes,
    }
    vision = {**QWEN_TOWER, "out_hidden_size": sizes["hidden_size"], "deepstack_visual_indexes": []}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **qwen_media(ids))
    return Qwen3_5ForConditionalGeneration(config)


def qwen3_5_08b(folder: Path) -> PreTrainedModel:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "linear_num_value_heads": 16}
    return qwen3_5(folder, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, **heads)


def qwen3_5_4b(folder: Path) -> PreTrainedModel:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_value_heads": 32}
    return qwen3_5(folder, hidden_size=2560, intermediate_size=9216, num_hidden_layers=32, **heads)


def gemma3_4b(folder: Path) -> PreTrainedModel:
    ids = byte_level(folder, 262_208, [*GEMMA, *GEMMA_IMAGE.values()])
    ends = {f"{name}_token_id": ids[f"<{name}>"] for name in ("pad", "bos")}
    text = {
        **{"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "vocab_size": 262_208},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072},
        **{"sliding_window": 1024, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **{**ends, "eos_token_id": ids["<end_of_turn>"]},
    }
    vision = {
        **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
        **{"image_size": 896, "patch_size": 14, "model_type": "siglip_vision_model"},
    }
    named = {"processor_class": "Gemma3Processor"}
    write(
        folder,
        {
            "preprocessor_config.json": {
                **{"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256, "resample": 2, **named},
                **{"size": {"height": 896, "width": 896}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            },
            "processor_config.json": {"image_seq_length": 256, **named},
            "tokenizer_config.json": {
                **GEMMA_IMAGE,
                **{"extra_special_tokens": GEMMA_IMAGE, "bos_token": "<bos>", "pad_token": "<pad>"},
                "eos_token": "<eos>",
            },
        },
    )
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            image_token_index=ids["<image_soft_token>"],
            mm_tokens_per_image=256,
            tie_word_embeddings=True,
            **ends,
            eos_token_id=ids["<end_of_turn>"],
        )
    )


SHAPES: dict[str, Callable[[Path], PreTrainedModel]] = {
    "qwen3-vl-2b": qwen3_vl_2b,
    "gemma3-4b": gemma3_4b,
    "qwen3.5-0.8b": qwen3_5_08b,
    "qwen3.5-4b": qwen3_5_4b,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    found = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    SHAPES[found.shape](found.folder).save_pretrained(found.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
