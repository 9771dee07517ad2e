"""Makers of tiny checkpoints, one for every decoder class of the registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

MAKERS: Mapping[str, str] = {
    "MistralForCausalLM": "mistral",
    "Ministral3ForCausalLM": "ministral3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
    "Lfm2ForCausalLM": "lfm2",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Gemma4ForCausalLM": "gemma4_text",
    "Gemma4ForConditionalGeneration": "gemma4",
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "Mistral3ForConditionalGeneration": "pixtral.mistral3",
    "PixtralForConditionalGeneration": "pixtral.pixtral",
    "InternVLForConditionalGeneration": "internvl.internvl",
    "SmolVLMForConditionalGeneration": "smolvlm.smolvlm",
    "Idefics3ForConditionalGeneration": "smolvlm.idefics3",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision.llava_onevision",
    "Glm4vForConditionalGeneration": "glm4v.glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v.glm4v_moe",
    "GlmOcrForConditionalGeneration": "glm4v.glm_ocr",
    "PaddleOCRVLForConditionalGeneration": "paddleocr_vl.paddleocr_vl",
    "Lfm2VlForConditionalGeneration": "lfm2_vl.lfm2_vl",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen2_5OmniThinkerForConditionalGeneration": "qwen2_omni",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "speech.qwen3_omni",
    "Phi3VForCausalLM": "phi3_v",
    "MiniCPMV": "minicpmv",
    "UltravoxModel": "ultravox",
    "Qwen2AudioForConditionalGeneration": "speech.qwen2_audio",
    "VoxtralForConditionalGeneration": "speech.voxtral",
    "Qwen3ASRForConditionalGeneration": "speech.qwen3_asr",
}
"""`make_*` of `support.checkpoints`, or of the module that is named."""


def maker_of(family: str) -> Callable[..., Any]:
    """By a value of `MAKERS`."""
    module, _, name = family.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"support.{module or 'checkpoints'}"), f"make_{name}")
    return found
