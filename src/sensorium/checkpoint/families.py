"""Architecture name -> family: a literal table. Adding a model is a row here, a processor file and a model file.

Torch-free: classes are named by string and imported by whoever needs them (`load_class`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from sensorium.types import Modality


@dataclass(frozen=True, slots=True)
class Family:
    """`model` and `processor` are "module:Class". `title` and `modalities` make the generated table of models."""

    title: str
    model: str
    processor: str
    modalities: tuple[Modality, ...] = ()
    tasks: tuple[str, ...] = ("generate", "embed")
    is_encoder: bool = False  # no decoder, no KV cache


_DECODER = "sensorium.models.decoder:DecoderForCausalLM"
_TEXT = "sensorium.processors.base:Processor"
_QWEN_OMNI = Family(
    "Qwen2.5-Omni (thinker)",
    "sensorium.models.qwen2_omni:Qwen2Omni",
    "sensorium.processors.qwen2_omni:Qwen2OmniProcessor",
    ("image", "video", "audio"),
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("Llama 2/3, Yi, Vicuna", _DECODER, _TEXT),
    "MistralForCausalLM": Family("Mistral", _DECODER, _TEXT),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", _DECODER, _TEXT),
    "Qwen3ForCausalLM": Family("Qwen3", _DECODER, _TEXT),
    "Phi3ForCausalLM": Family("Phi-3, Phi-3.5", _DECODER, _TEXT),
    **dict.fromkeys(
        ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Phi3Model"),
        Family(
            "Llama, Mistral, Qwen2, Qwen3, Phi-3 without a head (E5-Mistral, Qwen3-Embedding, …)",
            "sensorium.models.decoder:DecoderModel",
            _TEXT,
            tasks=("embed",),
        ),
    ),
    "LlavaForConditionalGeneration": Family(
        "LLaVA-1.5", "sensorium.models.llava:Llava", "sensorium.processors.llava:LlavaProcessor", ("image",)
    ),
    "LlavaNextForConditionalGeneration": Family(
        "LLaVA-NeXT (v1.6)",
        "sensorium.models.llava:LlavaNext",
        "sensorium.processors.llava_next:LlavaNextProcessor",
        ("image",),
    ),
    "UltravoxModel": Family(
        "Ultravox v0.5",
        "sensorium.models.ultravox:Ultravox",
        "sensorium.processors.ultravox:UltravoxProcessor",
        ("audio",),
    ),
    "Phi3VForCausalLM": Family(
        "Phi-3.5-vision, VLM2Vec",
        "sensorium.models.phi3_v:Phi3V",
        "sensorium.processors.phi3_v:Phi3VProcessor",
        ("image",),
    ),
    "MiniCPMV": Family(
        "MiniCPM-V 2.6",
        "sensorium.models.minicpmv:MiniCPMV",
        "sensorium.processors.minicpmv:MiniCPMVProcessor",
        ("image", "video"),
    ),
    "Qwen2VLForConditionalGeneration": Family(
        "Qwen2-VL",
        "sensorium.models.qwen2_vl:Qwen2VL",
        "sensorium.processors.qwen2_vl:Qwen2VLProcessor",
        ("image", "video"),
    ),
    **dict.fromkeys(
        (
            "Qwen2ForSequenceClassification",
            "Qwen3ForSequenceClassification",
            "LlamaForSequenceClassification",
            "MistralForSequenceClassification",
        ),
        Family(
            "Llama, Mistral, Qwen2, Qwen3 classifiers",
            "sensorium.models.classifiers:DecoderForSequenceClassification",
            _TEXT,
            tasks=("classify", "embed"),
        ),
    ),
    "Qwen2ForRewardModel": Family(
        "Qwen2.5-Math-RM", "sensorium.models.classifiers:DecoderForRewardModel", _TEXT, tasks=("reward",)
    ),
    "Qwen2ForProcessRewardModel": Family(
        "Qwen2.5-Math-PRM", "sensorium.models.classifiers:DecoderForProcessRewardModel", _TEXT, tasks=("reward",)
    ),
    **dict.fromkeys(
        (
            "BertModel",
            "BertForMaskedLM",
            "RobertaModel",
            "RobertaForMaskedLM",
            "XLMRobertaModel",
            "XLMRobertaForMaskedLM",
        ),
        Family(
            "BERT, RoBERTa, XLM-RoBERTa (all-MiniLM, BGE, E5, …)",
            "sensorium.models.bert:BertModel",
            _TEXT,
            tasks=("embed",),
            is_encoder=True,
        ),
    ),
    "BertForSequenceClassification": Family(
        "BERT classifiers and cross-encoders",
        "sensorium.models.bert:BertForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        is_encoder=True,
    ),
    **dict.fromkeys(
        ("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification"),
        Family(
            "RoBERTa and XLM-RoBERTa classifiers and cross-encoders (BGE reranker)",
            "sensorium.models.bert:RobertaForSequenceClassification",
            _TEXT,
            tasks=("classify", "score"),
            is_encoder=True,
        ),
    ),
    **dict.fromkeys(
        ("ModernBertModel", "ModernBertForMaskedLM"),
        Family("ModernBERT", "sensorium.models.modernbert:ModernBertModel", _TEXT, tasks=("embed",), is_encoder=True),
    ),
    "ModernBertForSequenceClassification": Family(
        "ModernBERT classifiers and cross-encoders",
        "sensorium.models.modernbert:ModernBertForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        is_encoder=True,
    ),
    "Qwen2_5OmniModel": _QWEN_OMNI,
    "Qwen2_5OmniForConditionalGeneration": _QWEN_OMNI,
    "Qwen2_5OmniThinkerForConditionalGeneration": _QWEN_OMNI,
}


def load_class(path: str) -> Any:
    """Import "module:Class". Only ever called with strings of `FAMILIES`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
