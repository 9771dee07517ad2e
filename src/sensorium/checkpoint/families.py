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
class DecoderDefaults:
    """What a decoder's configs leave out (LLaVA's says little but the vocabulary), and which of their keys count."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None  # None: as many as heads
    max_positions: int
    rms_norm_eps: float = 1e-6
    theta: float = 10000.0
    head_dim: int | None = None  # None: hidden_size / num_heads
    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = False  # others have the key `attention_bias` and ignore it
    reads_mlp_bias: bool = False  # the same of `mlp_bias`
    is_tied_outside: bool = False  # only the outer config says whether the head is tied: text_config's default is true
    sliding_window: int | None = None
    window_is_optional: bool = False  # only with `use_sliding_window`, from layer `max_window_layers` on
    max_window_layers: int = 28
    mrope_section: tuple[int, ...] = ()  # frequencies per axis (time, height, width)
    preset: Mapping[str, Any] = field(default_factory=dict)  # other keys' values where the config does not say
    names: Mapping[str, str] = field(default_factory=dict)
    """Keys of this module -> what such configs call them; the keys themselves then mean something else there."""
    full_every: int | None = None  # the others have the window, and rotary positions of their own with `local_theta`;
    local_theta: float | None = None  # `layer_types` or `sliding_window_pattern` may say otherwise
    window_covers_both_sides: bool = False  # where attention goes both ways: the number is of both sides together
    media_both_ways: bool = False  # media tokens see all of their item, in layers with a window or in all
    query_scalar: float | None = None  # `query_pre_attn_scalar`, whose root divides scores; None: that of head_dim
    scale: float | None = None  # of scores, where no key says it
    shapes_differ: bool = False  # layers differ in more than what they see: see `checkpoint.layer_shapes`
    states_stretched_length: bool = False  # `max_position_embeddings` is after linear scaling
    norm_offset: float = 0.0
    has_sublayer_norms: bool = False
    scales_embeddings: bool = False  # by the root of the hidden size
    caps_logits: bool = False  # reads `final_logit_softcapping`
    mrope_interleaved: bool = False  # axes take turns, frequency by frequency


_LLAMA = DecoderDefaults(32000, 4096, 11008, 32, 32, None, 2048, reads_attention_bias=True, reads_mlp_bias=True)
_MISTRAL = DecoderDefaults(32000, 4096, 14336, 32, 32, 8, 131072, sliding_window=4096)
_QWEN2 = DecoderDefaults(
    151936, 4096, 22016, 32, 32, 32, 32768, qkv_bias=True, sliding_window=4096, window_is_optional=True
)
_QWEN3 = replace(_QWEN2, head_dim=128, qkv_bias=False, qk_norm=True, reads_attention_bias=True)
_QWEN2_VL = DecoderDefaults(
    152064,
    8192,
    29568,
    80,
    64,
    8,
    32768,
    1e-5,
    1e6,
    qkv_bias=True,
    sliding_window=4096,
    window_is_optional=True,
    max_window_layers=80,
    mrope_section=(16, 24, 24),
)
_QWEN2_5_OMNI = DecoderDefaults(
    152064,
    3584,
    18944,
    28,
    28,
    4,
    32768,
    1e-6,
    1e6,
    qkv_bias=True,
    is_tied_outside=True,
    sliding_window=32768,
    window_is_optional=True,
    mrope_section=(16, 24, 24),
)
_WHISPER = DecoderDefaults(
    51865,
    384,
    1536,
    4,
    6,
    None,
    448,
    preset={"tie_word_embeddings": True, "hidden_act": "gelu"},
    names={
        "hidden_size": "d_model",
        "intermediate_size": "decoder_ffn_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "num_key_value_heads": "",
        "max_position_embeddings": "max_target_positions",
        "hidden_act": "activation_function",
    },
)
_QWEN3_VL = DecoderDefaults(
    151936,
    4096,
    22016,
    32,
    32,
    32,
    128000,
    theta=5e5,
    head_dim=128,
    qk_norm=True,
    reads_attention_bias=True,
    window_is_optional=True,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
)
_PHI3 = DecoderDefaults(32064, 3072, 8192, 32, 32, None, 4096, rms_norm_eps=1e-5)
_GEMMA3 = DecoderDefaults(
    262208,
    2304,
    9216,
    26,
    8,
    4,
    131072,
    theta=1e6,
    head_dim=256,
    qk_norm=True,
    reads_attention_bias=True,
    sliding_window=4096,
    full_every=6,
    local_theta=1e4,
    window_covers_both_sides=True,
    media_both_ways=True,
    query_scalar=256,
    states_stretched_length=True,
    preset={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    names={"hidden_act": "hidden_activation"},
    norm_offset=1.0,
    has_sublayer_norms=True,
    scales_embeddings=True,
    caps_logits=True,
)
_GEMMA4 = replace(
    _GEMMA3,
    vocab_size=262144,
    num_layers=30,
    sliding_window=512,
    media_both_ways=False,
    query_scalar=None,
    scale=1.0,
    shapes_differ=True,
    norm_offset=0.0,
    preset={
        **_GEMMA3.preset,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
)

DECODERS: Mapping[str, DecoderDefaults] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "phi3": _PHI3,
    "phi3_v": _PHI3,
    "minicpmv": _QWEN2,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_5_omni_text": _QWEN2_5_OMNI,
    "whisper": _WHISPER,
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA4,
    "qwen3_vl_text": _QWEN3_VL,
}
"""By the `model_type` of the decoder's part of config.json, which is not the architecture's: LLaVA has several."""


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
    """`model` and `processor` are "module:Class". `title` and `modalities` make the generated table of models."""

    title: str
    model: str
    processor: str
    modalities: tuple[Modality, ...] = ()  # beside text; the processor class takes the same
    tasks: tuple[str, ...] = ("generate", "embed")
    encoder: EncoderDefaults | None = None  # of families without a decoder and a KV cache
    chat_template: str | None = None  # for checkpoints that bring none
    text_model_type: str = "llama"  # the key in `DECODERS` of a `text_config` that has no model_type
    scored_as: str | None = None  # the architecture of a classifier whose rows are tokens of this one's language head
    overflows_float16: bool = False  # its activations are larger than float16 holds
    late: LateInteraction | None = None  # how queries are written, where no file of the folder tells it
    is_colbert: bool = False  # whether queries and documents are written as Stanford's ColBERT has them
    nested_in: str = ""  # config.json's key of the part that is served; a file without that key is the part itself


_DECODER = "sensorium.models.decoder:DecoderForCausalLM"
_TEXT = "sensorium.processors.base:Processor"
_BASE_MODEL = Family(
    "Llama, Mistral, Qwen2, Qwen3, Phi-3 without a head (E5-Mistral, Qwen3-Embedding, …)",
    "sensorium.models.decoder:DecoderModel",
    _TEXT,
    tasks=("embed",),
)
_CLASSIFIER = Family(
    "Llama, Mistral, Qwen2, Qwen3, Phi-3 classifiers and rerankers (Qwen3-Reranker, mxbai-rerank-v2)",
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
    "RoBERTa and XLM-RoBERTa classifiers and cross-encoders (BGE reranker)",
    "sensorium.models.bert:RobertaForSequenceClassification",
    _TEXT,
    tasks=("classify", "score"),
    encoder=_ROBERTA,
)
_MODERNBERT_MODEL = Family(
    "ModernBERT", "sensorium.models.modernbert:ModernBertModel", _TEXT, tasks=("embed",), encoder=_MODERNBERT
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
)
_QWEN_OMNI = Family(  # the part that writes text; the one that speaks is not served
    "Qwen2.5-Omni (thinker)",
    "sensorium.models.qwen2_omni:Qwen2Omni",
    "sensorium.processors.qwen2_omni:Qwen2OmniProcessor",
    ("image", "video", "audio"),
    chat_template=chat_templates.QWEN2_OMNI,
    text_model_type="qwen2_5_omni_text",
    nested_in="thinker_config",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("Llama 2/3, Yi, Vicuna", _DECODER, _TEXT, scored_as="LlamaForSequenceClassification"),
    "MistralForCausalLM": Family("Mistral", _DECODER, _TEXT, scored_as="MistralForSequenceClassification"),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", _DECODER, _TEXT, scored_as="Qwen2ForSequenceClassification"),
    "Qwen3ForCausalLM": Family("Qwen3", _DECODER, _TEXT, scored_as="Qwen3ForSequenceClassification"),
    "Phi3ForCausalLM": Family("Phi-3, Phi-3.5", _DECODER, _TEXT, scored_as="Phi3ForSequenceClassification"),
    "LlamaModel": _BASE_MODEL,
    "MistralModel": _BASE_MODEL,
    "Qwen2Model": _BASE_MODEL,
    "Qwen3Model": _BASE_MODEL,
    "Phi3Model": _BASE_MODEL,
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
        "Gemma 4 E2B, E4B, 31B",
        "sensorium.models.gemma4:Gemma4",
        "sensorium.processors.gemma4:Gemma4Processor",
        ("image",),
        text_model_type="gemma4_text",
        overflows_float16=True,
    ),
    "LlavaForConditionalGeneration": Family(
        "LLaVA-1.5",
        "sensorium.models.llava:Llava",
        "sensorium.processors.llava:LlavaProcessor",
        ("image",),
        chat_template=chat_templates.VICUNA_LLAVA,
    ),
    "LlavaNextForConditionalGeneration": Family(
        "LLaVA-NeXT (v1.6)",
        "sensorium.models.llava:LlavaNext",
        "sensorium.processors.llava_next:LlavaNextProcessor",
        ("image",),
        chat_template=chat_templates.CHATML_LLAVA,
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
        chat_template=chat_templates.PHI3,
    ),
    "MiniCPMV": Family(
        "MiniCPM-V 2.6",
        "sensorium.models.minicpmv:MiniCPMV",
        "sensorium.processors.minicpmv:MiniCPMVProcessor",
        ("image", "video"),
        chat_template=chat_templates.MINICPMV,
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
    "HF_ColBERT": replace(
        _BERT_MODEL,
        title="ColBERT (colbertv2.0, answerai-colbert-small; GTE-ModernColBERT and others of PyLate by their files)",
        model="sensorium.models.bert:ColBert",
        tasks=("token_embed",),
        is_colbert=True,
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
    ),
    "Qwen2_5OmniModel": _QWEN_OMNI,
    "Qwen2_5OmniForConditionalGeneration": _QWEN_OMNI,
    "Qwen2_5OmniThinkerForConditionalGeneration": _QWEN_OMNI,
}
"""By `architectures[0]` of config.json."""


_ROTARY: Mapping[str, str] = {
    "XLMRobertaModel": "JinaEmbeddingsV3Model",
    "XLMRobertaForMaskedLM": "JinaEmbeddingsV3ForMaskedLM",
}
"""Published under another model's name: the second one where `position_embedding_type` is "rotary"."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """What config.json describes: architectures[0], or who is published under that name. CheckpointError if it has
    none."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json names no architecture (`architectures`)")
    is_rotary = config.get("position_embedding_type") == "rotary"
    return _ROTARY.get(names[0], names[0]) if is_rotary else names[0]


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
