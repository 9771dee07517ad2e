"""GGUF's metadata -> the configs that a checkpoint's folder would have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sensorium.checkpoint.gguf_decoders import decoder_config
from sensorium.checkpoint.gguf_encoders import class_config, encoder_config
from sensorium.checkpoint.gguf_file import GgufFile, GgufTensor
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.checkpoint.gguf_names import GgufArchitecture, gguf_architecture
from sensorium.checkpoint.gguf_towers import tower_config
from sensorium.errors import CheckpointError

_POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken"}
_RANK = 4
INT4_BLOCK = "Q4_0"  # that int4 in groups of 32 holds code for code, and multiplies faster than blocks
_PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
_KEPT_BYTES = {  # of a weight in memory: that of the file, but for scales of six bits, which take a byte
    "Q4_0": 0.5625,
    "Q4_1": 0.625,
    "Q5_0": 0.6875,
    "Q5_1": 0.75,
    "Q8_0": 1.0625,
    "Q2_K": 0.640625,  # codes of two and three bits take four
    "Q3_K": 0.5703125,
    "Q4_K": 0.578125,
    "Q5_K": 0.703125,
    "Q6_K": 0.8203125,
    "IQ4_NL": 0.5625,
    "IQ4_XS": 0.5390625,
    "MXFP4": 0.53125,
}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def served_architecture(meta: Metadata) -> GgufArchitecture:
    """CheckpointError if the first file is no model of a family that is served."""
    kind = meta.general("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{meta.name} is a GGUF file of type {str(kind)[:80]!r}, not a model")
    found = gguf_architecture(meta.all)
    if meta.has("vision.block_count"):
        raise CheckpointError(
            f"{meta.name} holds a vision tower in Ollama's own layout, which is not supported: take a GGUF file "
            "of llama.cpp's converter"
        )
    return found


def config_of(files: tuple[GgufFile, ...], tower: GgufFile | None = None) -> dict[str, Any]:
    """config.json, of a model with the tower if there is one."""
    meta = Metadata(files)
    if tower is None:
        return _text_config(meta)
    whole = Metadata((tower,))
    config = tower_config(meta, whole, _text_config(meta, has_tower=True))
    if any(tensor.kind.weights > 1 for tensor in whole.tensors.values()):
        part = memory_part([*meta.tensors.values(), *whole.tensors.values()])
        config["quantization_config"] = {"quant_method": "gguf", "memory_part": part}
    return config


def _text_config(meta: Metadata, *, has_tower: bool = False) -> dict[str, Any]:
    architecture, tensors = served_architecture(meta), meta.tensors
    if architecture.tower and not has_tower:
        raise meta.broken(f"the text of {architecture.tower} is not served alone: name its projector with --mmproj")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{meta.name} has no token_embd.weight: it holds no model's weights")
    encoder, classes, layers = encoder_config(meta), class_config(meta), meta.layers
    config = {
        "architectures": [_served_as(meta, architecture, has_classes=bool(classes))],
        "model_type": architecture.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": meta.number("embedding_length"),
        "intermediate_size": _inner_size(meta),
        "num_hidden_layers": layers,
        "num_attention_heads": meta.number("attention.head_count"),
        "max_position_embeddings": meta.number("context_length"),
        "torch_dtype": _dtype(tensors),
    }
    own = {**(decoder_config(meta, has_tower=has_tower) if encoder is None else encoder), **classes}
    quantised = any(tensor.kind.weights > 1 for tensor in tensors.values())
    if quantised:
        own["quantization_config"] = {"quant_method": "gguf", "memory_part": memory_part(tensors.values())}
    return {key: value for key, value in {**config, **own}.items() if value is not None}


def _served_as(meta: Metadata, architecture: GgufArchitecture, *, has_classes: bool) -> str:
    """With classes, with a language head, or with neither."""
    if has_classes or meta.get("pooling_type") == _RANK:
        if architecture.classifier is None or not has_classes:
            what = "has no cls.output.weight" if architecture.classifier else f"is of the architecture {meta.prefix!r}"
            raise meta.broken(f"a reranker or classifier that {what} is not supported as GGUF: serve its checkpoint")
        return architecture.classifier
    if pooling_of(meta) is not None and architecture.base is not None:
        return architecture.base
    return architecture.architecture


def _inner_size(meta: Metadata) -> int:
    """Of an MLP, the first layer's; where all layers have experts, of one of them."""
    if not meta.has("feed_forward_length") and meta.has("expert_feed_forward_length"):
        size: int = meta.number("expert_feed_forward_length")
        return size
    return int(meta.numbers("feed_forward_length", meta.layers)[0])


def pooling_of(meta: Metadata) -> str | None:
    """How embeddings are pooled, by sentence-transformers' name; None: not said, so the model generates."""
    kind = meta.get("pooling_type")
    return _POOLINGS.get(kind) if isinstance(kind, int) else None


def memory_part(tensors: Any) -> float:
    """Bytes in memory for a byte of the file, on a CPU."""
    found = list(tensors)
    stored = sum(tensor.nbytes for tensor in found)
    kept = sum(math.prod(tensor.shape) * min(kept_bytes(tensor.kind.name), 2) for tensor in found)
    return float(round(kept / max(stored, 1), 3))


def kept_bytes(kind: str) -> float:
    """Of a weight of a block type, on a CPU."""
    return _PLAIN[kind] if kind in _PLAIN else _KEPT_BYTES[kind]


def kept_as(kind: str, *, is_mapped: bool = False) -> str:
    """What a CPU computes with, of a block type. `is_mapped`: of a file whose blocks are computed with where it has
    them, and as blocks when they are copied."""
    if kind in _PLAIN:
        return "plain numbers"
    is_int4 = kind == INT4_BLOCK and not is_mapped
    what = "int4 in groups of 32, code for code" if is_int4 else "the blocks as they are"
    return f"{what}, {8 * kept_bytes(kind):.4g} bits a weight"


def generation_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: end tokens and, in newer files, how to sample."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found: dict[str, Any] = {
        name: value
        for key, name in _SAMPLING.items()
        if isinstance(value := metadata.get(f"general.sampling.{key}"), int | float) and math.isfinite(value)
    }
    stops = list(dict.fromkeys(one for one in ends if isinstance(one, int)))
    return {**found, "eos_token_id": stops} if stops else found


def _dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """That of the largest plain tensors, where all matrices are plain; else what codes are computed in."""
    kinds = {tensor.kind.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")
