"""config.json and preprocessor_config.json of towers in GGUF: what their metadata says, in each family's words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sensorium.checkpoint.gguf_file import Strings
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.errors import CheckpointError

_LAYER = re.compile(r"([va])\.blk\.(\d{1,4})\..+")
PLACES: Mapping[str, str] = {"mlp": "<image>", "gemma3": "<image_soft_token>"}
"""Of projector types, the token that takes an image's place, where text models' files may lack it."""


def tower_layers(tower: Metadata, kind: str = "v") -> int:
    """By the tensors: LLaVA's files leave out a last layer that is not used, and may count it."""
    found = {int(match[2]) for match in map(_LAYER.fullmatch, tower.tensors) if match is not None and match[1] == kind}
    if not found or len(found) != max(found) + 1:
        raise CheckpointError(f"{tower.name} lacks layers of the tower: it has {len(found)}")
    return len(found)


def swaps_products(tower: Metadata) -> bool:
    """Whether both products of an MLP have the other one's name, as in old files: told by their shapes."""
    up, size = tower.tensors.get("v.blk.0.ffn_up.weight"), tower.get("vision.embedding_length")
    return up is not None and up.shape[0] == size and up.shape[1] != size


def _vision(tower: Metadata) -> dict[str, Any]:
    up = tower.tensors.get("v.blk.0.ffn_up.weight")
    size = tower.number("vision.embedding_length")
    inner = max(up.shape) if up is not None and len(up.shape) == 2 else tower.number("vision.feed_forward_length")
    return {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": tower_layers(tower),
        "num_attention_heads": tower.number("vision.attention.head_count"),
        "image_size": tower.number("vision.image_size"),
        "patch_size": tower.positive("vision.patch_size"),
        "layer_norm_eps": tower.number("vision.attention.layer_norm_epsilon"),
        "hidden_act": _act(tower),
    }


def _act(tower: Metadata) -> str:
    if tower.get("use_silu"):
        return "silu"
    return "gelu" if tower.get("use_gelu") else "quick_gelu"


def normalisation(tower: Metadata) -> dict[str, Any]:
    """preprocessor_config.json's mean and deviation."""
    found = {}
    for name in ("image_mean", "image_std"):
        value = tower.stored(f"vision.{name}")
        if isinstance(value, np.ndarray) and len(value) == 3:
            found[name] = [float(one) for one in value.tolist()]
    return found


def _token(text: Metadata, token: str) -> int | None:
    """Its id; None if the file has no such token."""
    tokens = text.all.get("tokenizer.ggml.tokens")
    return tokens.index(token) if isinstance(tokens, Strings) and token in tokens else None


def missing_token(text: Metadata, projector: str) -> tuple[str, int] | None:
    """The token that takes an image's place, and its id behind all others, where the text model's file lacks it."""
    place = PLACES.get(projector)
    if place is None or _token(text, place) is not None:
        return None
    tokens = text.all.get("tokenizer.ggml.tokens")
    return place, len(tokens) if isinstance(tokens, Strings) else 0


def _media_token(text: Metadata, projector: str) -> int:
    missing = missing_token(text, projector)
    found = _token(text, PLACES[projector]) if missing is None else missing[1]
    return found or 0


def named_tokens(text: Metadata, tokens: Mapping[str, str], what: str = "an image") -> dict[str, int]:
    """Ids that config.json has by these names; CheckpointError if the text model has no such token."""
    found = {name: _token(text, token) for name, token in tokens.items()}
    missing = [tokens[name] for name, one in found.items() if one is None]
    if missing:
        raise CheckpointError(f"{text.name} has no token {missing[0]}, whose place {what} takes")
    return {name: one for name, one in found.items() if one is not None}


def rows_of_tensor(file: Metadata, name: str) -> int:
    """How many outputs, or rows of a table. CheckpointError if it is not there."""
    found = file.tensors.get(name)
    if found is None:
        raise CheckpointError(f"{file.name} has no {name}")
    return found.shape[0]


_QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_OMNI_TOKENS = {
    "image_token_index": "<|IMAGE|>",
    "video_token_index": "<|VIDEO|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}


def _qwen(text: Metadata, tower: Metadata, tokens: Mapping[str, str] = _QWEN_TOKENS) -> dict[str, Any]:
    """What all generations have."""
    vision = _vision(tower)
    own = {
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "spatial_merge_size": tower.number("vision.spatial_merge_size", 2),
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    return {**named_tokens(text, tokens), "vision_config": own}


def qwen2(text: Metadata, tower: Metadata) -> dict[str, Any]:
    vision, config = _vision(tower), _qwen(text, tower)
    config["vision_config"] |= {
        "embed_dim": vision["hidden_size"],
        "mlp_ratio": vision["intermediate_size"] / max(vision["hidden_size"], 1),
        "hidden_size": text.number("embedding_length"),
        "hidden_act": vision["hidden_act"],
    }
    return config


def qwen2_omni(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """Qwen2.5-VL's tower, other tokens."""
    return qwen2_5(text, tower, _OMNI_TOKENS)


def qwen2_5(text: Metadata, tower: Metadata, tokens: Mapping[str, str] = _QWEN_TOKENS) -> dict[str, Any]:
    """The window is not stored: it is 112 pixels in all published models."""
    vision, config = _vision(tower), _qwen(text, tower, tokens)
    every = tower.number("vision.n_wa_pattern", 8)
    whole = tower.stored("vision.wa_layer_indexes")
    config["vision_config"] |= {
        **{name: vision[name] for name in ("hidden_size", "intermediate_size", "hidden_act")},
        "out_hidden_size": text.number("embedding_length"),
        "window_size": tower.number("vision.window_size", 8 * vision["patch_size"]),
        "fullatt_block_indexes": whole.tolist()
        if isinstance(whole, np.ndarray)
        else [one for one in range(vision["num_hidden_layers"]) if (one + 1) % max(every, 1) == 0],
    }
    return config


def qwen3(text: Metadata, tower: Metadata) -> dict[str, Any]:
    vision, config = _vision(tower), _qwen(text, tower)
    tapped = tower.flags("vision.is_deepstack_layers", vision["num_hidden_layers"]) or []
    table = tower.tensors.get("v.position_embd.weight")
    if table is None:
        raise CheckpointError(f"{tower.name} has no v.position_embd.weight")
    config["vision_config"] |= {
        **{name: vision[name] for name in ("hidden_size", "intermediate_size")},
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": text.number("embedding_length"),
        "num_position_embeddings": table.shape[0],
        "deepstack_visual_indexes": [layer for layer, one in enumerate(tapped) if one],
    }
    return config


def _pixels(tower: Metadata, patch: int, low: int, high: int) -> dict[str, Any]:
    """Bounds of an image, which only newer files have."""
    return {
        **normalisation(tower),
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": tower.number("vision.spatial_merge_size", 2),
        "min_pixels": tower.number("vision.image_min_pixels", low),
        "max_pixels": tower.number("vision.image_max_pixels", high),
    }


def qwen2_pixels(tower: Metadata) -> dict[str, Any]:
    return _pixels(tower, tower.number("vision.patch_size"), 56 * 56, 28 * 28 * 16384)


def qwen3_pixels(tower: Metadata) -> dict[str, Any]:
    return _pixels(tower, tower.number("vision.patch_size"), 256 * 256, 4096 * 4096)


def llava(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """Layers behind the one that is used are left out of the file."""
    vision, layers = _vision(tower), tower.stored("vision.feature_layer")
    has_class = "v.class_embd" in tower.tensors or "v.class_embd.weight" in tower.tensors
    used = [-1] if not isinstance(layers, np.ndarray) else layers.tolist()
    return {
        **_tiles(tower),
        "image_token_index": _media_token(text, "mlp"),
        "vision_config": {"model_type": "clip_vision_model" if has_class else "siglip_vision_model", **vision},
        "vision_feature_layer": used[0] if len(used) == 1 else used,
        "vision_feature_select_strategy": "default" if has_class else "full",
        "projector_hidden_act": "gelu",
    }


def _tiles(tower: Metadata) -> dict[str, Any]:
    """LLaVA-NeXT's, which lays tiles on one of several grids; {} of LLaVA-1.5."""
    sizes, ends_lines = tower.stored("vision.image_grid_pinpoints"), any(name in tower.tensors for name in NEWLINES)
    if not ends_lines and not isinstance(sizes, np.ndarray):
        return {}
    if not ends_lines or not isinstance(sizes, np.ndarray) or len(sizes) % 2:
        raise CheckpointError(f"{tower.name} has a grid of tiles, but not both image_grid_pinpoints and image_newline")
    grids = sizes.reshape(-1, 2).tolist()
    return {"architecture": "LlavaNextForConditionalGeneration", "image_grid_pinpoints": grids}


NEWLINES = ("model.image_newline", "v.image_newline")
"""What stands behind each line of LLaVA-NeXT's patches, in older files and in newer ones."""


def llava_pixels(tower: Metadata) -> dict[str, Any]:
    side = tower.number("vision.image_size")
    size = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    return {**normalisation(tower), **size, "do_center_crop": True, "resample": 3}


def gemma3(text: Metadata, tower: Metadata) -> dict[str, Any]:
    vision = {**_vision(tower), "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
    side = vision["image_size"] // vision["patch_size"] // tower.positive("vision.projector.scale_factor", 4)
    return {
        **named_tokens(text, {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}),
        "image_token_index": _media_token(text, "gemma3"),
        "mm_tokens_per_image": side**2,
        "vision_config": vision,
    }


def pixtral(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """Mistral 3's has a layer that merges patches; Pixtral 12B's has none."""
    merges = "mm.patch_merger.weight" in tower.tensors
    vision = {**_vision(tower), "model_type": "pixtral", "rope_theta": tower.number("rope.freq_base", 10000.0)}
    return {
        **named_tokens(text, {"image_token_index": "[IMG]"}),
        "architecture": "Mistral3ForConditionalGeneration" if merges else "PixtralForConditionalGeneration",
        "spatial_merge_size": tower.number("vision.spatial_merge_size", 1),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": "mm.1.bias" in tower.tensors,
        "vision_config": vision,
    }


def pixtral_pixels(tower: Metadata) -> dict[str, Any]:
    patch = tower.number("vision.patch_size")
    edge = {"size": {"longest_edge": tower.number("vision.image_size")}, "resample": 3}
    return {**normalisation(tower), **edge, "patch_size": {"height": patch, "width": patch}}


def intern(text: Metadata, tower: Metadata) -> dict[str, Any]:
    has_norms = "v.blk.0.attn_q_norm.weight" in tower.tensors
    vision = {
        **_vision(tower),
        "norm_type": "layer_norm" if "v.blk.0.ln1.bias" in tower.tensors else "rms_norm",
        "qk_normalization": has_norms,
        "qkv_bias": "v.blk.0.attn_q.bias" in tower.tensors,
        "use_mean_pooling": True,
    }
    return {
        **named_tokens(text, {"image_token_id": "<IMG_CONTEXT>"}),
        "downsample_ratio": 1 / tower.positive("vision.projector.scale_factor", 2),
        "select_layer": -1,
        "min_dynamic_patch": tower.number("vision.preproc_min_tiles", 1),
        "max_dynamic_patch": tower.number("vision.preproc_max_tiles", 12),
        "vision_config": vision,
    }


def lfm2(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """SigLIP 2 on tiles of any size."""
    return {
        **named_tokens(text, {"image_token_id": "<image>"}),
        "downsample_factor": tower.number("vision.projector.scale_factor", 2),
        "projector_hidden_size": rows_of_tensor(tower, "mm.1.weight"),
        "projector_hidden_act": "gelu",
        "projector_bias": "mm.1.bias" in tower.tensors,
        "projector_use_layernorm": "mm.input_norm.weight" in tower.tensors,
        "vision_config": {
            **_vision(tower),
            "model_type": "siglip2_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "num_patches": rows_of_tensor(tower, "v.position_embd.weight"),
        },
    }


def lfm2_pixels(tower: Metadata) -> dict[str, Any]:
    step = tower.number("vision.projector.scale_factor", 2)
    return {**normalisation(tower), "encoder_patch_size": tower.number("vision.patch_size"), "downsample_factor": step}


def idefics3(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """SmolVLM's of both generations, and Idefics3's, whose text is Llama 3."""
    is_smol = _token(text, "<|im_start|>") is not None
    return {
        **named_tokens(text, {"image_token_id": "<image>"}),
        "architecture": "SmolVLMForConditionalGeneration" if is_smol else "Idefics3ForConditionalGeneration",
        "scale_factor": tower.number("vision.projector.scale_factor", 2),
        "vision_config": {**_vision(tower), "hidden_act": "gelu_pytorch_tanh"},
    }


def idefics3_pixels(tower: Metadata) -> dict[str, Any]:
    side = tower.number("vision.image_size")
    edges = {"size": tower.number("vision.preproc_image_size", 4 * side), "max_image_size": side}
    return {**normalisation(tower), **{name: {"longest_edge": edge} for name, edge in edges.items()}, "resample": 1}


def glm4v(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """GLM-OCR's has no learned positions. The sizes of MLPs are the tensors'; its text is told by the tower."""
    vision, is_ocr = _vision(tower), "v.position_embd.weight" not in tower.tensors
    side = 0 if is_ocr else math.isqrt(rows_of_tensor(tower, "v.position_embd.weight"))
    inner = rows_of_tensor(tower, "v.blk.0.ffn_up.weight" if is_ocr else "mm.gate.weight")
    own = {
        "hidden_size": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "spatial_merge_size": tower.number("vision.spatial_merge_size", 2),
        "temporal_patch_size": 2,
        "rms_norm_eps": vision["layer_norm_eps"],
        "hidden_act": "silu",
        "intermediate_size": inner,
        "out_hidden_size": rows_of_tensor(tower, "mm.model.fc.weight"),
        "attention_bias": any(f"v.blk.0.attn_{one}.bias" in tower.tensors for one in ("qkv", "q")),
        **({} if is_ocr else {"image_size": side * vision["patch_size"]}),
    }
    names = {"_token_id": "<|{}|>", "_start_token_id": "<|begin_of_{}|>", "_end_token_id": "<|end_of_{}|>"}
    tokens = {f"{kind}{name}": one.format(kind) for kind in ("image", "video") for name, one in names.items()}
    config: dict[str, Any] = {**named_tokens(text, tokens), "vision_config": own}
    if is_ocr:
        config |= {"architecture": "GlmOcrForConditionalGeneration", "text_config": {"model_type": "glm_ocr_text"}}
    return config


def glm4v_pixels(tower: Metadata) -> dict[str, Any]:
    """The bounds are of both frames that an image is."""
    return _pixels(tower, tower.number("vision.patch_size"), 112 * 112, 28 * 28 * 15000)


def paddleocr(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """`image_size` is the largest image's; the table tells that of the positions."""
    vision, side = _vision(tower), math.isqrt(rows_of_tensor(tower, "v.position_embd.weight"))
    tokens = {
        "image_token_id": "<|IMAGE_PLACEHOLDER|>",
        "vision_start_token_id": "<|IMAGE_START|>",
        "vision_end_token_id": "<|IMAGE_END|>",
    }
    own = {"image_size": side * vision["patch_size"], "hidden_act": "gelu_pytorch_tanh"}
    merge = tower.number("vision.spatial_merge_size", 2)
    return {**named_tokens(text, tokens), "vision_config": {**vision, **own, "spatial_merge_size": merge}}


def paddleocr_pixels(tower: Metadata) -> dict[str, Any]:
    return {**_pixels(tower, tower.number("vision.patch_size"), 384 * 384, 1536 * 1536), "temporal_patch_size": 1}


_MINICPMV = {"qwen2": ("2.6", (3, 4)), "llama": ("4.0", (5,)), "qwen3": ("4.5", (6, 100045))}
"""By the text model's architecture: which MiniCPM-V it is, and what `clip.minicpmv_version` calls it."""


def minicpmv(text: Metadata, tower: Metadata) -> dict[str, Any]:
    version, numbers = _MINICPMV[text.prefix]
    if (stated := tower.get("minicpmv_version")) not in numbers:
        raise CheckpointError(
            f"{tower.name}: clip.minicpmv_version {str(stated)[:80]} is not supported with a text model of the "
            f"architecture {text.prefix!r}"
        )
    vision, size = _vision(tower), tower.number("vision.image_size")
    side = math.isqrt(rows_of_tensor(tower, "v.position_embd.weight"))
    own = {"image_size": side * vision["patch_size"], "hidden_act": "gelu_pytorch_tanh"}
    return {
        "version": version,
        "query_num": rows_of_tensor(tower, "resampler.query"),
        "image_size": size,
        "drop_vision_last_layer": False,
        "slice_config": {"max_slice_nums": 9, "scale_resolution": size, "patch_size": vision["patch_size"]},
        "vision_config": {**vision, **own, "model_type": "siglip_vision_model"},
    }


def minicpmv_pixels(tower: Metadata) -> dict[str, Any]:
    own = {f"norm_{name.removeprefix('image_')}": value for name, value in normalisation(tower).items()}
    return {**own, "patch_size": tower.number("vision.patch_size")}


_GEMMA4_SMALL = (1536, 2560)  # widths of E2B's and E4B's embeddings


def gemma4(text: Metadata, tower: Metadata) -> dict[str, Any]:
    """Three patches become one in each direction, as in all published models: it is not stored. Nor is whether an
    image's tokens see all of it; E2B's and E4B's do not."""
    table, key = (tower.tensors.get(name) for name in ("v.position_embd.weight", "v.blk.0.attn_k.weight"))
    if table is None or key is None or len(table.shape) != 3:
        raise CheckpointError(f"{tower.name} lacks the tensors of a Gemma 4 tower: v.position_embd, v.blk.0.attn_k")
    size, heads = tower.number("vision.embedding_length"), tower.number("vision.attention.head_count")
    tokens = {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"}
    head_dim = rows_of_tensor(tower, "v.blk.0.attn_q.weight") // max(heads, 1)
    sees_whole = text.number("embedding_length") not in _GEMMA4_SMALL
    return {
        **named_tokens(text, {**tokens, "video_token_id": "<|video|>"}),
        "text_config": {"use_bidirectional_attention": "vision" if sees_whole else None},
        "vision_config": {
            "hidden_size": size,
            "intermediate_size": rows_of_tensor(tower, "v.blk.0.ffn_up.weight"),
            "num_hidden_layers": tower_layers(tower),
            "num_attention_heads": heads,
            "num_key_value_heads": key.shape[0] // max(head_dim, 1),
            "head_dim": head_dim,
            "patch_size": tower.number("vision.patch_size"),
            "position_embedding_size": table.shape[1],
            "rms_norm_eps": tower.number("vision.attention.layer_norm_epsilon"),
            "standardize": "v.std_bias" in tower.tensors,
            "use_clipped_linears": "v.blk.0.attn_q.input_max" in tower.tensors,
        },
    }


def gemma4_pixels(tower: Metadata) -> dict[str, Any]:
    """Pixels stay from 0 to 1."""
    return {"patch_size": tower.number("vision.patch_size")}
