"""Shapes of published checkpoints by architecture: what docs/models.md tells the memory of.

Each is what config.json says beside what the family's defaults fill in. A family without an entry stops `make docs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def decoder(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """A Llama-like decoder."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


def encoder(hidden: int, inner: int, layers: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """A BERT-like encoder."""
    shape = decoder(hidden, inner, layers, heads, heads, vocab, **more)
    del shape["num_key_value_heads"]
    return shape


def vision(hidden: int, inner: int, layers: int, heads: int, image: int, patch: int, **more: Any) -> dict[str, Any]:
    """A CLIP-like tower."""
    shape = {"image_size": image, "patch_size": patch}
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return {"hidden_size": hidden, "intermediate_size": inner, **sizes, **shape, **more}


def whisper(size: int, layers: int, heads: int, bins: int, vocab: int, decoder_layers: int = 0) -> dict[str, Any]:
    return {
        "d_model": size,
        "num_mel_bins": bins,
        "vocab_size": vocab,
        **{"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * size},
        **{"decoder_layers": decoder_layers or layers, "decoder_attention_heads": heads, "decoder_ffn_dim": 4 * size},
    }


def qwen_vit(hidden: int, inner: int, depth: int, out: int, **more: Any) -> dict[str, Any]:
    """The tower of Qwen2.5-VL and later."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "depth": depth, "num_heads": 16}
    return {**sizes, "out_hidden_size": out, **more}


TIED = {"tie_word_embeddings": True}
QWEN35_800M = decoder(1024, 3584, 24, 8, 2, 248320, head_dim=256, linear_num_value_heads=16, **TIED)
QWEN36_35B = decoder(2048, 6144, 40, 16, 2, 248320, head_dim=256)
MINISTRAL_3B = decoder(3072, 9216, 26, 32, 8, 131072, head_dim=128, **TIED)
LFM2 = {
    f"LFM2-{size}": decoder(hidden, inner, 16, heads, 8, 65536, full_attn_idxs=[2, 5, 8, 10, 12, 14])
    for size, hidden, inner, heads in (("350M", 1024, 6656, 16), ("1.2B", 2048, 12288, 32))
}
QWEN2 = {
    "0.5B": decoder(896, 4864, 24, 14, 2, 151936, **TIED),
    "1.5B": decoder(1536, 8960, 28, 12, 2, 151936, **TIED),
    "3B": decoder(2048, 11008, 36, 16, 2, 151936, **TIED),
    "7B": decoder(3584, 18944, 28, 28, 4, 152064),
    "14B": decoder(5120, 13824, 48, 40, 8, 152064),
    "32B": decoder(5120, 27648, 64, 40, 8, 152064),
    "72B": decoder(8192, 29568, 80, 64, 8, 152064),
}
QWEN3 = {
    "0.6B": decoder(1024, 3072, 28, 16, 8, 151936, **TIED),
    "1.7B": decoder(2048, 6144, 28, 16, 8, 151936, **TIED),
    "4B": decoder(2560, 9728, 36, 32, 8, 151936, **TIED),
    "8B": decoder(4096, 12288, 36, 32, 8, 151936),
    "14B": decoder(5120, 17408, 40, 40, 8, 151936),
    "32B": decoder(5120, 25600, 64, 64, 8, 151936),
}
EXPERTS = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
QWEN3_30B = decoder(2048, 6144, 48, 32, 4, 151936, **EXPERTS)
LLAMA_1B = decoder(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED)
LLAMA_3B = decoder(3072, 8192, 28, 24, 8, 128256, **TIED)
LLAMA_8B = decoder(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = decoder(8192, 28672, 80, 64, 8, 128256)
VICUNA_7B = decoder(4096, 11008, 32, 32, 32, 32064)
VICUNA_13B = decoder(5120, 13824, 40, 40, 40, 32064)
MISTRAL_7B = decoder(4096, 14336, 32, 32, 8, 32768, sliding_window=None)
PHI3_MINI = decoder(3072, 8192, 32, 32, 32, 32064)
CLIP_L_336 = vision(1024, 4096, 24, 16, 336, 14)
SO400M = vision(1152, 4304, 27, 16, 896, 14, model_type="siglip_vision_model")
SMOLVLM = {
    "SmolVLM2-500M": {
        "text_config": {**decoder(960, 2560, 32, 15, 5, 49280), "model_type": "llama"},
        "vision_config": vision(768, 3072, 12, 12, 512, 16),
        "scale_factor": 4,
    },
    "SmolVLM2-2.2B": {
        "text_config": {**decoder(2048, 8192, 24, 32, 32, 49280), "model_type": "llama"},
        "vision_config": {**SO400M, "image_size": 384},
        "scale_factor": 3,
    },
}
GEMMA = {"2B": decoder(2048, 16384, 18, 8, 1, 256000), "7B": decoder(3072, 24576, 28, 16, 16, 256000)}
COLPALI = {
    "text_config": {**GEMMA["2B"], "vocab_size": 257216, "model_type": "gemma"},
    "vision_config": {**SO400M, "image_size": 448},
}
GEMMA3_1B = decoder(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512)
GEMMA3_270M = decoder(640, 2048, 18, 4, 1, 262144, head_dim=256, sliding_window=512)
EMBEDDING_GEMMA = decoder(
    768, 1152, 24, 3, 1, 262144, head_dim=256, sliding_window=512, use_bidirectional_attention=True
)
GEMMA3 = {
    "4B": decoder(2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024),
    "12B": decoder(3840, 15360, 48, 16, 8, 262208, head_dim=256, sliding_window=1024),
    "27B": decoder(5376, 21504, 62, 32, 16, 262208, head_dim=128, sliding_window=1024),
}
PER_LAYER = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "sliding_window": 512}
E2B_LAYERS = [("full" if i % 5 == 4 else "sliding") + "_attention" for i in range(35)]
GEMMA4 = {
    "E2B": decoder(
        1536,
        6144,
        35,
        8,
        1,
        262144,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        layer_types=E2B_LAYERS,
        **PER_LAYER,
    ),
    "E4B": decoder(2560, 10240, 42, 8, 2, 262144, num_kv_shared_layers=18, **PER_LAYER),
    "26B-A4B": decoder(
        2816,
        2112,
        30,
        16,
        8,
        262144,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31B": decoder(
        5376,
        21504,
        60,
        32,
        16,
        262144,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
    ),
}
GEMMA4_LARGE_TOWER = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72},
}
SECTIONS = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
QWEN25_VIT = {size: qwen_vit(1280, 3420, 32, width) for size, width in (("3B", 2048), ("7B", 3584), ("72B", 8192))}
QWEN3_VIT = {
    "2B": qwen_vit(1024, 4096, 24, 2048, deepstack_visual_indexes=[5, 11, 17]),
    "4B": qwen_vit(1024, 4096, 24, 2560, deepstack_visual_indexes=[5, 11, 17]),
    "8B": qwen_vit(1152, 4304, 27, 4096, deepstack_visual_indexes=[8, 16, 24]),
    "32B": qwen_vit(1152, 4304, 27, 5120, deepstack_visual_indexes=[8, 16, 24]),
    "30B-A3B": qwen_vit(1152, 4304, 27, 2048, deepstack_visual_indexes=[8, 16, 24]),
}
QWEN3_VL = {
    size: {"text_config": QWEN3[text], "vision_config": QWEN3_VIT[size], **tied}
    for size, text, tied in (("2B", "1.7B", TIED), ("4B", "4B", TIED), ("8B", "8B", {}), ("32B", "32B", {}))
}
QWEN2_VL_2B = {**QWEN2["1.5B"], **SECTIONS, "vision_config": {"hidden_size": 1536}}
QWEN25_VL_3B = {**QWEN2["3B"], **SECTIONS, "vision_config": QWEN25_VIT["3B"]}
COL_HEAD = {"custom_text_proj.weight": (128, 1)}
HIDDEN_AUDIO = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}


def qwen3_audio(size: int, layers: int, heads: int, inner: int, output: int) -> dict[str, object]:
    return {
        **{"d_model": size, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": inner},
        **{"num_mel_bins": 128, "n_window": 50, "output_dim": output},
    }


OMNI = {
    size: {
        "thinker_config": {
            "text_config": {**QWEN2[size], "vocab_size": 151936 if size == "3B" else 152064, **SECTIONS},
            "vision_config": QWEN25_VIT[size],
            "audio_config": {**HIDDEN_AUDIO, "num_mel_bins": 128, "output_dim": QWEN2[size]["hidden_size"]},
        }
    }
    for size in ("3B", "7B")
}
ONE_LABEL = {"num_labels": 1}
BERT_BASE, BERT_LARGE = encoder(768, 3072, 12, 12, 30522), encoder(1024, 4096, 24, 16, 30522)
MINILM = encoder(384, 1536, 6, 12, 30522)
ROBERTA_BASE = encoder(768, 3072, 12, 12, 50265, max_position_embeddings=514, type_vocab_size=1)
XLM_R_BASE = {**ROBERTA_BASE, "vocab_size": 250002}
XLM_R_LARGE = encoder(1024, 4096, 24, 16, 250002, max_position_embeddings=8194, type_vocab_size=1)
DISTILBERT = {"dim": 768, "hidden_dim": 3072, "n_layers": 6, "n_heads": 12, "vocab_size": 30522}
MPNET = encoder(768, 3072, 12, 12, 30527, max_position_embeddings=514)
DEBERTA_BASE = encoder(
    768,
    3072,
    12,
    12,
    128100,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    position_biased_input=False,
)
NOMIC = {
    **{"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072, "n_positions": 8192, "vocab_size": 30528},
    **{"activation_function": "swiglu", "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False},
}
NOMIC_MOE = {
    **{"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 3072, "n_positions": 2048, "vocab_size": 250048},
    **{"activation_function": "gelu", "num_experts": 8, "moe_top_k": 2, "moe_every_n_layers": 2, "type_vocab_size": 1},
}
GTE_BASE = encoder(768, 3072, 12, 12, 250048, type_vocab_size=1)
GTE_EN_LARGE = encoder(1024, 4096, 24, 16, 30528, type_vocab_size=2)
JINA_TASKS = ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
JINA_V3 = encoder(1024, 4096, 24, 16, 250002, type_vocab_size=1, lora_adaptations=JINA_TASKS, lora_rank=4)
MODERN_BASE = encoder(768, 1152, 22, 12, 50368)
MODERN_LARGE = encoder(1024, 2624, 28, 16, 50368)
CLIP_B_32 = {
    "projection_dim": 512,
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408},
    "vision_config": vision(768, 3072, 12, 12, 224, 32),
}
CLIP_L_14 = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 49408},
    "vision_config": vision(1024, 4096, 24, 16, 224, 14),
}
SIGLIP_BASE = {
    "text_config": encoder(768, 3072, 12, 12, 32000),
    "vision_config": vision(768, 3072, 12, 12, 224, 16, model_type="siglip_vision_model"),
}
SIGLIP_SO400M = {
    "text_config": encoder(1152, 4304, 27, 16, 32000),
    "vision_config": vision(1152, 4304, 27, 16, 384, 14, model_type="siglip_vision_model"),
}
MINICPMV = {
    **decoder(3584, 18944, 28, 28, 4, 151666),
    **{"version": 2.6, "query_num": 64, "drop_vision_last_layer": False},
    "vision_config": vision(1152, 4304, 27, 16, 980, 14),
}


def sizes(name: str, shapes: Mapping[str, Config], **more: Any) -> dict[str, Config]:
    """Entries whose names end with the size."""
    return {f"{name}-{size}": {**shape, **more} for size, shape in shapes.items()}


def some(shapes: Mapping[str, Config], *wanted: str) -> dict[str, Config]:
    return {name: shapes[name] for name in wanted}


PUBLISHED: Mapping[str, Mapping[str, Config]] = {
    "LlamaForCausalLM": {
        "Llama-3.2-1B": LLAMA_1B,
        "Llama-3.2-3B": LLAMA_3B,
        "Llama-3.1-8B": LLAMA_8B,
        "Llama-3.3-70B": LLAMA_70B,
    },
    "MistralForCausalLM": {
        "Mistral-7B-v0.3": MISTRAL_7B,
        "Mistral-Nemo-12B": decoder(5120, 14336, 40, 32, 8, 131072, head_dim=128, sliding_window=None),
    },
    "Ministral3ForCausalLM": {"Ministral-3-3B": MINISTRAL_3B},
    "Qwen2ForCausalLM": sizes("Qwen2.5", QWEN2),
    "Qwen3ForCausalLM": sizes("Qwen3", QWEN3),
    "MixtralForCausalLM": {"Mixtral-8x7B": {**MISTRAL_7B, "vocab_size": 32000}},
    "Qwen2MoeForCausalLM": {
        "Qwen1.5-MoE-A2.7B": decoder(
            2048,
            5632,
            24,
            16,
            16,
            151936,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        )
    },
    "Qwen3MoeForCausalLM": {"Qwen3-30B-A3B": QWEN3_30B},
    "OlmoeForCausalLM": {"OLMoE-1B-7B": decoder(2048, 1024, 16, 16, 16, 50304)},
    "GptOssForCausalLM": {
        f"GPT-OSS-{size}": decoder(2880, 2880, layers, 64, 8, 201088, num_local_experts=experts)
        for size, layers, experts in (("20B", 24, 32), ("120B", 36, 128))
    },
    "Lfm2ForCausalLM": LFM2,
    "Lfm2VlForConditionalGeneration": {
        f"LFM2-VL-{size}": {"text_config": {**text, "model_type": "lfm2"}, "vision_config": vision}
        for size, text, vision in (
            ("450M", LFM2["LFM2-350M"], {}),
            (
                "1.6B",
                LFM2["LFM2-1.2B"],
                {**SO400M, "num_hidden_layers": 26, "patch_size": 16, "model_type": "siglip2_vision_model"},
            ),
        )
    },
    "SmolVLMForConditionalGeneration": SMOLVLM,
    "Idefics3ForConditionalGeneration": {
        "Idefics3-8B": {
            "text_config": {**LLAMA_8B, "vocab_size": 128259, "model_type": "llama"},
            "vision_config": {**SO400M, "image_size": 364},
            "scale_factor": 2,
        }
    },
    "LlavaOnevisionForConditionalGeneration": {
        f"LLaVA-OneVision-{size}": {
            "text_config": {**QWEN2[size], "model_type": "qwen2"},
            "vision_config": {**SO400M, "image_size": 384, "num_hidden_layers": 26},
        }
        for size in ("0.5B", "7B", "72B")
    },
    "Glm4vForConditionalGeneration": {
        "GLM-4.1V-9B": {"text_config": {"model_type": "glm4v_text"}, "vision_config": {}}
    },
    "Glm4vMoeForConditionalGeneration": {
        "GLM-4.5V": {
            "text_config": {
                **decoder(4096, 10944, 46, 96, 8, 151552, head_dim=128, attention_bias=True),
                "model_type": "glm4v_moe_text",
            },
            "vision_config": {"intermediate_size": 10944},
        }
    },
    "GlmOcrForConditionalGeneration": {"GLM-OCR": {"text_config": {"model_type": "glm_ocr_text"}, "vision_config": {}}},
    "PaddleOCRVLForConditionalGeneration": {
        "PaddleOCR-VL-0.9B": {
            **decoder(1024, 3072, 18, 16, 2, 103424, head_dim=128, tie_word_embeddings=False),
            "vision_config": {},
        }
    },
    "Glm4MoeForCausalLM": {"GLM-4.5-Air": decoder(4096, 10944, 46, 96, 8, 151552, head_dim=128, attention_bias=True)},
    "Qwen3_5ForCausalLM": {"Qwen3.5-0.8B": QWEN35_800M},
    "Qwen3_5ForConditionalGeneration": {
        "Qwen3.5-0.8B": {
            "text_config": QWEN35_800M,
            "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096},
        }
    },
    "Qwen3_5MoeForConditionalGeneration": {"Qwen3.6-35B-A3B": {"text_config": QWEN36_35B, "vision_config": {}}},
    "Phi3ForCausalLM": {"Phi-3.5-mini": PHI3_MINI, "Phi-3-medium": decoder(5120, 17920, 40, 40, 10, 32064)},
    "Qwen3Model": sizes("Qwen3-Embedding", some(QWEN3, "0.6B", "4B", "8B")),
    "MistralModel": {"E5-Mistral-7B": {**MISTRAL_7B, "vocab_size": 32000}},
    "GemmaForCausalLM": {**sizes("Gemma", GEMMA), "bge-reranker-v2-gemma": GEMMA["2B"]},
    "Gemma3ForCausalLM": {"Gemma-3-270M": GEMMA3_270M, "Gemma-3-1B": GEMMA3_1B},
    "Gemma3TextModel": {"EmbeddingGemma-300M": EMBEDDING_GEMMA},
    "Gemma3ForConditionalGeneration": {
        f"Gemma-3-{size}": {"text_config": shape, "vision_config": SO400M} for size, shape in GEMMA3.items()
    },
    "Gemma4ForCausalLM": sizes("Gemma-4", some(GEMMA4, "E2B")),
    "Gemma4ForConditionalGeneration": {
        f"Gemma-4-{size}": {"text_config": shape, "vision_config": {} if size in ("E2B", "E4B") else GEMMA4_LARGE_TOWER}
        for size, shape in GEMMA4.items()
    },
    "LlavaForConditionalGeneration": {
        "LLaVA-1.5-7B": {"text_config": VICUNA_7B, "vision_config": CLIP_L_336},
        "LLaVA-1.5-13B": {"text_config": VICUNA_13B, "vision_config": CLIP_L_336},
    },
    "LlavaNextForConditionalGeneration": {
        "LLaVA-v1.6-Mistral-7B": {"text_config": {**MISTRAL_7B, "vocab_size": 32064}, "vision_config": CLIP_L_336},
        "LLaVA-v1.6-34B": {"text_config": decoder(7168, 20480, 60, 56, 8, 64064), "vision_config": CLIP_L_336},
    },
    "Mistral3ForConditionalGeneration": {
        "Mistral-Small-3.2-24B": {
            "text_config": {
                **decoder(5120, 32768, 40, 32, 8, 131072, head_dim=128),
                "model_type": "mistral",
                "sliding_window": None,
            },
            "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
        },
        **{
            f"Ministral-3-{size}": {
                "text_config": {**text, "model_type": "ministral3"},
                "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
            }
            for size, text in (
                ("3B", MINISTRAL_3B),
                ("8B", decoder(4096, 14336, 34, 32, 8, 131072, head_dim=128)),
                ("14B", decoder(5120, 16384, 40, 32, 8, 131072, head_dim=128)),
            )
        },
    },
    "PixtralForConditionalGeneration": {
        "Pixtral-12B": {
            "text_config": {
                **decoder(5120, 14336, 40, 32, 8, 131072, head_dim=128),
                "model_type": "mistral",
                "sliding_window": None,
            },
            "vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16},
        }
    },
    "InternVLForConditionalGeneration": {
        f"InternVL3-{size}": {"text_config": {**text, "model_type": "qwen2"}, "vision_config": {"attention_bias": True}}
        for size, text in (
            ("1B", decoder(896, 4864, 24, 14, 2, 151674)),
            ("2B", decoder(1536, 8960, 28, 12, 2, 151674)),
            ("8B", decoder(3584, 18944, 28, 28, 4, 151674)),
            ("14B", decoder(5120, 13824, 48, 40, 8, 151674)),
        )
    },
    "UltravoxModel": {
        f"Ultravox-v0.5-{name}": {
            "text_config": text,
            "audio_config": {**HIDDEN_AUDIO, "num_mel_bins": 128},
            **{"hidden_size": 4096, "projector_act": "swiglu", "projector_ln_mid": True},
        }
        for name, text in (("Llama-3.2-1B", LLAMA_1B), ("Llama-3.1-8B", LLAMA_8B))
    },
    "Qwen2AudioForConditionalGeneration": {
        "Qwen2-Audio-7B-Instruct": {
            "text_config": {"model_type": "qwen2", "intermediate_size": 11008, "vocab_size": 156032},
            "audio_config": {**HIDDEN_AUDIO, "num_mel_bins": 128},
        }
    },
    "VoxtralForConditionalGeneration": {
        f"Voxtral-{name}-2507": {
            "text_config": {**text, "model_type": "llama"},
            "audio_config": {**HIDDEN_AUDIO, "num_mel_bins": 128},
        }
        for name, text in (
            ("Mini-3B", decoder(3072, 8192, 30, 32, 8, 131072, head_dim=128)),
            ("Small-24B", decoder(5120, 32768, 40, 32, 8, 131072, head_dim=128)),
        )
    },
    "Qwen3ASRForConditionalGeneration": {
        f"Qwen3-ASR-{size}": {
            "thinker_config": {"text_config": {**QWEN3[size], **TIED}, "audio_config": qwen3_audio(*audio)}
        }
        for size, audio in (("0.6B", (896, 18, 14, 3584, 1024)), ("1.7B", (1024, 24, 16, 4096, 2048)))
    },
    "Phi3VForCausalLM": {"Phi-3.5-vision": {**PHI3_MINI, "img_processor": {"vision_config": CLIP_L_336}}},
    "MiniCPMV": {
        "MiniCPM-V-2.6": MINICPMV,
        "MiniCPM-V-4.5": {**MINICPMV, **decoder(4096, 12288, 36, 32, 8, 151748, head_dim=128), "version": 4.5},
    },
    "Qwen2VLForConditionalGeneration": {
        "Qwen2-VL-2B": QWEN2_VL_2B,
        "Qwen2-VL-7B": {**QWEN2["7B"], **SECTIONS, "vision_config": {"hidden_size": 3584}},
        "Qwen2-VL-72B": {**QWEN2["72B"], **SECTIONS, "vision_config": {"hidden_size": 8192}},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "Qwen2.5-VL-3B": QWEN25_VL_3B,
        "Qwen2.5-VL-7B": {**QWEN2["7B"], **SECTIONS, "vision_config": QWEN25_VIT["7B"]},
        "Qwen2.5-VL-72B": {**QWEN2["72B"], **SECTIONS, "vision_config": QWEN25_VIT["72B"]},
    },
    "Qwen3VLForConditionalGeneration": sizes("Qwen3-VL", QWEN3_VL),
    "Qwen3VLMoeForConditionalGeneration": {
        "Qwen3-VL-30B-A3B": {"text_config": QWEN3_30B, "vision_config": QWEN3_VIT["30B-A3B"]}
    },
    "Qwen3VLForSequenceClassification": sizes("Qwen3-VL-Reranker", some(QWEN3_VL, "2B", "8B"), **ONE_LABEL),
    "Qwen3ForSequenceClassification": sizes("Qwen3-Reranker", some(QWEN3, "0.6B", "4B", "8B"), **ONE_LABEL),
    "Qwen2ForSequenceClassification": sizes("mxbai-rerank-v2", some(QWEN2, "0.5B", "1.5B"), **ONE_LABEL),
    "Qwen2ForRewardModel": sizes("Qwen2.5-Math-RM", some(QWEN2, "72B"), **ONE_LABEL),
    "Qwen2ForProcessRewardModel": sizes("Qwen2.5-Math-PRM", some(QWEN2, "7B"), num_labels=2),
    "BertModel": {"all-MiniLM-L6-v2": MINILM, "bge-base-en-v1.5": BERT_BASE, "bge-large-en-v1.5": BERT_LARGE},
    "XLMRobertaModel": {"multilingual-e5-base": XLM_R_BASE},
    "ColPaliForRetrieval": {"colpali-v1.3-hf": {"vlm_config": COLPALI}},
    "ColQwen2": {"ColQwen2-v1.0": QWEN2_VL_2B},
    "ColQwen2_5": {"ColQwen2.5-v0.2": QWEN25_VL_3B},
    "HF_ColBERT": {"colbertv2.0": BERT_BASE},
    "JinaColBert": {"jina-colbert-v2": encoder(1024, 4096, 24, 16, 250004, type_vocab_size=1)},
    "BgeM3EmbeddingModel": {"bge-m3": XLM_R_LARGE},
    "BertForSequenceClassification": {"ms-marco-MiniLM-L6-v2": {**MINILM, **ONE_LABEL}},
    "XLMRobertaForSequenceClassification": {
        "bge-reranker-base": {**XLM_R_BASE, **ONE_LABEL},
        "bge-reranker-v2-m3": {**XLM_R_LARGE, **ONE_LABEL},
    },
    "BertForTokenClassification": {"bert-base-NER": {**BERT_BASE, "vocab_size": 28996, "num_labels": 9}},
    "DistilBertModel": {"distilbert-base-uncased": DISTILBERT},
    "DistilBertForSequenceClassification": {"distilbert-sst-2": {**DISTILBERT, "num_labels": 2}},
    "MPNetModel": {"all-mpnet-base-v2": MPNET},
    "MPNetForSequenceClassification": {"mpnet-base": {**MPNET, "num_labels": 2}},
    "DebertaV2Model": {"deberta-v3-base": DEBERTA_BASE},
    "DebertaV2ForSequenceClassification": {"mxbai-rerank-base-v1": {**DEBERTA_BASE, **ONE_LABEL}},
    "DebertaV2ForTokenClassification": {"deberta-v3-base": {**DEBERTA_BASE, "num_labels": 9}},
    "NomicBertModel": {"nomic-embed-text-v1.5": NOMIC, "nomic-embed-text-v2-moe": NOMIC_MOE},
    "NomicBertForSequenceClassification": {"nomic-bert-2048": {**NOMIC, "num_labels": 2}},
    "GteForTokenClassification": {"gte-multilingual-base": {**GTE_BASE, "num_labels": 9}},
    "CLIPModel": {"clip-vit-base-patch32": CLIP_B_32, "clip-vit-large-patch14": CLIP_L_14},
    "SiglipModel": {"siglip-base-patch16-224": SIGLIP_BASE, "siglip-so400m-patch14-384": SIGLIP_SO400M},
    "Siglip2Model": {
        "siglip2-base-patch16-naflex": {"text_config": encoder(768, 3072, 12, 12, 256000), "vision_config": {}}
    },
    "JinaEmbeddingsV3Model": {"jina-embeddings-v3": JINA_V3},
    "JinaEmbeddingsV3ForSequenceClassification": {"jina-embeddings-v3": {**JINA_V3, "num_labels": 2}},
    "NewModel": {"gte-multilingual-base": GTE_BASE, "gte-large-en-v1.5": GTE_EN_LARGE},
    "NewForSequenceClassification": {"gte-multilingual-reranker-base": {**GTE_BASE, **ONE_LABEL}},
    "ModernBertModel": {"ModernBERT-base": MODERN_BASE, "ModernBERT-large": MODERN_LARGE},
    "ModernBertForSequenceClassification": {"gte-reranker-modernbert-base": {**MODERN_BASE, **ONE_LABEL}},
    "WhisperForConditionalGeneration": {
        "whisper-tiny": whisper(384, 4, 6, 80, 51865),
        "whisper-base": whisper(512, 6, 8, 80, 51865),
        "whisper-small": whisper(768, 12, 12, 80, 51865),
        "whisper-medium": whisper(1024, 24, 16, 80, 51865),
        "whisper-large-v3": whisper(1280, 32, 20, 128, 51866),
        "whisper-large-v3-turbo": whisper(1280, 32, 20, 128, 51866, 4),
    },
    "Qwen2_5OmniForConditionalGeneration": sizes("Qwen2.5-Omni", OMNI),
    "Qwen3OmniMoeForConditionalGeneration": {
        "Qwen3-Omni-30B-A3B": {
            "thinker_config": {
                "text_config": {**QWEN3_30B, "vocab_size": 152064},
                "vision_config": QWEN3_VIT["30B-A3B"],
                "audio_config": qwen3_audio(1280, 32, 20, 5120, 2048),
            }
        }
    },
}
MODEL_TYPES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    **dict.fromkeys(("MistralForCausalLM", "MistralModel"), "mistral"),
    **dict.fromkeys(
        ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2ForRewardModel", "Qwen2ForProcessRewardModel"),
        "qwen2",
    ),
    **dict.fromkeys(("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"), "qwen3"),
    "Ministral3ForCausalLM": "ministral3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
    "Lfm2ForCausalLM": "lfm2",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3TextModel": "gemma3_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "Phi3VForCausalLM": "phi3_v",
    "PaddleOCRVLForConditionalGeneration": "paddleocr_vl",
    "MiniCPMV": "minicpmv",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "ColQwen2": "qwen2_vl",
    "ColQwen2_5": "qwen2_5_vl",
    "WhisperForConditionalGeneration": "whisper",
}
"""`model_type`, of architectures whose decoder stands in config.json itself."""
TENSORS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "ColPaliForRetrieval": {"embedding_proj_layer.weight": (128, 1)},
    "ColQwen2": COL_HEAD,
    "ColQwen2_5": COL_HEAD,
    "HF_ColBERT": {"linear.weight": (128, 768)},
    "JinaColBert": {"linear.weight": (128, 1024)},
}
"""Tensors whose shapes a family reads from the weight files, by architecture."""
FILES: Mapping[str, Mapping[str, Config]] = {
    "Qwen2ForProcessRewardModel": {
        "tokenizer_config.json": {"added_tokens_decoder": {"151665": {"content": "<extra_0>", "special": True}}}
    }
}
"""JSON files that a family's model reads beside config.json, by architecture."""
