"""Towers in GGUF: llama.cpp's projector files (mmproj) -> the names and the config.json of a model with a tower.

A row for every projector type. The text model's file decides the family, where several have one tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sensorium.checkpoint import gguf_tower_configs as configs
from sensorium.checkpoint.gguf_file import GgufFile
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.errors import CheckpointError

CLIP = "clip"  # `general.architecture` of such files
_BLOCK = re.compile(r"([va])\.blk\.(\d{1,4})\.(.+)")
_MERGER = re.compile(r"v\.deepstack\.(\d{1,4})\.(.+)")
_SUFFIXED = re.compile(r"(.+)\.(weight|bias)")
_FRAMES = re.compile(r"(.+\.weight)\.(\d)")  # one of the parts of a convolution over several frames
_ATTENTION = {f"attn_{one}": one for one in "qkv"}


@dataclass(frozen=True, slots=True)
class GgufTower:
    """A projector type. `families` are those of text models: architecture -> (the whole one's, its text model_type);
    "" is any other's. `blocks` and `outer` are names without suffix, or whole ones."""

    families: Mapping[str, tuple[str, str]]
    config: Callable[[Metadata, Metadata], dict[str, Any]]  # (text, tower) -> config.json without its text
    layer: str
    blocks: Mapping[str, str]
    outer: Mapping[str, str]
    preprocessor: Callable[[Metadata], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    permutes_heads: bool = False
    norm_offset: Mapping[str, float] = field(default_factory=dict)  # what writers added, by checkpoint's name
    template: bool = True  # whether the file's chat template knows images


_QWEN_BLOCKS = {
    **{own: f"attn.{one}" for own, one in _ATTENTION.items()},
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ln1": "norm1",
    "ln2": "norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_QWEN_OUTER = {
    "v.patch_embd": "visual.patch_embed.proj",
    "v.position_embd": "visual.pos_embed",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
_CLIP_BLOCKS = {
    **{own: f"self_attn.{one}_proj" for own, one in _ATTENTION.items()},
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_CLIP_OUTER = {
    "v.class_embd": "vision_tower.embeddings.class_embedding",
    "v.class_embd.weight": "vision_tower.embeddings.class_embedding",
    "v.patch_embd": "vision_tower.embeddings.patch_embedding",
    "v.position_embd": "vision_tower.embeddings.position_embedding",
    "v.pre_ln": "vision_tower.pre_layrnorm",
    "v.post_ln": "vision_tower.post_layernorm",
}
_PIXTRAL_BLOCKS = {
    **{own: f"attention.{one}_proj" for own, one in _ATTENTION.items()},
    "attn_out": "attention.o_proj",
    "ln1": "attention_norm",
    "ln2": "ffn_norm",
    **{f"ffn_{one}": f"feed_forward.{one}_proj" for one in ("gate", "up", "down")},
}
_INTERN_BLOCKS = {
    **{own: f"attention.{one}_proj" for own, one in _ATTENTION.items()},
    "attn_out": "attention.projection_layer",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ln1": "layernorm_before",
    "ln2": "layernorm_after",
    "ls1.weight": "lambda_1",
    "ls2.weight": "lambda_2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def projector_of(tower: Metadata) -> Any:
    return tower.get("projector_type") or tower.get("vision.projector_type") or tower.get("audio.projector_type")


def tower_of(tower: Metadata) -> GgufTower:
    """The row of a projector's file. CheckpointError if it is none, or of a type that is not served."""
    kind = tower.all.get("general.type", "mmproj")
    if tower.prefix != CLIP or kind != "mmproj":
        raise CheckpointError(
            f"{tower.name} is no projector (mmproj) of llama.cpp: its architecture is {_short(tower)}"
        )
    projector = projector_of(tower)
    if not isinstance(projector, str) or projector not in TOWERS:
        raise CheckpointError(
            f"{tower.name}: projectors of the type {str(projector)[:80]!r} are not supported; supported are "
            f"{', '.join(TOWERS)}"
        )
    if projector == "qwen2vl_merger" and any(name.endswith("ffn_gate.weight") for name in tower.tensors):
        raise CheckpointError(f"{tower.name} is Qwen2.5-VL's and says that it is Qwen2-VL's: make it anew")
    return TOWERS[projector]


def goes_with(text: Metadata, tower: Metadata) -> bool:
    """Whether a tower that nobody named is the text model's: its rows are as wide as the embeddings."""
    if not is_tower(tower.files[0]):
        return False
    row = tower_of(tower)
    width = tower.get("vision.projection_dim", tower.get("audio.projection_dim"))
    return (text.prefix in row.families or "" in row.families) and width in (None, text.get("embedding_length"))


def _short(tower: Metadata) -> str:
    return repr(tower.prefix[:80])


def tower_config(text: Metadata, tower: Metadata, decoder: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the whole, whose text model has the config `decoder`."""
    row = tower_of(tower)
    if text.prefix not in row.families and "" not in row.families:
        raise CheckpointError(
            f"{tower.name} does not go with a text model of the architecture {text.prefix!r}; it goes with "
            f"{', '.join(row.families)}"
        )
    architecture, model_type = row.families.get(text.prefix) or row.families[""]
    width = tower.number("vision.projection_dim", text.number("embedding_length"))
    if width != text.number("embedding_length"):
        raise CheckpointError(
            f"{tower.name} makes rows of {width} numbers, {text.name} takes {text.number('embedding_length')}"
        )
    outer = {
        key: decoder[key] for key in ("torch_dtype", "quantization_config", "tie_word_embeddings") if key in decoder
    }
    own = row.config(text, tower)
    config = {**outer, "architectures": [own.pop("architecture", architecture)], **own}
    return {**config, "text_config": {**decoder, "model_type": model_type or decoder["model_type"]}}


def tower_name(name: str, row: GgufTower, tapped: Sequence[int] = ()) -> str:
    """A tensor's name in checkpoints; one that is not known stays as it is. Mergers of inner layers are numbered by the
    layer in files, and by its place among the `tapped` ones in checkpoints."""
    match = _MERGER.fullmatch(name)
    if match is not None and int(match[1]) in tapped:
        own = _renamed(match[2], {"norm": "ln_q", "fc1": "mlp.0", "fc2": "mlp.2"})
        return name if own is None else f"visual.deepstack_merger_list.{tapped.index(int(match[1]))}.{own}"
    match = _BLOCK.fullmatch(name)
    if match is not None:
        own = _renamed(match[3], row.blocks)
        return name if own is None else row.layer.replace("{}", str(int(match[2]))) + own
    return _renamed(name, row.outer) or name


def frame_of(name: str) -> tuple[str, int | None]:
    """(name of the whole, number of the part) of a convolution that is stored frame by frame."""
    match = _FRAMES.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    if name in names:
        return names[name]
    match = _SUFFIXED.fullmatch(name)
    return None if match is None or match[1] not in names else f"{names[match[1]]}.{match[2]}"


def is_tower(file: GgufFile) -> bool:
    return file.metadata.get("general.architecture") == CLIP


TOWERS: Mapping[str, GgufTower] = {
    "mlp": GgufTower(
        {"": ("LlavaForConditionalGeneration", "")},
        configs.llava,
        "vision_tower.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {**_CLIP_OUTER, "mm.0": "multi_modal_projector.linear_1", "mm.2": "multi_modal_projector.linear_2"},
        configs.llava_pixels,
        template=False,
    ),
    "qwen2vl_merger": GgufTower(
        {"qwen2vl": ("Qwen2VLForConditionalGeneration", "qwen2_vl_text")},
        configs.qwen2,
        "visual.blocks.{}.",
        _QWEN_BLOCKS,
        _QWEN_OUTER,
        configs.qwen2_pixels,
    ),
    "qwen2.5vl_merger": GgufTower(
        {"qwen2vl": ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text")},
        configs.qwen2_5,
        "visual.blocks.{}.",
        {**_QWEN_BLOCKS, **{f"ffn_{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")}},
        _QWEN_OUTER,
        configs.qwen2_pixels,
    ),
    "qwen3vl_merger": GgufTower(
        {
            "qwen3vl": ("Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
            "qwen3vlmoe": ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
            "qwen35": ("Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
            "qwen35moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
        },
        configs.qwen3,
        "visual.blocks.{}.",
        _QWEN_BLOCKS,
        _QWEN_OUTER,
        configs.qwen3_pixels,
    ),
    "gemma3": GgufTower(
        {"gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text")},
        configs.gemma3,
        "vision_tower.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {
            **_CLIP_OUTER,
            "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
            "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
        },
        configs.normalisation,
        norm_offset={"multi_modal_projector.mm_soft_emb_norm.weight": 1.0},
    ),
    "pixtral": GgufTower(
        {"": ("Mistral3ForConditionalGeneration", "")},
        configs.pixtral,
        "vision_tower.transformer.layers.{}.",
        _PIXTRAL_BLOCKS,
        {
            "v.patch_embd": "vision_tower.patch_conv",
            "v.pre_ln": "vision_tower.ln_pre",
            "mm.1": "multi_modal_projector.linear_1",
            "mm.2": "multi_modal_projector.linear_2",
            "mm.input_norm": "multi_modal_projector.norm",
            "mm.patch_merger": "multi_modal_projector.patch_merger.merging_layer",
        },
        configs.pixtral_pixels,
        ignored=("v.token_embd.img_break",),
        permutes_heads=True,
    ),
    "internvl": GgufTower(
        {"": ("InternVLForConditionalGeneration", "")},
        configs.intern,
        "vision_model.encoder.layer.{}.",
        _INTERN_BLOCKS,
        {
            "v.class_embd": "vision_model.embeddings.class_embedding",
            "v.class_embd.weight": "vision_model.embeddings.class_embedding",
            "v.patch_embd": "vision_model.embeddings.patch_embedding",
            "v.position_embd": "vision_model.embeddings.position_embedding",
            "v.position_embd.weight": "vision_model.embeddings.position_embedding",
            **{f"mm.model.mlp.{one}": f"mlp1.{one}" for one in (0, 1, 3)},
        },
        configs.normalisation,
    ),
}
"""By `clip.projector_type`."""
