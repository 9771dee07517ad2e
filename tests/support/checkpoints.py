"""Tiny random checkpoints, made on the fly in the hub's layout and in the one that transformers saves today.

Every `make_*` writes a complete folder (weights, configs, tokenizer, chat template, for pictures the preprocessor too)
and returns transformers' own model in float32: the oracle. Weights are large enough that greedy decoding does not run
in circles, and no norm weight or bias keeps its neutral value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    WhisperConfig,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from support.tiny_tokenizers import id_of

Layout = Literal["hub", "transformers"]

CORPUS = """The chef prepared a delicious meal. What is shown in this image? A cat and a dog sit under the table.
Describe the picture in one sentence, then answer the question below. USER: ASSISTANT: user assistant system
You are a helpful assistant. Answer the questions. The colours of the flag are red, white and blue; its shape: square.
def main(argument): return [value for value in range(10) if value % 2 == 0]  # 0 1 2 3 4 5 6 7 8 9
Grüße aus Köln, où est la bibliothèque? 你好，世界。 Привет, мир! 日本語のテキスト 🙂 naïve café
"""
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA4_TEMPLATE = GEMMA_TEMPLATE.replace(
    "{% if part['type'] == 'image' %}<start_of_image>", "{% if part['type'] != 'text' %}<|{{ part['type'] }}|>"
)
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAVA_NEXT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_VL_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_OMNI_TEMPLATE = (
    QWEN2_VL_TEMPLATE.replace("vision_start", "vision_bos")
    .replace("vision_end", "vision_eos")
    .replace("<|image_pad|>", "<|IMAGE|>")
    .replace("<|video_pad|>", "<|VIDEO|>")
    .replace(
        "{% elif 'text' in part %}",
        "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% elif 'text' in part %}",
    )
)

GROWING = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
}
GEMMA_SPECIALS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
GEMMA4_SPECIALS = (
    *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|image>", "<|image|>", "<image|>", "<|video|>", "<|audio>", "<|audio|>", "<audio|>"),
)
LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PHI3_SPECIALS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
OMNI_SPECIALS = (
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
MINICPMV_SPECIALS = ("<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
VISION_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def make_llama(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Also Yi, Vicuna and Llama 3: `rope_parameters` and sizes are the options (any `LlamaConfig` argument)."""
    ids = write_tokenizer(path, layout, LLAMA_SPECIALS, LLAMA_TEMPLATE, bos="<s>", eos="</s>")
    return _text(path, layout, LlamaForCausalLM, LlamaConfig, ids, "<s>", "</s>", options)


def make_mistral(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    ids = write_tokenizer(path, layout, LLAMA_SPECIALS, LLAMA_TEMPLATE, bos="<s>", eos="</s>")
    options = {"sliding_window": 8, **options}
    return _text(path, layout, MistralForCausalLM, MistralConfig, ids, "<s>", "</s>", options)


def make_ministral3(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Queries grow at every eighth token."""
    ids = write_tokenizer(path, layout, LLAMA_SPECIALS, LLAMA_TEMPLATE, bos="<s>", eos="</s>")
    options = {"head_dim": 12, "rope_parameters": GROWING, **options}
    return _text(path, layout, Ministral3ForCausalLM, Ministral3Config, ids, "<s>", "</s>", options)


def make_lfm2(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Layers with a short convolution, and after every second one of them a layer that attends."""
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, bos="<|endoftext|>", eos="<|im_end|>")
    kinds = ["conv", "full_attention", "conv"]
    options = {
        "num_hidden_layers": 3,
        "layer_types": kinds,
        "intermediate_size": 80,
        "block_multiple_of": 16,
        **options,
    }
    return _text(path, layout, Lfm2ForCausalLM, Lfm2Config, ids, "<|endoftext|>", "<|im_end|>", options)


def make_qwen2(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    return _text(path, layout, Qwen2ForCausalLM, Qwen2Config, ids, "<|endoftext|>", "<|im_end|>", options)


def make_qwen3(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    options = {"head_dim": 16, **options}
    return _text(path, layout, Qwen3ForCausalLM, Qwen3Config, ids, "<|endoftext|>", "<|im_end|>", options)


def make_qwen3_moe(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Six experts, of which a token takes two; a layer without in the middle."""
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    shape = {"num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 6, "moe_intermediate_size": 20}
    options = {"head_dim": 16, **shape, "num_experts_per_tok": 2, "norm_topk_prob": True, **options}
    return _text(path, layout, Qwen3MoeForCausalLM, Qwen3MoeConfig, ids, "<|endoftext|>", "<|im_end|>", options)


def make_qwen2_moe(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """With an expert that all tokens take."""
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    shape = {"num_experts": 5, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}
    options = {**shape, "num_experts_per_tok": 3, **options}
    return _text(path, layout, Qwen2MoeForCausalLM, Qwen2MoeConfig, ids, "<|endoftext|>", "<|im_end|>", options)


def make_mixtral(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    ids = write_tokenizer(path, layout, LLAMA_SPECIALS, LLAMA_TEMPLATE, bos="<s>", eos="</s>")
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, **options}
    return _text(path, layout, MixtralForCausalLM, MixtralConfig, ids, "<s>", "</s>", options)


def make_olmoe(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    options = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 20, **options}
    return _text(path, layout, OlmoeForCausalLM, OlmoeConfig, ids, "<|endoftext|>", "<|im_end|>", options)


def make_gpt_oss(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Square experts, as the published ones are; a window of six tokens in every second layer; YaRN."""
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    options = {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        **options,
    }
    return _text(path, layout, GptOssForCausalLM, GptOssConfig, ids, "<|endoftext|>", "<|im_end|>", options)


def make_glm4_moe(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Eight experts in four groups; a layer without in front."""
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, eos="<|im_end|>")
    routing = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2}
    options = {
        **{"num_hidden_layers": 3, "head_dim": 16, "moe_intermediate_size": 20, "routed_scaling_factor": 1.7},
        **{"use_qk_norm": True, "attention_bias": True, **routing, **options},
    }
    return _text(path, layout, Glm4MoeForCausalLM, Glm4MoeConfig, ids, "<|endoftext|>", "<|im_end|>", options)


def make_phi3(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """With LongRoPE: sequences of more than 64 tokens take the long factors."""
    ids = write_tokenizer(path, layout, PHI3_SPECIALS, PHI3_TEMPLATE, bos="<s>", eos="<|endoftext|>")
    options = {
        "original_max_position_embeddings": 64,
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [1.1, 2.5, 9.0, 20.0],
            "original_max_position_embeddings": 64,
        },
        **options,
    }
    return _text(path, layout, Phi3ForCausalLM, Phi3Config, ids, "<s>", "<|endoftext|>", options)


def make_gemma(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """One head of keys and values, as in the small one."""
    ids = write_tokenizer(path, layout, GEMMA_SPECIALS, GEMMA_TEMPLATE, bos="<bos>", eos="<eos>")
    options = {"pad_token_id": ids["<pad>"], "head_dim": 16, "num_key_value_heads": 1, **options}
    options = {"tie_word_embeddings": False, **options}  # a tied head would only repeat the last token
    return _text(path, layout, GemmaForCausalLM, GemmaConfig, ids, "<bos>", "<eos>", options)


def make_gemma3_text(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Layers that see six tokens and, every second one, that see all."""
    ids = write_tokenizer(path, layout, GEMMA_SPECIALS, GEMMA_TEMPLATE, bos="<bos>", eos="<eos>")
    options = {"pad_token_id": ids["<pad>"], **_gemma3_shape(), **options}
    return _text(path, layout, Gemma3ForCausalLM, Gemma3TextConfig, ids, "<bos>", "<eos>", options)


def _gemma3_shape() -> dict[str, Any]:
    return {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }


def make_gemma3(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Images of 30 pixels in patches of 7, of which four are averaged: four rows each, of which the
    window of most layers reaches three."""
    ids = write_tokenizer(path, layout, GEMMA_SPECIALS, GEMMA_TEMPLATE, bos="<bos>", eos="<eos>")
    write_options, options = _write_options(options)
    config = Gemma3Config(
        text_config={
            **_shape(ids, {**_gemma3_shape(), "sliding_window": 3, **(text or {})}),
            "pad_token_id": ids["<pad>"],
        },
        vision_config=_clip({"model_type": "siglip_vision_model", "image_size": 30, "patch_size": 7, **(vision or {})}),
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        **{"mm_tokens_per_image": 4, **options},
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "size": _square(30),
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "do_pan_and_scan": None,
            "pan_and_scan_min_crop_size": None,
            **(preprocessor or {}),
        },
    )
    return _write(path, layout, Gemma3ForConditionalGeneration(config), ids["<bos>"], ids["<eos>"], **write_options)


def make_gemma4_text(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Layers with a window and, of another shape, such that see all, in turn; the last two read the others' keys."""
    ids = write_tokenizer(path, layout, GEMMA4_SPECIALS, GEMMA4_TEMPLATE, bos="<bos>", eos="<eos>")
    options = {"pad_token_id": ids["<pad>"], **_gemma4_shape(ids), **options}
    return _text(path, layout, Gemma4ForCausalLM, Gemma4TextConfig, ids, "<bos>", "<eos>", options)


def _gemma4_shape(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "sliding_window": 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": (max(ids.values()) // 16 + 2) * 16,
        "final_logit_softcapping": 5.0,
    }


GEMMA4_AUDIO = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 24},
    **{"subsampling_conv_channels": [8, 6], "attention_chunk_size": 3, "attention_context_left": 4},
}


def make_gemma4(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    audio: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Patches of two pixels, four of which are a row; bounds of the towers' linear layers; other layers than the
    published ones' kinds see images both ways. Eight mel bins, of which two are left."""
    ids = write_tokenizer(path, layout, GEMMA4_SPECIALS, GEMMA4_TEMPLATE, bos="<bos>", eos="<eos>")
    write_options, options = _write_options(options)
    shape = {**_gemma4_shape(ids), "sliding_window": 30, "use_bidirectional_attention": "vision", **(text or {})}
    config = Gemma4Config(
        text_config={**_shape(ids, shape), "pad_token_id": ids["<pad>"]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 300,
            "use_clipped_linears": True,
            "standardize": True,
            **(vision or {}),
        },
        audio_config={**GEMMA4_AUDIO, **(audio or {})},
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        boi_token_id=ids["<|image>"],
        image_token_id=ids["<|image|>"],
        eoi_token_id=ids["<image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        **options,
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "max_soft_tokens": 70,
            **(preprocessor or {}),
        },
    )
    _write_json(path / "processor_config.json", {"feature_extractor": {"feature_size": 8}})
    return _write(path, layout, Gemma4ForConditionalGeneration(config), ids["<bos>"], ids["<eos>"], **write_options)


def make_llava(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """LLaVA-1.5: pictures of 28 pixels in patches of 14, four rows each."""
    ids = write_tokenizer(path, layout, (*LLAMA_SPECIALS, "<image>", "<pad>"), LLAVA_TEMPLATE, bos="<s>", eos="</s>")
    write_options, options = _write_options(options)
    config = LlavaConfig(
        text_config=LlamaConfig(**_shape(ids, text or {})).to_dict(),
        vision_config=_clip(vision or {}),
        image_token_index=ids["<image>"],
        projector_hidden_act="gelu",
        image_seq_length=4,
        **options,
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "crop_size": _square(28),
            "size": {"shortest_edge": 28},
            **_clip_preprocessor(),
            **(preprocessor or {}),
        },
    )
    model = LlavaForConditionalGeneration(config)
    return _write(path, layout, model, ids["<s>"], ids["</s>"], **write_options)


def make_llava_next(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """LLaVA-NeXT: anyres over tiles of 28 pixels."""
    ids = write_tokenizer(path, layout, ("<unk>", *CHATML_SPECIALS, "<image>"), LLAVA_NEXT_TEMPLATE, eos="<|im_end|>")
    write_options, options = _write_options(options)
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    config = LlavaNextConfig(
        text_config=LlamaConfig(**_shape(ids, {"rope_theta": 5e6, **(text or {})})).to_dict(),
        vision_config=_clip(vision or {}),
        image_token_index=ids["<image>"],
        projector_hidden_act="gelu",
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
        **options,
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "aspect_ratio_setting": "anyres",
            "crop_size": _square(28),
            "size": {"shortest_edge": 28},
            "image_grid_pinpoints": pinpoints,
            **_clip_preprocessor(),
            **(preprocessor or {}),
        },
    )
    model = LlavaNextForConditionalGeneration(config)
    return _write(path, layout, model, ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)


def make_qwen2_vl(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.1, **(vision or {})}
    return _make_qwen_vl(
        path,
        layout,
        (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, **(text or {})},
        {**vision, "hidden_size": (text or {}).get("hidden_size", 64)},
        preprocessor,
        options,
    )


def make_qwen2_5_vl(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Windows of 56 pixels (two blocks)."""
    return _make_qwen_vl(
        path,
        layout,
        (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, **(text or {})},
        {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 52,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "out_hidden_size": (text or {}).get("hidden_size", 64),
            **(vision or {}),
        },
        preprocessor,
        options,
    )


QWEN3_PREPROCESSOR = {
    "size": {"shortest_edge": 4096, "longest_edge": 16777216},
    "min_pixels": None,
    "max_pixels": None,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def _qwen3_vision(text: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_heads": 2,
        "patch_size": 16,
        "num_position_embeddings": 25,
        "out_hidden_size": (text or {}).get("hidden_size", 64),
        "initializer_range": 0.1,
    }


def make_qwen3_vl(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    video: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A table of 5 x 5 positions; two layers of the tower give rows to the decoder's first two of three. With experts
    in `text` it is the family's mixture."""
    if video is not None:
        path.mkdir(parents=True, exist_ok=True)
        _write_json(path / "video_preprocessor_config.json", video)
    return _make_qwen_vl(
        path,
        layout,
        (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        if "num_experts" in (text or {})
        else (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "rope_scaling": {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True},
            **(text or {}),
        },
        {**_qwen3_vision(text), "depth": 3, "deepstack_visual_indexes": [0, 2], **(vision or {})},
        {**QWEN3_PREPROCESSOR, **(preprocessor or {})},
        options,
    )


def _qwen3_5_shape() -> dict[str, Any]:
    return {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    }


def make_qwen3_5_text(path: Path, layout: Layout = "hub", **options: Any) -> PreTrainedModel:
    """Two layers with a gated delta net, and one whose attention has a gate."""
    ids = write_tokenizer(path, layout, CHATML_SPECIALS, CHATML_TEMPLATE, bos="<|endoftext|>", eos="<|im_end|>")
    options = {**_qwen3_5_shape(), **options}
    return _text(path, layout, Qwen3_5ForCausalLM, Qwen3_5TextConfig, ids, "<|endoftext|>", "<|im_end|>", options)


def make_qwen3_5(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Qwen3-VL's tower, whose rows reach no inner layer. With experts in `text` it is the family's mixture."""
    return _make_qwen_vl(
        path,
        layout,
        (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration)
        if "num_experts" in (text or {})
        else (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
        {**_qwen3_5_shape(), **(text or {})},
        {**_qwen3_vision(text), "depth": 2, **(vision or {})},
        {**QWEN3_PREPROCESSOR, **(preprocessor or {})},
        options,
    )


def make_qwen3_5_moe(
    path: Path, layout: Layout = "hub", *, text: dict[str, Any] | None = None, **options: Any
) -> PreTrainedModel:
    shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    return make_qwen3_5(path, layout, text={**shape, "shared_expert_intermediate_size": 28, **(text or {})}, **options)


def make_qwen3_vl_moe(
    path: Path, layout: Layout = "hub", *, text: dict[str, Any] | None = None, **options: Any
) -> PreTrainedModel:
    """Its experts are published with the inputs first."""
    shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    return make_qwen3_vl(path, layout, text={**shape, **(text or {})}, **options)


def _make_qwen_vl(
    path: Path,
    layout: Layout,
    classes: tuple[Any, Any],
    text: dict[str, Any],
    vision: dict[str, Any],
    preprocessor: dict[str, Any] | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    """What the generations of Qwen-VL have in common; `classes` are transformers' of config and model."""
    ids = write_tokenizer(path, layout, (*CHATML_SPECIALS, *VISION_SPECIALS), QWEN2_VL_TEMPLATE, eos="<|im_end|>")
    write_options, options = _write_options(options)
    shape = _shape(ids, {"hidden_size": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-6, **text})
    config = classes[0](
        text_config={**shape, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        vision_config={"in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        **{"tie_word_embeddings": True, **options},
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": classes[1].__name__.replace("ForConditionalGeneration", "Processor"),
            "patch_size": vision.get("patch_size", 14),
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            **(preprocessor or {}),
        },
    )
    return _write(path, layout, classes[1](config), ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)


def make_qwen2_omni(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    audio: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    video: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Qwen2.5-Omni's thinker. Windows of 56 pixels (two blocks); the hub's layout has a talker's tensors beside it."""
    ids = write_tokenizer(path, layout, (*CHATML_SPECIALS, *OMNI_SPECIALS), QWEN2_OMNI_TEMPLATE, eos="<|im_end|>")
    write_options, options = _write_options(options)
    shape = _shape(
        ids,
        {
            "hidden_size": 64,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            **(text or {}),
        },
    )
    size = shape["hidden_size"]
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            **shape,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 52,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": size,
            **(vision or {}),
        },
        audio_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 128,
            "output_dim": size,
            **(audio or {}),
        },
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        **options,
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5OmniProcessor",
            "patch_size": 14,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 128,
            "sampling_rate": 16000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": 300,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            **(preprocessor or {}),
        },
    )
    if video is not None:
        _write_json(path / "video_preprocessor_config.json", video)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    return _write(path, layout, model, ids["<|endoftext|>"], ids["<|im_end|>"], **write_options)


@dataclass(frozen=True)
class Parts:
    """A family that transformers does not have: its models there, and tensors of its own by name."""

    text: PreTrainedModel
    vision: PreTrainedModel
    own: dict[str, torch.Tensor]


def make_phi3_v(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    describes_tower: bool = True,
    **options: Any,
) -> Parts:
    """Phi-3.5-vision: tiles of 56 pixels, four rows each. Sequences of more than 128 tokens take the long factors.

    The published config.json does not describe the tower, which must then be CLIP's of 336 pixels.
    """
    ids = write_tokenizer(path, layout, (*PHI3_SPECIALS, "<|image|>"), PHI3_TEMPLATE, bos="<s>", eos="<|endoftext|>")
    write_options, options = _write_options(options)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [1.1, 2.5, 9.0, 20.0],
        "original_max_position_embeddings": 128,
    }
    language = Phi3ForCausalLM(
        Phi3Config(
            **_shape(
                ids,
                {
                    "max_position_embeddings": 1024,
                    "original_max_position_embeddings": 128,
                    "rope_parameters": rope,
                    "num_key_value_heads": 4,
                    "bos_token_id": ids["<s>"],
                    "eos_token_id": ids["</s>"],
                    "pad_token_id": ids["<|endoftext|>"],
                    **(text or {}),
                },
            )
        )
    )
    size = 56 if describes_tower else 336
    tower = CLIPVisionModel(CLIPVisionConfig(**_clip({"image_size": size, **(vision or {})})))
    block, hidden = 4 * tower.config.hidden_size, language.config.hidden_size
    own = _noise(
        {
            "glb_GN": (1, 1, block),
            "sub_GN": (1, 1, 1, block),
            "img_projection.0.weight": (hidden, block),
            "img_projection.0.bias": (hidden,),
            "img_projection.2.weight": (hidden, hidden),
            "img_projection.2.bias": (hidden,),
        }
    )
    embedding = "model.vision_embed_tokens"
    parts = _write_parts(
        path,
        Parts(language, tower, own),
        {"text": "", "vision": f"{embedding}.img_processor.vision_model.", "own": f"{embedding}."},
        **write_options,
    )
    images: dict[str, Any] = {
        "image_dim_out": block // 4,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    }
    if describes_tower:
        images["vision_config"] = _clip({"image_size": size, **(vision or {})})
    _write_parts_config(
        path,
        language,
        {
            "architectures": ["Phi3VForCausalLM"],
            "model_type": "phi3_v",
            "img_processor": images,
            "embd_layer": {
                "embedding_cls": "image",
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
            "torch_dtype": write_options.get("dtype", "float32"),
            **options,
        },
    )
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "Phi3VImageProcessor",
            "processor_class": "Phi3VProcessor",
            "num_crops": 4,
            "num_img_tokens": 144,
            "do_convert_rgb": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            **(preprocessor or {}),
        },
    )
    return parts


def make_minicpmv(
    path: Path,
    layout: Layout = "hub",
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    **options: Any,
) -> Parts:
    """MiniCPM-V 2.6: slices of about 56 x 56 pixels, four rows each, and a table of ten by ten positions."""
    ids = write_tokenizer(path, layout, (*CHATML_SPECIALS, *MINICPMV_SPECIALS), CHATML_TEMPLATE, eos="<|im_end|>")
    write_options, options = _write_options(options)
    version = options.pop("version", 2.6)
    decoder, shape = {
        2.6: (Qwen2ForCausalLM, Qwen2Config),
        4.0: (LlamaForCausalLM, LlamaConfig),
        4.5: (Qwen3ForCausalLM, Qwen3Config),
    }[version]
    language = decoder(
        shape(
            **_shape(
                ids,
                {
                    "hidden_size": 256,
                    "head_dim": 64,
                    "rope_theta": 1e6,
                    "rms_norm_eps": 1e-6,
                    "tie_word_embeddings": False,
                    "max_position_embeddings": 2048,
                    "bos_token_id": ids["<|endoftext|>"],
                    "eos_token_id": ids["<|im_end|>"],
                    **(text or {}),
                },
            )
        )
    )
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 140,
        "patch_size": 14,
        **(vision or {}),
    }
    tower = Idefics2VisionTransformer(Idefics2VisionConfig(**shape))
    size = language.config.hidden_size
    norms = [f"{norm}.{name}" for norm in ("ln_q", "ln_kv", "ln_post") for name in ("weight", "bias")]
    own = _noise(
        {
            "query": (4, size),
            "kv_proj.weight": (size, shape["hidden_size"]),
            "proj": (size, size),
            "attn.in_proj_weight": (3 * size, size),
            "attn.in_proj_bias": (3 * size,),
            "attn.out_proj.weight": (size, size),
            "attn.out_proj.bias": (size,),
            **dict.fromkeys(norms, (size,)),
        }
    )
    parts = _write_parts(
        path, Parts(language, tower, own), {"text": "llm.", "vision": "vpm.", "own": "resampler."}, **write_options
    )
    slices = {"max_slice_nums": 9, "scale_resolution": 56, "patch_size": 14, "model_type": "minicpmv"}
    _write_parts_config(
        path,
        language,
        {
            "architectures": ["MiniCPMV"],
            "model_type": "minicpmv",
            "version": version,
            "batch_vision_input": True,
            "drop_vision_last_layer": False,
            "image_size": 56,
            "patch_size": 14,
            "query_num": 4,
            "slice_mode": True,
            "slice_config": slices,
            "use_image_id": True,
            "vision_batch_size": 16,
            "vision_config": {"model_type": "siglip_vision_model", **shape},
            "torch_dtype": write_options.get("dtype", "float32"),
            **options,
        },
    )
    names = {
        "im_start": "image",
        "im_end": "/image",
        "slice_start": "slice",
        "slice_end": "/slice",
        "unk": "unk",
        "im_id_start": "image_id",
        "im_id_end": "/image_id",
    }
    _write_json(
        path / "preprocessor_config.json",
        {
            "image_processor_type": "MiniCPMVImageProcessor",
            "processor_class": "MiniCPMVProcessor",
            "version": 2.6,
            "max_slice_nums": 9,
            "scale_resolution": 56,
            "patch_size": 14,
            "use_image_id": True,
            "image_feature_size": 4,
            "slice_mode": True,
            "norm_mean": [0.5] * 3,
            "norm_std": [0.5] * 3,
            **{name: f"<{token}>" for name, token in names.items()},
            **(preprocessor or {}),
        },
    )
    return parts


def make_ultravox(
    path: Path, *, audio: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any
) -> Parts:
    """Ultravox v0.5: `path` has the tower and the projector, `path/language` the language model's own repository.

    Chunks of 100 mel frames; `Parts.vision` is Whisper's encoder.
    """
    language = make_llama(path / "language", **(text or {}))
    ids = write_tokenizer(path, "hub", LLAMA_SPECIALS, LLAMA_TEMPLATE, bos="<s>", eos="</s>")
    shape = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 128,
        "max_source_positions": 50,
        **(audio or {}),
    }
    tower = WhisperEncoder(WhisperConfig(**shape))
    inner, stack, size = 64, 8, language.config.hidden_size
    own = _noise(
        {
            "ln_pre.weight": (32 * stack,),
            "linear_1.weight": (inner, 32 * stack),
            "ln_mid.weight": (inner // 2,),
            "linear_2.weight": (size, inner // 2),
        }
    )
    _randomise(tower, 0)
    parts = Parts(language, tower.eval(), own)
    write_weights(
        path,
        {
            **{f"audio_tower.{key}": value for key, value in tower.state_dict().items()},
            **{f"multi_modal_projector.{key}": value for key, value in own.items()},
        },
    )
    _write_json(
        path / "config.json",
        {
            "architectures": ["UltravoxModel"],
            "model_type": "ultravox",
            "audio_model_id": None,
            "audio_config": shape,
            "text_model_id": str(path / "language"),
            "hidden_size": inner,
            "stack_factor": stack,
            "projector_act": "swiglu",
            "projector_ln_mid": True,
            "ignore_index": -100,
            "vocab_size": language.config.vocab_size,
            "audio_token_index": language.config.vocab_size,
            "torch_dtype": "float32",
            **options,
        },
    )
    _write_json(path / "generation_config.json", {"bos_token_id": ids["<s>"], "eos_token_id": [ids["</s>"]]})
    _write_json(
        path / "preprocessor_config.json", {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}
    )
    return parts


def write_tokenizer(
    path: Path, layout: Layout, specials: tuple[str, ...], template: str, *, eos: str, bos: str | None = None
) -> dict[str, int]:
    """A byte-level BPE of some 400 tokens and a chat template -> ids of the special tokens. `bos` precedes texts."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    ids = {token: id_of(tokenizer, token) for token in specials}
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bos is not None,
    }
    if bos is not None:
        config["bos_token"] = bos
    if layout == "hub":
        config["chat_template"] = template
        config["added_tokens_decoder"] = {
            str(i): {
                "content": token,
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
            for token, i in ids.items()
        }
    else:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(path / "tokenizer_config.json", config)
    return ids


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a written checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def write_weights(path: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, pickled: bool = False) -> None:
    """Replace a checkpoint's weights: in one file or sharded with an index, as safetensors or as torch files."""
    for old in [*path.glob("*.safetensors*"), *path.glob("*.bin*")]:
        old.unlink()
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = [f"{stem}.{suffix}"]
    if shards > 1:
        names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    weight_map = {key: names[i * shards // len(tensors)] for i, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key].contiguous() for key, file in weight_map.items() if file == name}
        if pickled:
            torch.save(part, path / name)
        else:
            save_file(part, path / name, metadata={"format": "pt"})
    if shards > 1:
        _write_json(path / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def _text(
    path: Path,
    layout: Layout,
    model_class: Any,
    config_class: Any,
    ids: dict[str, int],
    bos: str,
    eos: str,
    options: dict[str, Any],
) -> PreTrainedModel:
    write_options, shape = _write_options(options)
    config = config_class(**{"bos_token_id": ids[bos], "eos_token_id": ids[eos], **_shape(ids, shape)})
    return _write(path, layout, model_class(config), ids[bos], ids[eos], **write_options)


def _write_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("dtype", "shards", "pickled", "seed")
    return ({k: v for k, v in options.items() if k in names}, {k: v for k, v in options.items() if k not in names})


def _shape(ids: dict[str, int], shape: dict[str, Any]) -> dict[str, Any]:
    padded = (max(ids.values()) // 16 + 2) * 16  # rows that no token has, as in published checkpoints
    return {
        "vocab_size": padded,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **shape,
    }


def _clip(vision: dict[str, Any]) -> dict[str, Any]:
    if vision.get("model_type") == "siglip_vision_model":
        return SiglipVisionConfig(
            **{
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                **vision,
            }
        ).to_dict()
    return CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 16,
            "hidden_act": "quick_gelu",
            **vision,
        }
    ).to_dict()


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _clip_preprocessor() -> dict[str, Any]:
    return {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def _write(
    path: Path,
    layout: Layout,
    model: PreTrainedModel,
    bos: int,
    eos: int,
    *,
    dtype: str = "float32",
    shards: int = 1,
    pickled: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Fill the model with random weights, save it, and rewrite what was saved if the hub's layout is wanted."""
    _randomise(model, seed)
    stored = getattr(torch, dtype)
    model.to(stored).to(torch.float32)  # the oracle has the rounded weights
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos)
    model.to(stored).save_pretrained(path)
    tensors = read_weights(path)
    if layout == "hub":
        config = json.loads((path / "config.json").read_text())
        _write_json(path / "config.json", _hub_config(config))
        tensors = {_hub_key(key): tensor for key, tensor in tensors.items()}
        if config["model_type"] == "qwen3_vl_moe":
            tensors = {k: t.transpose(1, 2) if ".mlp.experts." in k else t for k, t in tensors.items()}
        if config["model_type"] == "qwen2_5_omni_thinker":
            tensors = {f"thinker.{key}": tensor for key, tensor in tensors.items()}
            tensors |= {f"{part}.embed.weight": torch.zeros(2, 2) for part in ("talker", "token2wav")}
        write_weights(path, tensors, shards=shards, pickled=pickled)
    elif shards > 1 or pickled:
        write_weights(path, tensors, shards=shards, pickled=pickled)
    return model.to(torch.float32).eval()


def _write_parts(
    path: Path,
    parts: Parts,
    prefixes: dict[str, str],
    *,
    dtype: str = "float32",
    shards: int = 1,
    pickled: bool = False,
    seed: int = 0,
) -> Parts:
    """Random weights for every part, stored under the part's prefix."""
    stored = getattr(torch, dtype)
    for part in (parts.text, parts.vision):
        _randomise(part, seed)
        part.to(stored).to(torch.float32).eval()
    parts = replace(parts, own={key: tensor.to(stored).to(torch.float32) for key, tensor in parts.own.items()})
    tensors = {f"{prefixes['text']}{key}": tensor for key, tensor in parts.text.state_dict().items()}
    for key, tensor in parts.vision.state_dict().items():
        tensors[prefixes["vision"] + key.removeprefix("vision_model.")] = tensor
    tensors |= {f"{prefixes['own']}{key}": tensor for key, tensor in parts.own.items()}
    write_weights(path, {key: tensor.to(stored) for key, tensor in tensors.items()}, shards=shards, pickled=pickled)
    return parts


def _write_parts_config(path: Path, text: PreTrainedModel, config: dict[str, Any]) -> None:
    """config.json as the hub has it: the decoder's keys flat beside the family's own."""
    _write_json(path / "config.json", {**_old_names(text.config.to_dict()), **config})
    _write_json(
        path / "generation_config.json",
        {"bos_token_id": text.config.bos_token_id, "eos_token_id": text.config.eos_token_id},
    )


def _noise(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = key.startswith("ln_") and key.endswith("weight")
        made[key] = 1 + _evenly(noise) if is_norm else noise * (0.2 if len(shape) == 1 else 1.2 / shape[-1] ** 0.5)
    return made


def _evenly(noise: torch.Tensor) -> torch.Tensor:
    """Of a normal distribution -> evenly in -0.5 … 0.5, so that norms differ from one and zero by much."""
    return torch.erf(noise / 2**0.5) / 2


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    tied = head is not None and model.get_input_embeddings().weight is head.weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name):
            kind = model.config.model_type
            is_around_zero = ("gemma3" in kind or kind in ("gemma", "colpali")) and "vision_tower" not in name
            if "qwen3_5" in model.config.model_type:
                is_around_zero = "visual" not in name and "linear_attn" not in name
            parameter.copy_((0 if is_around_zero else 1) + _evenly(noise))
            if "gemma4" in model.config.model_type and ("q_norm" in name or "k_norm" in name):
                parameter.mul_(0.35)  # scores have no other scale: larger ones would only magnify rounding
        elif "embed_tokens" in name:
            parameter.copy_(noise * (0.1 if tied else 1.0))  # a tied head would only repeat the last token
        elif parameter.dim() < 2:
            parameter.copy_(0.2 * noise)
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(noise * 1.2 / fan_in**0.5)
            if ".experts." in name and model.config.model_type == "gpt_oss":
                factor = 3 if "gate_up" in name else 0.3  # so that some gates are clamped
                parameter.mul_(factor * (fan_in**0.25 if parameter.dim() > 2 else 1))
    for name, buffer in model.named_buffers():  # Gemma 4 stores some
        if name.endswith(("_min", "_max")):
            buffer.fill_(-1.5 if name.endswith("_min") else 1.2)
        elif name.endswith(("layer_scalar", "std_scale")):
            buffer.copy_(0.8 + 0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("std_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


def _hub_key(key: str) -> str:
    is_clip = key.startswith(("vision_tower.e", "vision_tower.p")) and "patch_conv" not in key
    return key.replace("vision_tower.", "vision_tower.vision_model.", 1) if is_clip else key


def _hub_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's config.json -> the dialect of published repositories."""
    config = _old_names(config)
    if config["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
        text = config.pop("text_config")
        vision = config.pop("vision_config")
        vision = {"in_chans" if k == "in_channels" else k: v for k, v in vision.items()}
        vision["spatial_patch_size"] = vision["patch_size"]
        vision["model_type"] = config["model_type"]
        vision.pop("rope_scaling", None)
        vision.pop("rope_theta", None)
        return {**text, **config, "vision_config": vision}
    if config["model_type"] == "qwen2_5_omni_thinker":
        return {
            "architectures": ["Qwen2_5OmniModel"],
            "model_type": "qwen2_5_omni",
            "enable_audio_output": True,
            "talker_config": {"hidden_size": 2},
            "torch_dtype": config["torch_dtype"],
            "thinker_config": {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")},
        }
    if config["model_type"] == "qwen2_audio":  # published ones say little
        config["text_config"] = _without_defaults(config["text_config"], _old_names(Qwen2Config().to_dict()))
    if "audio_config" in config and "vision_config" not in config:
        return config
    if config["model_type"] == "gemma4" or config.get("vision_config", {}).get("model_type") == "pixtral":
        return config
    if config["model_type"] == "lfm2":
        kinds = config.pop("layer_types")
        config["full_attn_idxs"] = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        config["block_ff_dim"] = config.pop("intermediate_size")
        config["intermediate_size"] = 7  # which is not read
        config["tie_embedding"] = config.pop("tie_word_embeddings")
        return config
    if config["model_type"] == "gemma3":  # published ones say little
        for part, made in (("text_config", Gemma3TextConfig()), ("vision_config", SiglipVisionConfig())):
            config[part] = _without_defaults(config[part], _old_names(made.to_dict()))
        return config
    if "text_config" in config:  # what equals Llama's defaults is left out
        config["text_config"] = _without_defaults(config["text_config"], _old_names(LlamaConfig().to_dict()))
        is_clip = config["vision_config"]["model_type"] == "clip_vision_model"
        defaults = (CLIPVisionConfig() if is_clip else SiglipVisionConfig()).to_dict()
        config["vision_config"] = _without_defaults(config["vision_config"], defaults)
        config.pop("image_seq_length", None)
        if config["model_type"] == "llava_next":
            config["use_image_newline_parameter"] = True
    return config


def _old_names(config: dict[str, Any]) -> dict[str, Any]:
    config = {
        key: _old_names(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
    }
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if config.get("model_type") == "gemma4_text":  # the hub says the shape of layers without a window once
        own = next(iter(config.pop("per_layer_config").values()))
        config["global_head_dim"] = own["head_dim"]
        config["num_global_key_value_heads"] = own.get("num_key_value_heads")
        return config
    rope = config.pop("rope_parameters", None)
    if rope is not None and "full_attention" in rope:  # Gemma 3
        full, local = rope["full_attention"], rope["sliding_attention"]
        scaling = {key: value for key, value in full.items() if key != "rope_theta"}
        config["rope_theta"], config["rope_local_base_freq"] = full["rope_theta"], local["rope_theta"]
        config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        config["sliding_window_pattern"] = config.pop("layer_types").index("full_attention") + 1
    elif rope is not None:
        rope = dict(rope)
        config["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.pop("rope_type", "default")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if "mrope_interleaved" in rope:
            rope["rope_type"] = kind
        elif "mrope_section" in rope:
            rope = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        elif kind == "longrope":
            rope = {"type": "su", **{k: v for k, v in rope.items() if k != "original_max_position_embeddings"}}
        elif kind != "default":
            rope["rope_type"] = kind
        config["rope_scaling"] = rope if kind != "default" or "mrope_section" in rope else None
    return config


def _without_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    kept = ("model_type", "vocab_size")
    return {k: v for k, v in config.items() if k in kept or k not in defaults or defaults[k] != v}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
