"""Towers in GGUF: llama.cpp's projector files (mmproj) -> the names and the config.json of a model with a tower.

A row for every projector type. The text model's file decides the family, where several have one tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from sensorium.checkpoint import chat_templates
from sensorium.checkpoint import gguf_audio_configs as hearing
from sensorium.checkpoint import gguf_tower_configs as configs
from sensorium.checkpoint.gguf_file import GgufFile, Strings
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.errors import CheckpointError

CLIP = "clip"  # `general.architecture` of such files
_BLOCK = re.compile(r"([va])\.blk\.(\d{1,4})\.(.+)")
_MERGER = re.compile(r"v\.deepstack\.(\d{1,4})\.(.+)")
_SUFFIXED = re.compile(r"(.+)\.(weight|bias)")
_FRAMES = re.compile(r"(.+\.weight)\.(\d)")  # one of the parts of a convolution over several frames
_ATTENTION = {f"attn_{one}": one for one in "qkv"}
_HEARD = ("a.", "mm.a.")  # beginnings of names of towers that hear
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


Change: TypeAlias = Literal["shifted", "transposed", "unfolded", "softplus", "column"]
"""Norms with one added; a matrix with inputs first; patches' linear layer as a convolution; softplus taken; a
convolution over time of each channel by itself without its middle dimension."""


@dataclass(frozen=True, slots=True)
class GgufTower:
    """A projector type. `families` are those of text models: architecture -> (the whole one's, its text model_type);
    "" is any other's. `blocks` and `outer` are names without suffix, or whole ones; "name@n" is the n-th part of a
    tensor. `changes`, by checkpoint's name or its end, is what writers did to contents."""

    families: Mapping[str, tuple[str, str]]
    config: Callable[[Metadata, Metadata], dict[str, Any]]  # (text, tower) -> config.json without its text
    layer: str
    blocks: Mapping[str, str]
    outer: Mapping[str, str]
    preprocessor: Callable[[Metadata], Mapping[str, Any]]
    ignored: tuple[str, ...] = ()
    permutes_heads: bool = False
    changes: Mapping[str, Change] = field(default_factory=dict)
    width: str = ""  # the tensor whose outputs are as wide as the text model; "": `projection_dim` says it
    template: bool = True  # whether the file's chat template knows the modality, also where it does not name it
    modality: str = "image"


_QWEN_BLOCKS = {
    **{own: f"attn.{one}" for own, one in _ATTENTION.items()},
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ln1": "norm1",
    "ln2": "norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_QWEN25_BLOCKS = {**_QWEN_BLOCKS, **{f"ffn_{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")}}
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


_WHISPER_BLOCKS = {
    **{own: f"self_attn.{one}_proj" for own, one in _ATTENTION.items()},
    "attn_out": "self_attn.out_proj",
    "ln1": "self_attn_layer_norm",
    "ln2": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}
_WHISPER_OUTER = {
    "a.conv1d.1": "audio_tower.conv1",
    "a.conv1d.2": "audio_tower.conv2",
    "a.position_embd": "audio_tower.embed_positions",
    "a.post_ln": "audio_tower.layer_norm",
}
_STACKED = {f"mm.a.mlp.{one}": f"multi_modal_projector.linear_{one}" for one in (1, 2)}


def _bounded(names: Mapping[str, str]) -> dict[str, str]:
    """Linear layers whose inputs and outputs have bounds."""
    bounds = {f"{own}.{one}": f"{name}.{one}" for own, name in names.items() for one in _BOUNDS}
    return {**{f"{own}.weight": f"{name}.linear.weight" for own, name in names.items()}, **bounds}


_GEMMA4_BLOCKS = {
    **_bounded(
        {
            **{own: f"self_attn.{one}_proj" for own, one in _ATTENTION.items()},
            "attn_out": "self_attn.o_proj",
            **{f"ffn_{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")},
        }
    ),
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ln1": "input_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_CONFORMER_BLOCKS = {
    **_bounded(
        {
            **{own: f"self_attn.{one}_proj" for own, one in _ATTENTION.items()},
            "attn_out": "self_attn.post",
            "conv_pw1": "lconv1d.linear_start",
            "conv_pw2": "lconv1d.linear_end",
            "ffn_up": "feed_forward1.ffw_layer_1",
            "ffn_down": "feed_forward1.ffw_layer_2",
            "ffn_up_1": "feed_forward2.ffw_layer_1",
            "ffn_down_1": "feed_forward2.ffw_layer_2",
        }
    ),
    "attn_k_rel": "self_attn.relative_k_proj",
    "per_dim_scale.weight": "self_attn.per_dim_scale",
    "attn_pre_norm": "norm_pre_attn",
    "attn_post_norm": "norm_post_attn",
    "ln2": "norm_out",
    "ffn_norm": "feed_forward1.pre_layer_norm",
    "ffn_post_norm": "feed_forward1.post_layer_norm",
    "ffn_norm_1": "feed_forward2.pre_layer_norm",
    "ffn_post_norm_1": "feed_forward2.post_layer_norm",
    "norm_conv": "lconv1d.conv_norm",
    "conv_norm": "lconv1d.pre_layer_norm",
    "conv_dw": "lconv1d.depthwise_conv1d",
}


def projector_of(tower: Metadata) -> Any:
    """Of the tower that sees, else of the one that hears."""
    return tower.get("projector_type") or tower.get("vision.projector_type") or tower.get("audio.projector_type")


def rows_of(tower: Metadata) -> tuple[GgufTower, ...]:
    """The rows of a projector's file: of the tower that sees, and of the one that hears. CheckpointError if it is no
    such file, or of a type that is not served."""
    kind = tower.general("general.type", "mmproj")
    if tower.prefix != CLIP or kind != "mmproj":
        raise CheckpointError(
            f"{tower.name} is no projector (mmproj) of llama.cpp: its architecture is {_short(tower)}"
        )
    hears = any(name.startswith(_HEARD) for name in tower.tensors)
    sees = any(not name.startswith(_HEARD) for name in tower.tensors) or not hears
    kinds = (("vision", TOWERS, sees), ("audio", HEARING, hears))
    rows = []
    for kind, served, is_there in kinds:
        if is_there:
            projector = tower.get("projector_type") or tower.get(f"{kind}.projector_type")
            if not isinstance(projector, str) or projector not in served:
                raise CheckpointError(
                    f"{tower.name}: projectors of the type {str(projector)[:80]!r} are not supported; supported are "
                    f"{', '.join(dict.fromkeys([*TOWERS, *HEARING]))}"
                )
            rows.append(served[projector])
    projector = projector_of(tower)
    if projector == "qwen2vl_merger" and any(name.endswith("ffn_gate.weight") for name in tower.tensors):
        raise CheckpointError(f"{tower.name} is Qwen2.5-VL's and says that it is Qwen2-VL's: make it anew")
    return tuple(rows)


def template_with_media(text: Metadata, config: Mapping[str, Any]) -> str | None:
    """Of a LLaVA that cuts images into tiles (LLaVA-NeXT), how its text model was spoken to, where no template of the
    file knows images. None: as the family is in any case."""
    tokens, own = text.all.get("tokenizer.ggml.tokens"), str(text.all.get("tokenizer.chat_template"))
    if "image_grid_pinpoints" not in config or not isinstance(tokens, Strings) or "<|im_start|>" in tokens:
        return None
    return chat_templates.MISTRAL_LLAVA if "[INST]" in own else chat_templates.VICUNA_LLAVA


def row_of(name: str, rows: Sequence[GgufTower]) -> GgufTower:
    """That of a tensor."""
    return rows[-1 if name.startswith(_HEARD) else 0]


def goes_with(text: Metadata, tower: Metadata) -> bool:
    """Whether a tower that nobody named is the text model's: its rows are as wide as the embeddings."""
    if not is_tower(tower.files[0]):
        return False
    rows = rows_of(tower)
    return _goes_with_text(text, rows) and _width(tower, rows) in (None, text.maybe("embedding_length"))


def _goes_with_text(text: Metadata, rows: Sequence[GgufTower]) -> bool:
    return all(text.prefix in row.families or "" in row.families for row in rows[-1:])


def _width(tower: Metadata, rows: Sequence[GgufTower]) -> int | None:
    """Of the rows that a tower makes; None if the file does not say."""
    last = tower.tensors.get(rows[0].width)
    if last is not None:
        return last.shape[0]
    stated: int | None = tower.maybe("vision.projection_dim")
    return tower.maybe("audio.projection_dim") if stated is None else stated


def _short(tower: Metadata) -> str:
    return repr(tower.prefix[:80])


def tower_config(text: Metadata, tower: Metadata, decoder: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the whole, whose text model has the config `decoder`."""
    rows = rows_of(tower)
    families = rows[-1].families  # of both, the one that hears knows who also sees
    if not _goes_with_text(text, rows):
        raise CheckpointError(
            f"{tower.name} does not go with a text model of the architecture {text.prefix!r}; it goes with "
            f"{', '.join(families)}"
        )
    architecture, model_type = families.get(text.prefix) or families[""]
    width = _width(tower, rows)
    if width not in (None, text.number("embedding_length")):
        raise CheckpointError(
            f"{tower.name} makes rows of {width} numbers, {text.name} takes {text.number('embedding_length')}"
        )
    outer = {
        key: decoder[key] for key in ("torch_dtype", "quantization_config", "tie_word_embeddings") if key in decoder
    }
    own = {key: value for row in rows for key, value in row.config(text, tower).items()}
    config = {**outer, "architectures": [own.pop("architecture", architecture)], **own}
    inner = {**decoder, "model_type": model_type or decoder["model_type"], **own.get("text_config", {})}
    return {**config, "text_config": inner}


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


def part_of_name(key: str, name: str) -> tuple[str, str]:
    """(key without the number of its part, that number or ""). A name that is not known, whatever it is, has none."""
    whole, _, part = key.partition("@")
    return (key, "") if key == name else (whole, part)


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
    return Metadata((file,)).prefix == CLIP


_GEMMA4 = ("Gemma4ForConditionalGeneration", "gemma4_text")
TOWERS: Mapping[str, GgufTower] = {
    "mlp": GgufTower(
        {"": ("LlavaForConditionalGeneration", "")},
        configs.llava,
        "vision_tower.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {
            **_CLIP_OUTER,
            "mm.0": "multi_modal_projector.linear_1",
            "mm.2": "multi_modal_projector.linear_2",
            **dict.fromkeys(configs.NEWLINES, "image_newline"),
        },
        configs.llava_pixels,
        width="mm.2.weight",
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
        _QWEN25_BLOCKS,
        _QWEN_OUTER,
        configs.qwen2_pixels,
    ),
    "qwen2.5o": GgufTower(
        {"qwen2vl": ("Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni_text")},
        configs.qwen2_omni,
        "visual.blocks.{}.",
        _QWEN25_BLOCKS,
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
        changes={"mm_soft_emb_norm.weight": "shifted"},
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
    "idefics3": GgufTower(
        {"llama": ("SmolVLMForConditionalGeneration", "")},
        configs.idefics3,
        "vision_model.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {
            **{name: own.replace("vision_tower.", "vision_model.") for name, own in _CLIP_OUTER.items()},
            "mm.model.fc": "connector.modality_projection.proj",
        },
        configs.idefics3_pixels,
        width="mm.model.fc.weight",
    ),
    "glm4v": GgufTower(
        {
            "glm4": ("Glm4vForConditionalGeneration", "glm4v_text"),
            "glm4moe": ("Glm4vMoeForConditionalGeneration", "glm4v_moe_text"),
        },
        configs.glm4v,
        "visual.blocks.{}.",
        {**_QWEN25_BLOCKS, "attn_q_norm": "attn.q_norm", "attn_k_norm": "attn.k_norm"},
        {
            "v.patch_embd": "visual.patch_embed.proj",
            "v.position_embd": "visual.embeddings.position_embedding",
            "v.norm_embd": "visual.post_conv_layernorm",
            "v.post_ln": "visual.post_layernorm",
            "mm.patch_merger": "visual.downsample",
            "mm.model.fc": "visual.merger.proj",
            "mm.post_norm": "visual.merger.post_projection_norm",
            **{f"mm.{one}": f"visual.merger.{one}_proj" for one in ("gate", "up", "down")},
        },
        configs.glm4v_pixels,
        width="mm.down.weight",
    ),
    "paddleocr": GgufTower(
        {"paddleocr": ("PaddleOCRVLForConditionalGeneration", "paddleocr_vl_text")},
        configs.paddleocr,
        "visual.vision_model.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {
            **{name: own.replace("vision_tower.", "visual.vision_model.") for name, own in _CLIP_OUTER.items()},
            "mm.input_norm": "mlp_AR.pre_norm",
            "mm.1": "mlp_AR.linear_1",
            "mm.2": "mlp_AR.linear_2",
        },
        configs.paddleocr_pixels,
        width="mm.2.weight",
    ),
    "lfm2": GgufTower(
        {"lfm2": ("Lfm2VlForConditionalGeneration", "lfm2")},
        configs.lfm2,
        "vision_tower.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {
            **_CLIP_OUTER,
            "mm.input_norm": "multi_modal_projector.layer_norm",
            "mm.1": "multi_modal_projector.linear_1",
            "mm.2": "multi_modal_projector.linear_2",
        },
        configs.lfm2_pixels,
        template=False,
        changes={"patch_embedding.weight": "unfolded"},
    ),
    "resampler": GgufTower(
        dict.fromkeys(("qwen2", "llama", "qwen3"), ("MiniCPMV", "")),
        configs.minicpmv,
        "vpm.encoder.layers.{}.",
        _CLIP_BLOCKS,
        {
            "v.patch_embd": "vpm.embeddings.patch_embedding",
            "v.position_embd": "vpm.embeddings.position_embedding",
            "v.post_ln": "vpm.post_layernorm",
            **{f"resampler.{one}": f"resampler.{one}" for one in ("ln_q", "ln_kv", "ln_post")},
            **{
                f"resampler.attn.{one}.{part}": f"resampler.attn.in_proj_{part}@{index}"
                for index, one in enumerate("qkv")
                for part in ("weight", "bias")
            },
            "resampler.attn.out": "resampler.attn.out_proj",
            "resampler.kv": "resampler.kv_proj",
            "resampler.proj.weight": "resampler.proj",
        },
        configs.minicpmv_pixels,
        ignored=("resampler.pos_embed",),
        changes={"resampler.proj": "transposed"},
        width="resampler.proj.weight",
        template=False,
    ),
    "gemma4v": GgufTower(
        {"gemma4": _GEMMA4},
        configs.gemma4,
        "vision_tower.encoder.layers.{}.",
        _GEMMA4_BLOCKS,
        {
            "v.patch_embd": "vision_tower.patch_embedder.input_proj",
            "v.position_embd.weight": "vision_tower.patch_embedder.position_embedding_table",
            "v.std_bias": "vision_tower.std_bias",
            "v.std_scale": "vision_tower.std_scale",
            "mm.input_projection": "embed_vision.embedding_projection",
        },
        configs.gemma4_pixels,
        changes={"input_proj.weight": "unfolded"},
    ),
}
"""Towers that see, by their `projector_type`."""
_OMNI_HEARING = {"a.post_ln": "audio_tower.ln_post"}
HEARING: Mapping[str, GgufTower] = {
    "ultravox": GgufTower(
        {"": ("UltravoxModel", "")},
        hearing.ultravox,
        "audio_tower.layers.{}.",
        _WHISPER_BLOCKS,
        {
            **_WHISPER_OUTER,
            **_STACKED,
            "mm.a.norm_pre": "multi_modal_projector.ln_pre",
            "mm.a.norm_mid": "multi_modal_projector.ln_mid",
        },
        hearing.nothing,
        modality="audio",
        width="mm.a.mlp.2.weight",
    ),
    "voxtral": GgufTower(
        {"llama": ("VoxtralForConditionalGeneration", "")},
        hearing.voxtral,
        "audio_tower.layers.{}.",
        _WHISPER_BLOCKS,
        {**_WHISPER_OUTER, **_STACKED},
        hearing.nothing,
        template=False,
        modality="audio",
    ),
    "qwen2a": GgufTower(
        {"qwen2": ("Qwen2AudioForConditionalGeneration", "qwen2")},
        hearing.qwen2_audio,
        "audio_tower.layers.{}.",
        _WHISPER_BLOCKS,
        {**_WHISPER_OUTER, "mm.a.fc": "multi_modal_projector.linear"},
        hearing.nothing,
        template=False,
        modality="audio",
    ),
    "qwen2.5o": GgufTower(
        {"qwen2vl": ("Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni_text")},
        hearing.qwen2_omni,
        "audio_tower.layers.{}.",
        _WHISPER_BLOCKS,
        {**_WHISPER_OUTER, **_OMNI_HEARING, "mm.a.fc": "audio_tower.proj"},
        hearing.nothing,
        modality="audio",
        ignored=("a.position_embd",),
    ),
    "qwen3a": GgufTower(
        {
            "qwen3vl": ("Qwen3ASRForConditionalGeneration", "qwen3_asr_text"),
            "qwen3vlmoe": ("Qwen3OmniMoeThinkerForConditionalGeneration", "qwen3_omni_moe_text"),
        },
        hearing.qwen3_audio,
        "audio_tower.layers.{}.",
        _WHISPER_BLOCKS,
        {
            **_OMNI_HEARING,
            **{f"a.conv2d.{one}": f"audio_tower.conv2d{one}" for one in (1, 2, 3)},
            **{f"mm.a.mlp.{one}": f"audio_tower.proj{one}" for one in (1, 2)},
            "a.conv_out": "audio_tower.conv_out",
        },
        hearing.nothing,
        template=False,
        modality="audio",
        ignored=("a.position_embd",),
    ),
    "gemma4a": GgufTower(
        {"gemma4": _GEMMA4},
        hearing.gemma4,
        "audio_tower.layers.{}.",
        _CONFORMER_BLOCKS,
        {
            **{f"a.conv1d.{one}": f"audio_tower.subsample_conv_projection.layer{one}.conv" for one in (0, 1)},
            **{f"a.conv1d.{one}.norm": f"audio_tower.subsample_conv_projection.layer{one}.norm" for one in (0, 1)},
            "a.input_projection": "audio_tower.subsample_conv_projection.input_proj_linear",
            "a.pre_encode.out": "audio_tower.output_proj",
            "mm.a.input_projection": "embed_audio.embedding_projection",
        },
        hearing.nothing,
        modality="audio",
        changes={"per_dim_scale": "softplus", "depthwise_conv1d.weight": "column"},
    ),
}
"""Towers that hear."""
