"""GGUF's metadata of decoders -> what their config.json says: what all have, and what each architecture adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sensorium.checkpoint.gguf_metadata import Metadata

GEMMA3_27B_LAYERS = 62  # the only Gemma 3 whose scores are not divided by the root of head_dim
UNROTATED = 1e10  # divides the frequencies of what is not rotated
_RENORMALISE = ("qwen3moe", "qwen3vlmoe", "glm4moe")  # where the file does not say it
_SIGMOIDS = 2  # `expert_gating_func`


def decoder_config(meta: Metadata, *, has_tower: bool = False) -> dict[str, Any]:
    """config.json's keys of the decoder, beside its sizes. `has_tower`: positions have several axes."""
    heads, hidden = meta.number("attention.head_count"), meta.number("embedding_length")
    head_dim = meta.number("attention.key_length", hidden // max(heads, 1))
    if meta.number("attention.value_length", head_dim) != head_dim:
        raise meta.broken("keys and values of different lengths are not supported")
    config = {
        "head_dim": head_dim,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in meta.tensors,
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "attention_bias": any(f"blk.{layer}.attn_q.bias" in meta.tensors for layer in range(meta.layers)),
        "partial_rotary_factor": _rotated(meta, head_dim) / head_dim,
        **_experts(meta),
    }
    scaling = _rope_scaling(meta)
    if scaling:
        config["rope_scaling"] = scaling
    own = _OWN.get(meta.prefix)
    config |= _heads_and_window(meta, heads) if own is None else own(meta, heads)
    return {**config, **(_axes(meta, config.get("rope_scaling")) if has_tower or meta.prefix in _WITH_AXES else {})}


def _rotated(meta: Metadata, head_dim: int) -> int:
    rotated: int = meta.number("rope.dimension_count", head_dim)
    if not 0 < rotated <= head_dim:
        raise meta.broken(f"{meta.prefix}.rope.dimension_count {rotated} is not in 1..{head_dim}")
    return rotated


def _heads_and_window(meta: Metadata, heads: int) -> dict[str, Any]:
    config = {"num_key_value_heads": meta.number("attention.head_count_kv", heads)}
    if meta.get("attention.sliding_window"):
        config |= {"sliding_window": meta.number("attention.sliding_window"), "use_sliding_window": False}
    return config


def _axes(meta: Metadata, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Frequencies of each axis of the positions."""
    sections = meta.stored("rope.dimension_sections")
    if not isinstance(sections, np.ndarray):
        return {}
    return {"rope_scaling": {"type": "mrope", **(scaling or {}), "mrope_section": sections.tolist()[:3]}}


_WITH_AXES = ("qwen35", "qwen35moe")  # whose text model has them too


def _experts(meta: Metadata) -> dict[str, Any]:
    """{} of a model without. CheckpointError if they are chosen in another way than the family's."""
    if not meta.get("expert_count"):
        return {}
    count, chooses = meta.number("expert_count"), meta.get("expert_gating_func")
    if chooses not in (None, 0) and (chooses == _SIGMOIDS) != (meta.prefix == "glm4moe"):
        raise meta.broken(f"{meta.prefix}.expert_gating_func {str(chooses)[:80]} is not supported")
    routed = [f"blk.{layer}.ffn_gate_inp.weight" in meta.tensors for layer in range(meta.layers)]
    config = {
        "num_experts": count,
        "n_routed_experts": count,
        "num_experts_per_tok": meta.number("expert_used_count"),
        "mlp_only_layers": [layer for layer, one in enumerate(routed) if not one],
        "norm_topk_prob": bool(meta.get("expert_weights_norm", meta.prefix in _RENORMALISE)),
        "routed_scaling_factor": meta.number("expert_weights_scale", 0.0) or 1.0,
    }
    if meta.has("expert_feed_forward_length"):
        config["moe_intermediate_size"] = meta.number("expert_feed_forward_length")
    shared = [tensor.shape[0] for name, tensor in meta.tensors.items() if name.endswith(".ffn_up_shexp.weight")]
    if shared:
        config["shared_expert_intermediate_size"] = shared[0]
    return config


def _glm4(meta: Metadata, heads: int) -> dict[str, Any]:
    return {
        **_heads_and_window(meta, heads),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in meta.tensors,
        "n_shared_experts": meta.number("expert_shared_count", 1),
        "first_k_dense_replace": meta.number("leading_dense_block_count", 0),
        "n_group": meta.number("expert_group_count", 1) or 1,
        "topk_group": meta.number("expert_group_used_count", 1) or 1,
        "num_nextn_predict_layers": meta.number("nextn_predict_layers", 0),
    }


def _gpt_oss(meta: Metadata, heads: int) -> dict[str, Any]:
    """The original's YaRN has borders between whole dimensions, whatever llama.cpp makes of them."""
    config = _heads_and_window(meta, heads)
    scaling = _rope_scaling(meta)
    return {**config, "rope_scaling": {**scaling, "truncate": False}} if scaling else config


def _lfm2(meta: Metadata, heads: int) -> dict[str, Any]:
    """Layers without key-value heads have a convolution."""
    kv_heads = meta.numbers("attention.head_count_kv", meta.layers)
    return {
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "num_key_value_heads": max(kv_heads) or heads,
        "layer_types": ["full_attention" if one else "conv" for one in kv_heads],
        "conv_L_cache": meta.number("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in meta.tensors),
        "block_auto_adjust_ff_dim": False,
    }


def _qwen35(meta: Metadata, heads: int) -> dict[str, Any]:
    """Value heads of the states are stored with those of all key heads in turn."""
    recurrent = meta.flags("attention.recurrent_layers", meta.layers)
    value_heads = meta.number("ssm.time_step_rank")
    config = {
        "num_key_value_heads": max(meta.numbers("attention.head_count_kv", meta.layers)),
        "full_attention_interval": meta.number("full_attention_interval", 4),
        "linear_conv_kernel_dim": meta.number("ssm.conv_kernel"),
        "linear_key_head_dim": meta.number("ssm.state_size"),
        "linear_num_key_heads": meta.number("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": meta.number("ssm.inner_size") // max(value_heads, 1),
        "linear_value_heads_take_turns": True,
    }
    if recurrent is not None:
        config["layer_types"] = ["linear_attention" if one else "full_attention" for one in recurrent]
    return config


def _gemma3(meta: Metadata, heads: int) -> dict[str, Any]:
    pattern, head_dim = meta.stored("attention.sliding_window_pattern"), meta.number("attention.key_length", 256)
    scalar = (
        meta.number("embedding_length") // meta.positive("attention.head_count")
        if meta.layers == GEMMA3_27B_LAYERS
        else head_dim
    )
    config = {
        "num_key_value_heads": meta.number("attention.head_count_kv", heads),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": meta.number("attention.sliding_window"),
        "rope_local_base_freq": meta.number("rope.local.freq_base", meta.number("rope.freq_base_swa", 10000.0)),
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": meta.maybe("final_logit_softcapping"),
        "rope_theta": meta.number("rope.freq_base", 1e6),
    }
    flags = meta.flags("attention.sliding_window_pattern", meta.layers)
    if flags is not None:
        config["layer_types"] = _kinds(flags)
    elif isinstance(pattern, int) and not isinstance(pattern, bool):
        config["sliding_window_pattern"] = pattern
    return config


def _gemma_embedding(meta: Metadata, heads: int) -> dict[str, Any]:
    return {**_gemma3(meta, heads), "use_bidirectional_attention": True}


def _kinds(flags: list[bool]) -> list[str]:
    return ["sliding_attention" if one else "full_attention" for one in flags]


def _padding(meta: Metadata) -> int | None:
    """The token whose small embeddings stand in the places of media."""
    token = meta.general("tokenizer.ggml.padding_token_id")
    return token if isinstance(token, int) else None


def _gemma4(meta: Metadata, heads: int) -> dict[str, Any]:
    """Layers without a window have heads of their own size, and frequencies that are stored as a tensor."""
    layers = meta.layers
    windowed = meta.flags("attention.sliding_window_pattern", layers)
    if windowed is None or True not in windowed or False not in windowed:
        raise meta.broken("gemma4.attention.sliding_window_pattern must say which layers have a window")
    kv_heads, inner = (meta.numbers(key, layers) for key in ("attention.head_count_kv", "feed_forward_length"))
    divisors = meta.stored_numbers("rope_freqs.weight")
    full = [layer for layer in range(layers) if not windowed[layer]]
    own = layers - meta.number("attention.shared_kv_layers", 0)
    config = {
        "intermediate_size": inner[0],
        "use_double_wide_mlp": inner[-1] == 2 * inner[0],
        "num_key_value_heads": kv_heads[windowed.index(True)],
        "num_global_key_value_heads": kv_heads[full[0]],
        "attention_k_eq_v": any(f"blk.{one}.attn_v.weight" not in meta.tensors for one in full if one < own),
        "num_kv_shared_layers": layers - own,
        "head_dim": meta.number("attention.key_length_swa"),
        "global_head_dim": meta.number("attention.key_length"),
        "layer_types": _kinds(windowed),
        "sliding_window": meta.number("attention.sliding_window"),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": meta.maybe("final_logit_softcapping"),
        "hidden_size_per_layer_input": meta.number("embedding_length_per_layer_input", 0),
        "enable_moe_block": bool(meta.get("expert_count")),
        "top_k_experts": meta.number("expert_used_count") if meta.get("expert_count") else None,
        "pad_token_id": _padding(meta),
        "partial_rotary_factor": None,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": sum(one < UNROTATED for one in divisors) / len(divisors) if divisors else 1.0,
                "rope_theta": meta.number("rope.freq_base", 1e6),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": meta.number("rope.freq_base_swa", 1e4)},
        },
    }
    table = meta.tensors.get("per_layer_token_embd.weight")
    return config if table is None else {**config, "vocab_size_per_layer_input": table.shape[0]}


def _gemma(meta: Metadata, heads: int) -> dict[str, Any]:
    return {**_heads_and_window(meta, heads), "hidden_activation": "gelu_pytorch_tanh"}


def _glm4_dense(meta: Metadata, heads: int) -> dict[str, Any]:
    """GLM's text with axes alone, whose rows are paired by that."""
    if not isinstance(meta.stored("rope.dimension_sections"), np.ndarray):
        raise meta.broken("GLM-4's text models are not served, GLM-4.1V's and GLM-OCR's are")
    return _heads_and_window(meta, heads)


_OWN: Mapping[str, Callable[[Metadata, int], dict[str, Any]]] = {
    "gemma": _gemma,
    "glm4": _glm4_dense,
    "gemma3": _gemma3,
    "gemma-embedding": _gemma_embedding,
    "gemma4": _gemma4,
    "glm4moe": _glm4,
    "gpt-oss": _gpt_oss,
    "lfm2": _lfm2,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
}


def _rope_scaling(meta: Metadata) -> dict[str, Any]:
    """`rope_scaling`; frequencies that are stored as tensors are LongRoPE's, of one kind or two."""
    kind = meta.get("rope.scaling.type", "none")
    divisors = meta.stored_numbers("rope_freqs.weight")
    short, long = (meta.stored_numbers(f"rope_factors_{one}.weight") for one in ("short", "long"))
    if short and long:
        original = meta.number("rope.scaling.original_context_length", meta.number("context_length"))
        scaling = {"type": "longrope", "short_factor": short, "long_factor": long}
        scaling["original_max_position_embeddings"] = original
        if meta.has("rope.scaling.attn_factor"):
            scaling["attention_factor"] = meta.number("rope.scaling.attn_factor")
        return scaling
    if divisors:
        return {"type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return {} if factor == 1.0 else {"type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(meta, factor)
    if kind != "none":
        raise meta.broken(f"{meta.prefix}.rope.scaling.type {str(kind)[:80]!r} is not supported")
    return {}


def _yarn(meta: Metadata, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"type": "yarn", "factor": factor}
    for key, name in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if meta.has(f"rope.scaling.{key}"):
            scaling[name] = meta.number(f"rope.scaling.{key}")
    return scaling
