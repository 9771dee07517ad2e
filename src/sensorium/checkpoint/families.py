"""The registry: architecture name -> family, one row with all of its data. Adding a model is a row here, a processor
file and a model file; what reads config.json, the prompt or the weights asks the row and compares no names.

Torch-free: classes are named by string and imported by whoever needs them (`load_class`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sensorium.checkpoint import chat_templates
from sensorium.checkpoint.late_interaction import LateInteraction, Side
from sensorium.errors import CheckpointError
from sensorium.types import Modality


@dataclass(frozen=True, slots=True)
class EncoderDefaults:
    """What an encoder's config leaves out, and what it calls differently from BERT's."""

    max_positions: int = 512
    starts_after_padding: bool = False  # positions begin after the padding id; the rows before are never used
    padding: int | None = None  # that id, whatever the config says; None: the config's, 1 if it does not say
    num_layers: int = 12
    type_vocab_size: int = 2
    names: Mapping[str, str] = field(default_factory=dict)  # BERT's name -> the family's own of it
    vocab_size: int | None = None
    reads_types: bool = True  # whether `type_vocab_size` counts: else there are no token types


_BERT, _ROBERTA, _MODERNBERT = EncoderDefaults(), EncoderDefaults(starts_after_padding=True), EncoderDefaults(8192)
_DISTILBERT = EncoderDefaults(
    num_layers=6,
    reads_types=False,
    names={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    },
)
_NOMIC = EncoderDefaults(
    2048,
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
)
_DEBERTA = EncoderDefaults(type_vocab_size=0)
_JINA_V3 = EncoderDefaults(8194, num_layers=24, type_vocab_size=1)
_GTE = EncoderDefaults(8192, type_vocab_size=1)
_MPNET = EncoderDefaults(starts_after_padding=True, padding=1, reads_types=False)


@dataclass(frozen=True, slots=True)
class VisionTower:
    """Where CLIP-like vision towers differ: defaults of a `vision_config` that leaves keys out."""

    patch_size: int
    hidden_act: str
    eps: float
    has_class_token: bool


VISION_TOWERS: Mapping[str, VisionTower] = {
    "clip_vision_model": VisionTower(32, "quick_gelu", 1e-5, has_class_token=True),
    "siglip_vision_model": VisionTower(16, "gelu_pytorch_tanh", 1e-6, has_class_token=False),
}
"""By the `model_type` of `vision_config`, for the families that may have either (LLaVA)."""


@dataclass(frozen=True, slots=True)
class Family:
    """`model` and `processor` are "module:Class". `title`, `modalities` and `lacks` are in generated pages."""

    title: str
    model: str
    processor: str
    modalities: tuple[Modality, ...] = ()  # beside text; the processor class takes the same
    tasks: tuple[str, ...] = ("generate", "embed")
    encoder: EncoderDefaults | None = None  # of families without a decoder and a KV cache
    is_split: bool = True  # over ranks, where it has a decoder
    chat_template: str | None = None  # for checkpoints that bring none
    text_model_type: str = "llama"  # the key in `DECODERS` of a `text_config` that has no model_type
    scored_as: str | None = None  # the architecture of a classifier whose rows are tokens of this one's language head
    overflows_float16: bool = False  # its activations are larger than float16 holds
    late: LateInteraction | None = None  # how queries are written, where no file of the folder tells it
    is_colbert: bool = False  # whether queries and documents are written as Stanford's ColBERT has them
    nested_in: str = ""  # config.json's key of the part that is served; a file without that key is the part itself
    text_in: str = "text_config"  # config.json's key of the decoder's part
    defaults: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json -> what they are where not stated
    text_versions: Mapping[str, str] = field(default_factory=dict)
    """config.json's `version` -> the key in `DECODERS` of a decoder whose keys stand beside it."""
    lacks: str = ""  # what checkpoints of the family can do elsewhere and not here


_NO_GUESSES = "guessed tokens (`--speculative-tokens`)"
_DECODER = "sensorium.models.decoder:DecoderForCausalLM"
_TEXT = "sensorium.processors.base:Processor"
_BASE_MODEL = Family(
    "Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma without a head (E5-Mistral, Qwen3-Embedding, …)",
    "sensorium.models.decoder:DecoderModel",
    _TEXT,
    tasks=("embed",),
)
_CLASSIFIER = Family(
    "Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma classifiers and rerankers (Qwen3-Reranker, mxbai-rerank-v2)",
    "sensorium.models.classifiers:DecoderForSequenceClassification",
    _TEXT,
    tasks=("classify", "score", "embed"),
)
_BERT_MODEL = Family(
    "BERT, RoBERTa, XLM-RoBERTa (all-MiniLM, BGE, E5, …)",
    "sensorium.models.bert:BertModel",
    _TEXT,
    tasks=("embed",),
    encoder=_BERT,
)
_ROBERTA_MODEL = replace(_BERT_MODEL, encoder=_ROBERTA)
_TOKEN_CLASSIFIER = Family(
    "BERT, RoBERTa, XLM-RoBERTa, DistilBERT token classifiers",
    "sensorium.models.bert:BertForTokenClassification",
    _TEXT,
    tasks=("token_classify",),
    encoder=_BERT,
)
_ROBERTA_TOKEN_CLASSIFIER = replace(_TOKEN_CLASSIFIER, encoder=_ROBERTA)
_DISTILBERT_MODEL = Family(
    "DistilBERT", "sensorium.models.bert:DistilBertModel", _TEXT, tasks=("embed",), encoder=_DISTILBERT
)
_MPNET_MODEL = Family(
    "MPNet (all-mpnet-base-v2, …)", "sensorium.models.mpnet:MPNetModel", _TEXT, tasks=("embed",), encoder=_MPNET
)
_DEBERTA_MODEL = Family(
    "DeBERTa v2 and v3", "sensorium.models.deberta:DebertaV2Model", _TEXT, tasks=("embed",), encoder=_DEBERTA
)
_NOMIC_MODEL = Family(
    "NomicBERT (nomic-embed-text v1, v1.5, v2-moe)",
    "sensorium.models.nomic_bert:NomicBertModel",
    _TEXT,
    tasks=("embed",),
    encoder=_NOMIC,
)
_JINA_V3_MODEL = Family(
    "jina-embeddings-v3", "sensorium.models.jina_v3:JinaV3Model", _TEXT, tasks=("embed",), encoder=_JINA_V3
)
_COLBERT = replace(
    _BERT_MODEL,
    title="ColBERT (colbertv2.0, answerai-colbert-small; GTE-ModernColBERT and others of PyLate by their files)",
    model="sensorium.models.bert:ColBert",
    tasks=("token_embed",),
    is_colbert=True,
)
_GTE_MODEL = Family(
    "GTE (multilingual, en-v1.5), Snowflake Arctic Embed m v2",
    "sensorium.models.gte:GteModel",
    _TEXT,
    tasks=("embed",),
    encoder=_GTE,
)
_GTE_CLASSIFIER = Family(
    "GTE classifiers and cross-encoders (gte-multilingual-reranker)",
    "sensorium.models.gte:GteForSequenceClassification",
    _TEXT,
    tasks=("classify", "score"),
    encoder=_GTE,
)
_CLIP_MODEL = Family(
    "CLIP",
    "sensorium.models.dual:ClipModel",
    "sensorium.processors.dual:DualProcessor",
    ("image",),
    tasks=("embed",),
    encoder=EncoderDefaults(77, vocab_size=49408),
    chat_template=chat_templates.TEXT_OR_IMAGE,
)
_SIGLIP_MODEL = replace(
    _CLIP_MODEL,
    title="SigLIP, SigLIP 2 (images of one size)",
    model="sensorium.models.dual:SiglipModel",
    encoder=EncoderDefaults(64, vocab_size=32000),
)
_GTE_TOKEN_CLASSIFIER = replace(
    _TOKEN_CLASSIFIER,
    title="GTE, NomicBERT and jina-embeddings-v3 token classifiers",
    model="sensorium.models.gte:GteForTokenClassification",
    encoder=_GTE,
)
_ROBERTA_CLASSIFIER = Family(
    "RoBERTa and XLM-RoBERTa classifiers and cross-encoders (BGE reranker, jina-reranker-v2)",
    "sensorium.models.bert:RobertaForSequenceClassification",
    _TEXT,
    tasks=("classify", "score"),
    encoder=_ROBERTA,
)
_MODERNBERT_MODEL = Family(
    "ModernBERT",
    "sensorium.models.modernbert:ModernBertModel",
    _TEXT,
    tasks=("embed",),
    encoder=_MODERNBERT,
    lacks="stretched positions (`rope_scaling`)",
)
_QWEN3_VL_MODEL = Family(
    "Qwen3-VL, Qwen3-VL-Embedding",
    "sensorium.models.qwen3_vl:Qwen3VL",
    "sensorium.processors.qwen3_vl:Qwen3VLProcessor",
    ("image", "video"),
    chat_template=chat_templates.QWEN3_VL,
    text_model_type="qwen3_vl_text",
    scored_as="Qwen3VLForSequenceClassification",
)
_MISTRAL3 = Family(
    "Mistral Small 3.1, 3.2, Magistral Small, Ministral 3",
    "sensorium.models.pixtral:Mistral3",
    "sensorium.processors.pixtral:Mistral3Processor",
    ("image",),
    chat_template=chat_templates.MISTRAL3,
    text_model_type="mistral",
)
_INTERNVL = Family(
    "InternVL 2.5, 3, 3.5",
    "sensorium.models.internvl:InternVL",
    "sensorium.processors.internvl:InternVLProcessor",
    ("image", "video"),
    text_model_type="qwen2",
    lacks="InternLM2 decoders; the Flash variants of 3.5",
)
_GLM4V = Family(
    "GLM-4.1V, GLM-4.6V-Flash",
    "sensorium.models.glm4v:Glm4V",
    "sensorium.processors.glm4v:Glm4VProcessor",
    ("image", "video"),
    chat_template=chat_templates.GLM4V,
    text_model_type="glm4v_text",
)
_SMOLVLM = Family(
    "SmolVLM2",
    "sensorium.models.smolvlm:SmolVLM",
    "sensorium.processors.smolvlm:SmolVLMProcessor",
    ("image", "video"),
    chat_template=chat_templates.SMOLVLM,
)
_QWEN3_5_TEXT = Family(
    "Qwen3.5, Qwen3.6, Qwen3.8 (text)",
    "sensorium.models.qwen3_5:Qwen35ForCausalLM",
    _TEXT,
    text_model_type="qwen3_5_text",
    lacks=_NO_GUESSES,
)
_QWEN3_5_MODEL = Family(
    "Qwen3.5, Qwen3.6, Qwen3.8",
    "sensorium.models.qwen3_5:Qwen35",
    "sensorium.processors.qwen3_vl:Qwen3VLProcessor",
    ("image", "video"),
    chat_template=chat_templates.QWEN3_VL,
    text_model_type="qwen3_5_text",
    lacks=_NO_GUESSES,
)
_COLQWEN2 = Family(
    "ColQwen2 (vectors of page images and of queries)",
    "sensorium.models.colqwen:ColQwen2",
    "sensorium.processors.colqwen:ColQwen2Processor",
    ("image", "video"),
    tasks=("token_embed",),
    chat_template=chat_templates.COLQWEN,
    text_model_type="qwen2_vl_text",
    nested_in="vlm_config",
    late=LateInteraction(Side("Query: ", suffix="<|endoftext|>" * 10 + "\n")),
    lacks="folders that hold a LoRA adapter only (merge it)",
)
_COLPALI = Family(
    "ColPali (vectors of page images and of queries)",
    "sensorium.models.paligemma:ColPali",
    "sensorium.processors.llava:LlavaProcessor",
    ("image",),
    tasks=("token_embed",),
    chat_template=chat_templates.COLPALI,
    text_model_type="gemma",
    nested_in="vlm_config",
    late=LateInteraction(Side("Question: ", suffix="<pad>" * 10 + "\n"), first="<bos>"),
    defaults={"vision_feature_select_strategy": "full", "image_token_index": 257152, "is_causal": False},
    lacks="folders that hold a LoRA adapter only (merge it); a PaliGemma 2 inside",
)
_QWEN_OMNI = Family(  # the part that writes text; the one that speaks is not served
    "Qwen2.5-Omni (thinker)",
    "sensorium.models.qwen2_omni:Qwen2Omni",
    "sensorium.processors.qwen2_omni:Qwen2OmniProcessor",
    ("image", "video", "audio"),
    chat_template=chat_templates.QWEN2_OMNI,
    text_model_type="qwen2_5_omni_text",
    nested_in="thinker_config",
    lacks="speech as an answer (the talker)",
)
_QWEN3_OMNI = replace(
    _QWEN_OMNI,
    title="Qwen3-Omni 30B-A3B (thinker)",
    model="sensorium.models.qwen3_omni:Qwen3Omni",
    processor="sensorium.processors.qwen3_omni:Qwen3OmniProcessor",
    chat_template=chat_templates.QWEN3_OMNI,
    text_model_type="qwen3_omni_moe_text",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("Llama 2/3, Yi, Vicuna", _DECODER, _TEXT, scored_as="LlamaForSequenceClassification"),
    "MistralForCausalLM": Family("Mistral", _DECODER, _TEXT, scored_as="MistralForSequenceClassification"),
    "Ministral3ForCausalLM": Family("Ministral 3 (text)", _DECODER, _TEXT),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", _DECODER, _TEXT, scored_as="Qwen2ForSequenceClassification"),
    "Qwen3ForCausalLM": Family("Qwen3", _DECODER, _TEXT, scored_as="Qwen3ForSequenceClassification"),
    "MixtralForCausalLM": Family("Mixtral 8x7B, 8x22B", _DECODER, _TEXT),
    "Qwen2MoeForCausalLM": Family("Qwen1.5-MoE, Qwen2-57B-A14B", _DECODER, _TEXT),
    "Qwen3MoeForCausalLM": Family("Qwen3 30B-A3B, 235B-A22B, Qwen3-Coder", _DECODER, _TEXT),
    "OlmoeForCausalLM": Family("OLMoE", _DECODER, _TEXT),
    "GptOssForCausalLM": Family("GPT-OSS 20b, 120b", "sensorium.models.gpt_oss:GptOss", _TEXT),
    "Glm4MoeForCausalLM": Family(
        "GLM-4.5, 4.6, 4.5-Air", "sensorium.models.glm4_moe:Glm4Moe", _TEXT, lacks="multi-token prediction"
    ),
    "Phi3ForCausalLM": Family("Phi-3, Phi-3.5", _DECODER, _TEXT, scored_as="Phi3ForSequenceClassification"),
    "Lfm2ForCausalLM": Family("LFM2, LFM2.5", "sensorium.models.lfm2:Lfm2ForCausalLM", _TEXT, lacks=_NO_GUESSES),
    "Lfm2VlForConditionalGeneration": Family(
        "LFM2-VL, LFM2.5-VL",
        "sensorium.models.lfm2_vl:Lfm2VL",
        "sensorium.processors.lfm2_vl:Lfm2VLProcessor",
        ("image",),
        chat_template=chat_templates.LFM2_VL,
        text_model_type="lfm2",
        lacks=_NO_GUESSES,
    ),
    "Qwen3_5ForCausalLM": _QWEN3_5_TEXT,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5_MODEL,
    "Qwen3_5MoeForConditionalGeneration": replace(
        _QWEN3_5_MODEL, title="Qwen3.5, Qwen3.6 35B-A3B and larger", text_model_type="qwen3_5_moe_text"
    ),
    "LlamaModel": _BASE_MODEL,
    "MistralModel": _BASE_MODEL,
    "Qwen2Model": _BASE_MODEL,
    "Qwen3Model": _BASE_MODEL,
    "Phi3Model": _BASE_MODEL,
    "GemmaModel": _BASE_MODEL,
    "GemmaForCausalLM": Family(
        "Gemma (first), bge-reranker-v2-gemma", _DECODER, _TEXT, scored_as="GemmaForSequenceClassification"
    ),
    "Gemma3ForCausalLM": Family("Gemma 3 270M, 1B", _DECODER, _TEXT, overflows_float16=True),
    "Gemma3TextModel": Family("EmbeddingGemma", _BASE_MODEL.model, _TEXT, tasks=("embed",), overflows_float16=True),
    "Gemma3ForConditionalGeneration": Family(
        "Gemma 3 4B, 12B, 27B",
        "sensorium.models.gemma3:Gemma3",
        "sensorium.processors.gemma3:Gemma3Processor",
        ("image",),
        text_model_type="gemma3_text",
        overflows_float16=True,
    ),
    "Gemma4ForCausalLM": Family(
        "Gemma 4 (text)", "sensorium.models.gemma4:Gemma4ForCausalLM", _TEXT, overflows_float16=True
    ),
    "Gemma4ForConditionalGeneration": Family(
        "Gemma 4 E2B, E4B, 26B-A4B, 31B",
        "sensorium.models.gemma4:Gemma4",
        "sensorium.processors.gemma4:Gemma4Processor",
        ("image", "video", "audio"),
        text_model_type="gemma4_text",
        overflows_float16=True,
        lacks="the unified 12B",
    ),
    "LlavaForConditionalGeneration": Family(
        "LLaVA-1.5",
        "sensorium.models.llava:Llava",
        "sensorium.processors.llava:LlavaProcessor",
        ("image",),
        chat_template=chat_templates.VICUNA_LLAVA,
        defaults={"vision_feature_layer": -2},
    ),
    "LlavaNextForConditionalGeneration": Family(
        "LLaVA-NeXT (v1.6)",
        "sensorium.models.llava:LlavaNext",
        "sensorium.processors.llava_next:LlavaNextProcessor",
        ("image",),
        chat_template=chat_templates.CHATML_LLAVA,
        defaults={"vision_feature_layer": -2},
    ),
    "LlavaOnevisionForConditionalGeneration": Family(
        "LLaVA-OneVision",
        "sensorium.models.llava:LlavaOnevision",
        "sensorium.processors.llava_onevision:LlavaOnevisionProcessor",
        ("image", "video"),
        chat_template=chat_templates.CHATML_LLAVA_VIDEO,
        text_model_type="qwen2",
        defaults={
            **{"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 151646},
            "image_grid_pinpoints": [[384 * lines, 384 * columns] for lines in range(1, 7) for columns in range(1, 7)],
        },
        lacks="OneVision-1.5",
    ),
    "Mistral3ForConditionalGeneration": _MISTRAL3,
    "PixtralForConditionalGeneration": replace(
        _MISTRAL3,
        title="Pixtral 12B",
        model="sensorium.models.pixtral:Pixtral",
        processor="sensorium.processors.pixtral:PixtralProcessor",
    ),
    "InternVLForConditionalGeneration": _INTERNVL,
    "InternVLChatModel": replace(_INTERNVL, text_in="llm_config"),
    "UltravoxModel": Family(
        "Ultravox v0.5",
        "sensorium.models.ultravox:Ultravox",
        "sensorium.processors.ultravox:UltravoxProcessor",
        ("audio",),
        lacks="v0.6 and later, whose projector has layers",
    ),
    "Qwen2AudioForConditionalGeneration": Family(
        "Qwen2-Audio",
        "sensorium.models.qwen2_audio:Qwen2Audio",
        "sensorium.processors.qwen2_audio:Qwen2AudioProcessor",
        ("audio",),
        chat_template=chat_templates.QWEN2_AUDIO,
        text_model_type="qwen2",
        lacks="what a clip has beyond 30 s, which is cut as in transformers",
    ),
    "VoxtralForConditionalGeneration": Family(
        "Voxtral Mini 3B, Small 24B",
        "sensorium.models.voxtral:Voxtral",
        "sensorium.processors.voxtral:VoxtralProcessor",
        ("audio",),
        chat_template=chat_templates.VOXTRAL,
        lacks="Mistral's own files (`consolidated.safetensors`, `params.json`); Voxtral Realtime",
    ),
    "Qwen3ASRForConditionalGeneration": Family(
        "Qwen3-ASR",
        "sensorium.models.qwen3_asr:Qwen3Asr",
        "sensorium.processors.qwen3_asr:Qwen3AsrProcessor",
        ("audio",),
        chat_template=chat_templates.QWEN3_ASR,
        text_model_type="qwen3_asr_text",
        nested_in="thinker_config",
        lacks="times of words (the forced aligner)",
    ),
    "SmolVLMForConditionalGeneration": _SMOLVLM,
    "Idefics3ForConditionalGeneration": replace(
        _SMOLVLM,
        title="Idefics3, SmolVLM (first)",
        model="sensorium.models.smolvlm:Idefics3",
        processor="sensorium.processors.smolvlm:Idefics3Processor",
        modalities=("image",),
        chat_template=chat_templates.IDEFICS3,
    ),
    "Phi3VForCausalLM": Family(
        "Phi-3.5-vision, VLM2Vec",
        "sensorium.models.phi3_v:Phi3V",
        "sensorium.processors.phi3_v:Phi3VProcessor",
        ("image",),
        chat_template=chat_templates.PHI3,
    ),
    "Glm4vForConditionalGeneration": _GLM4V,
    "Glm46VForConditionalGeneration": _GLM4V,
    "Glm4vMoeForConditionalGeneration": replace(
        _GLM4V,
        title="GLM-4.5V, GLM-4.6V",
        model="sensorium.models.glm4v:Glm4VMoe",
        text_model_type="glm4v_moe_text",
        lacks="multi-token prediction",
    ),
    "GlmOcrForConditionalGeneration": replace(
        _GLM4V,
        title="GLM-OCR",
        model="sensorium.models.glm4v:GlmOcr",
        processor="sensorium.processors.glm4v:GlmOcrProcessor",
        text_model_type="glm_ocr_text",
        lacks="multi-token prediction",
    ),
    "PaddleOCRVLForConditionalGeneration": Family(
        "PaddleOCR-VL",
        "sensorium.models.paddleocr_vl:PaddleOCRVL",
        "sensorium.processors.paddleocr_vl:PaddleOCRVLProcessor",
        ("image",),
        chat_template=chat_templates.PADDLEOCR_VL,
        text_model_type="paddleocr_vl_text",
        lacks="the model that finds a page's parts: send each part as an image",
    ),
    "MiniCPMV": Family(
        "MiniCPM-V 2.6, 4.0, 4.5",
        "sensorium.models.minicpmv:MiniCPMV",
        "sensorium.processors.minicpmv:MiniCPMVProcessor",
        ("image", "video"),
        chat_template=chat_templates.MINICPMV,
        text_versions={"2.6": "minicpmv", "4.0": "llama", "4.5": "qwen3"},
        lacks="4.6 and later; MiniCPM-o",
    ),
    "Qwen2VLForConditionalGeneration": Family(
        "Qwen2-VL",
        "sensorium.models.qwen2_vl:Qwen2VL",
        "sensorium.processors.qwen2_vl:Qwen2VLProcessor",
        ("image", "video"),
        chat_template=chat_templates.QWEN2_VL,
        text_model_type="qwen2_vl_text",
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "Qwen2.5-VL",
        "sensorium.models.qwen2_5_vl:Qwen25VL",
        "sensorium.processors.qwen2_5_vl:Qwen25VLProcessor",
        ("image", "video"),
        chat_template=chat_templates.QWEN2_VL,
        text_model_type="qwen2_5_vl_text",
    ),
    "Qwen3VLForConditionalGeneration": _QWEN3_VL_MODEL,
    "Qwen3VLMoeForConditionalGeneration": replace(
        _QWEN3_VL_MODEL,
        title="Qwen3-VL 30B-A3B, 235B-A22B",
        model="sensorium.models.qwen3_vl:Qwen3VLMoe",
        text_model_type="qwen3_vl_moe_text",
        scored_as=None,
    ),
    "Qwen3VLForSequenceClassification": replace(
        _QWEN3_VL_MODEL,
        title="Qwen3-VL classifiers and rerankers (Qwen3-VL-Reranker)",
        model="sensorium.models.qwen3_vl:Qwen3VLForSequenceClassification",
        tasks=("classify", "score", "embed"),
        scored_as=None,
    ),
    "Qwen2ForSequenceClassification": _CLASSIFIER,
    "Qwen3ForSequenceClassification": _CLASSIFIER,
    "LlamaForSequenceClassification": _CLASSIFIER,
    "MistralForSequenceClassification": _CLASSIFIER,
    "Phi3ForSequenceClassification": _CLASSIFIER,
    "GemmaForSequenceClassification": _CLASSIFIER,
    "Qwen2ForRewardModel": Family(
        "Qwen2.5-Math-RM", "sensorium.models.classifiers:DecoderForRewardModel", _TEXT, tasks=("reward",)
    ),
    "Qwen2ForProcessRewardModel": Family(
        "Qwen2.5-Math-PRM", "sensorium.models.classifiers:DecoderForProcessRewardModel", _TEXT, tasks=("reward",)
    ),
    "BertModel": _BERT_MODEL,
    "BertForMaskedLM": _BERT_MODEL,
    "RobertaModel": _ROBERTA_MODEL,
    "RobertaForMaskedLM": _ROBERTA_MODEL,
    "XLMRobertaModel": _ROBERTA_MODEL,
    "XLMRobertaForMaskedLM": _ROBERTA_MODEL,
    "ColQwen2ForRetrieval": _COLQWEN2,
    "ColQwen2": replace(
        _COLQWEN2,
        processor="sensorium.processors.qwen2_vl:Qwen2VLProcessor",
        late=LateInteraction(Side(suffix="<|endoftext|>" * 10)),
    ),
    "ColQwen2_5": replace(
        _COLQWEN2,
        title="ColQwen2.5",
        model="sensorium.models.colqwen:ColQwen25",
        processor="sensorium.processors.qwen2_5_vl:Qwen25VLProcessor",
        text_model_type="qwen2_5_vl_text",
        late=LateInteraction(Side(suffix="<|endoftext|>" * 10)),
    ),
    "ColPaliForRetrieval": _COLPALI,
    "ColPali": _COLPALI,
    "HF_ColBERT": _COLBERT,
    "JinaColBert": replace(
        _COLBERT, title="jina-colbert-v2", model="sensorium.models.jina_v3:JinaColBert", encoder=_JINA_V3
    ),
    "BgeM3EmbeddingModel": replace(_ROBERTA_MODEL, title="BGE-M3 (dense, sparse and a vector per token)"),
    "BertForSequenceClassification": Family(
        "BERT classifiers and cross-encoders",
        "sensorium.models.bert:BertForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_BERT,
    ),
    "RobertaForSequenceClassification": _ROBERTA_CLASSIFIER,
    "XLMRobertaForSequenceClassification": _ROBERTA_CLASSIFIER,
    "BertForTokenClassification": _TOKEN_CLASSIFIER,
    "RobertaForTokenClassification": _ROBERTA_TOKEN_CLASSIFIER,
    "XLMRobertaForTokenClassification": _ROBERTA_TOKEN_CLASSIFIER,
    "DistilBertForTokenClassification": replace(
        _TOKEN_CLASSIFIER, model="sensorium.models.bert:DistilBertForTokenClassification", encoder=_DISTILBERT
    ),
    "DistilBertModel": _DISTILBERT_MODEL,
    "DistilBertForMaskedLM": _DISTILBERT_MODEL,
    "DistilBertForSequenceClassification": Family(
        "DistilBERT classifiers and cross-encoders",
        "sensorium.models.bert:DistilBertForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_DISTILBERT,
    ),
    "MPNetModel": _MPNET_MODEL,
    "MPNetForMaskedLM": _MPNET_MODEL,
    "MPNetForSequenceClassification": Family(
        "MPNet classifiers and cross-encoders",
        "sensorium.models.mpnet:MPNetForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_MPNET,
    ),
    "DebertaV2Model": _DEBERTA_MODEL,
    "DebertaV2ForMaskedLM": _DEBERTA_MODEL,
    "DebertaV2ForSequenceClassification": Family(
        "DeBERTa v2 and v3 classifiers and cross-encoders (mxbai-rerank v1, NLI, prompt guards)",
        "sensorium.models.deberta:DebertaV2ForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_DEBERTA,
    ),
    "DebertaV2ForTokenClassification": replace(
        _TOKEN_CLASSIFIER,
        title="DeBERTa v2 and v3 token classifiers (PII)",
        model="sensorium.models.deberta:DebertaV2ForTokenClassification",
        encoder=_DEBERTA,
    ),
    "NomicBertModel": _NOMIC_MODEL,
    "NomicBertForMaskedLM": _NOMIC_MODEL,
    "NomicBertForPreTraining": _NOMIC_MODEL,
    "NomicBertForSequenceClassification": Family(
        "NomicBERT classifiers and cross-encoders",
        "sensorium.models.nomic_bert:NomicBertForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_NOMIC,
    ),
    "NomicBertForTokenClassification": replace(
        _GTE_TOKEN_CLASSIFIER, model="sensorium.models.nomic_bert:NomicBertForTokenClassification", encoder=_NOMIC
    ),
    "CLIPModel": _CLIP_MODEL,
    "SiglipModel": _SIGLIP_MODEL,
    "Siglip2Model": replace(
        _SIGLIP_MODEL,
        title="SigLIP 2 NaFlex (images of any size)",
        model="sensorium.models.dual:NaflexModel",
        processor="sensorium.processors.dual:NaflexProcessor",
    ),
    "JinaEmbeddingsV3Model": _JINA_V3_MODEL,
    "JinaEmbeddingsV3ForMaskedLM": _JINA_V3_MODEL,
    "JinaEmbeddingsV3ForSequenceClassification": Family(
        "jina-embeddings-v3 classifiers and cross-encoders",
        "sensorium.models.jina_v3:JinaV3ForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_JINA_V3,
    ),
    "JinaEmbeddingsV3ForTokenClassification": replace(
        _GTE_TOKEN_CLASSIFIER, model="sensorium.models.jina_v3:JinaV3ForTokenClassification", encoder=_JINA_V3
    ),
    "NewModel": _GTE_MODEL,
    "GteModel": _GTE_MODEL,
    "GteNewModel": _GTE_MODEL,
    "NewForMaskedLM": _GTE_MODEL,
    "GteForMaskedLM": _GTE_MODEL,
    "NewForSequenceClassification": _GTE_CLASSIFIER,
    "GteForSequenceClassification": _GTE_CLASSIFIER,
    "GteNewForSequenceClassification": _GTE_CLASSIFIER,
    "NewForTokenClassification": _GTE_TOKEN_CLASSIFIER,
    "GteForTokenClassification": _GTE_TOKEN_CLASSIFIER,
    "ModernBertModel": _MODERNBERT_MODEL,
    "ModernBertForMaskedLM": _MODERNBERT_MODEL,
    "ModernBertForSequenceClassification": Family(
        "ModernBERT classifiers and cross-encoders",
        "sensorium.models.modernbert:ModernBertForSequenceClassification",
        _TEXT,
        tasks=("classify", "score"),
        encoder=_MODERNBERT,
    ),
    "WhisperForConditionalGeneration": Family(
        "Whisper (tiny ... large-v3-turbo, distil)",
        "sensorium.models.whisper:Whisper",
        "sensorium.processors.whisper:WhisperProcessor",
        ("audio",),
        tasks=("transcribe",),
        text_model_type="whisper",
        is_split=False,
    ),
    "Qwen2_5OmniModel": _QWEN_OMNI,
    "Qwen2_5OmniForConditionalGeneration": _QWEN_OMNI,
    "Qwen2_5OmniThinkerForConditionalGeneration": _QWEN_OMNI,
    "Qwen3OmniMoeForConditionalGeneration": _QWEN3_OMNI,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _QWEN3_OMNI,
}
"""By `architectures[0]` of config.json."""


_ROTARY: Mapping[str, str] = {
    "XLMRobertaModel": "JinaEmbeddingsV3Model",
    "XLMRobertaForMaskedLM": "JinaEmbeddingsV3ForMaskedLM",
    "XLMRobertaForSequenceClassification": "JinaEmbeddingsV3ForSequenceClassification",
    "XLMRobertaForTokenClassification": "JinaEmbeddingsV3ForTokenClassification",
    "HF_ColBERT": "JinaColBert",
}
"""Published under another model's name: the second one where `position_embedding_type` is "rotary"."""
_BY_TOWER: Mapping[tuple[str, str], str] = {
    ("LlavaForConditionalGeneration", "pixtral"): "PixtralForConditionalGeneration"
}
"""The same of those that their vision tower's model_type tells."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """What config.json describes: architectures[0], or who is published under that name. CheckpointError if it has
    none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json names no architecture (`architectures`)")
    if config.get("position_embedding_type") == "rotary":
        return _ROTARY.get(names[0], names[0])
    vision = config.get("vision_config")
    tower = str(vision.get("model_type")) if isinstance(vision, Mapping) else ""
    return _BY_TOWER.get((names[0], tower), names[0])


def family_of(architecture: str) -> Family:
    """The architecture's row. CheckpointError if it is not served."""
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def vision_tower(vision_config: Mapping[str, Any]) -> VisionTower:
    """The defaults of a LLaVA-like `vision_config`; without a model_type it is CLIP's. CheckpointError otherwise."""
    kind = vision_config.get("model_type", "clip_vision_model")
    if kind not in VISION_TOWERS:
        raise CheckpointError(
            f"config.json: vision tower {kind!r} is not supported (supported: {', '.join(VISION_TOWERS)})"
        )
    return VISION_TOWERS[kind]


def load_class(path: str) -> Any:
    """Import "module:Class". Only ever called with strings of `FAMILIES`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
