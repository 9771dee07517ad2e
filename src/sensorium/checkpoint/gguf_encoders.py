"""GGUF's metadata of encoders and of models with classes or a score -> what their config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sensorium.checkpoint.gguf_file import Strings
from sensorium.checkpoint.gguf_metadata import Metadata

_NO_PADDING = -1  # of which positions are counted: rows of the table before the first position are cut off
_HEADS = {1: "mean", 2: "cls"}  # `classifier.pooling_type`


def encoder_config(meta: Metadata) -> dict[str, Any] | None:
    """config.json's keys beside the sizes; None of a decoder."""
    own = _OWN.get(meta.prefix)
    return None if own is None else own(meta)


def class_config(meta: Metadata) -> dict[str, Any]:
    """Of a model with classes: how many there are, and their names. {} of others.

    What llama.cpp calls a score of two tokens is one class here: how much likelier the first is than the second.
    """
    head = meta.tensors.get("cls.output.weight")
    if head is None:
        return {}
    if encoder_config(meta) is None:
        if head.shape[0] != 2:
            raise meta.broken(f"cls.output.weight has {head.shape[0]} rows; a score is made of two")
        return {"num_labels": 1}
    names = meta.stored("classifier.output_labels")
    config: dict[str, Any] = {"num_labels": head.shape[0]}
    if isinstance(names, Strings) and len(names) == head.shape[0]:
        config["id2label"] = {str(index): str(name) for index, name in enumerate(names)}
    return config


def _bert(meta: Metadata) -> dict[str, Any]:
    """BERT's, RoBERTa's and XLM-RoBERTa's."""
    if "cls.output.weight" in meta.tensors and "cls.weight" not in meta.tensors:
        raise meta.broken(
            "its classifier lacks the layer before it (pooler), which llama.cpp's converter leaves out: "
            "serve the checkpoint that the file was made of"
        )
    types = meta.tensors.get("token_types.weight")
    return {
        "layer_norm_eps": meta.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "type_vocab_size": 0 if types is None else types.shape[0],
        "pad_token_id": _NO_PADDING,
    }


def _nomic_bert(meta: Metadata) -> dict[str, Any]:
    biased = {f"{own}_bias": f"blk.0.{name}.bias" in meta.tensors for own, name in _NOMIC_LAYERS.items()}
    return {
        **_bert(meta),
        "activation_function": "swiglu" if "blk.0.ffn_gate.weight" in meta.tensors else "gelu",
        "rotary_emb_base": meta.number("rope.freq_base", 10000.0),
        "rotary_emb_fraction": 1.0,
        "max_trained_positions": meta.number("context_length"),
        **biased,
    }


_NOMIC_LAYERS = {"qkv_proj": "attn_qkv", "mlp_fc1": "ffn_up", "mlp_fc2": "ffn_down"}


def _modern_bert(meta: Metadata) -> dict[str, Any]:
    return {
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon", meta.number("attention.layer_norm_epsilon", 1e-5)),
        "hidden_activation": meta.get("hidden_activation", "gelu"),
        "norm_bias": "token_embd_norm.bias" in meta.tensors,
        "attention_bias": "blk.0.attn_qkv.bias" in meta.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in meta.tensors,
        "local_attention": meta.number("attention.sliding_window"),
        "global_attn_every_n_layers": meta.number("attention.sliding_window_pattern", 3),
        "global_rope_theta": meta.number("rope.freq_base", 160000.0),
        "local_rope_theta": meta.number("rope.freq_base_swa", 10000.0),
        "classifier_bias": "cls.bias" in meta.tensors,
        "classifier_pooling": _HEADS.get(meta.get("classifier.pooling_type"), "cls"),
    }


_OWN: Mapping[str, Callable[[Metadata], dict[str, Any]]] = {
    "bert": _bert,
    "nomic-bert": _nomic_bert,
    "modern-bert": _modern_bert,
}
